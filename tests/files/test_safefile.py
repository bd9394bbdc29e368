"""Damaged safetensors files are refused, good ones are read and written bit for bit, whatever the disk does."""

import errno
import json
import os
import resource
import subprocess
import sys
import time
import tracemalloc
import weakref
from pathlib import Path

import numpy
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from qkit.errors import BadCheckpoint, IOFailure, QkitError, VerifyFailure
from qkit.files import safefile
from qkit.files.safefile import (
    DTYPES,
    count_nonfinite,
    read_header,
    read_tensor,
    save_tensors,
    sha256_file,
    write_atomic,
    write_safetensors,
)


def raw(path: Path, header: object, data: bytes = b"", length: int | None = None) -> Path:
    """A file with any header: bytes go in as they are, anything else as JSON."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)
    return path


def entry(dtype: str = "F32", shape: object = (2,), offsets: object = (0, 8)) -> dict[str, object]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}  # type: ignore[call-overload]


def refused(path: Path, match: str) -> None:
    with pytest.raises(BadCheckpoint, match=match) as caught:
        read_header(path)
    assert path.name in str(caught.value)
    assert str(caught.value).isprintable()


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "x.safetensors"


# A1 to A6, A8, A9: headers


@pytest.mark.parametrize("size", [0, 7, 8, 9])
def test_too_small(file: Path, size: int) -> None:
    file.write_bytes(bytes(size))
    refused(file, f"header too small: {size} bytes")


@pytest.mark.parametrize("length", [0, 1, 5000, 2**63, 2**64 - 1, 100_000_001, 99_999_999])
def test_header_length_is_checked_before_memory_is_taken(file: Path, length: int) -> None:
    raw(file, b"{}" * 100, length=length)
    tracemalloc.start()
    refused(file, "header")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 20


@pytest.mark.parametrize(
    ("header", "match"),
    [
        (b'{"a\xff": 1}', "not UTF-8"),
        (b"{not json", "not valid JSON"),
        (b"[1, 2]", "start with '{'"),
        (b" {}", "start with '{'"),
        (b"{}{}", "not valid JSON"),
        (b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "too deep"),
        (b'{"a": ' * 5000 + b"1" + b"}" * 5000, "too deep|found"),
        (b'{"a": NaN}', "finite"),
        (b'{"a": 1e999}', "finite"),
        (b'{"a": ' + b"9" * 5000 + b"}", "not valid JSON"),
        (b'{"__metadata__": {"a": 1}}', "__metadata__"),
        (b'{"__metadata__": []}', "__metadata__"),
    ],
)
def test_header_must_be_the_right_json(file: Path, header: bytes, match: str) -> None:
    refused(raw(file, header), match)


@pytest.mark.parametrize(
    ("second", "data", "match"),
    [
        ((4, 12), 12, "overlaps"),
        ((0, 8), 8, "overlaps"),
        ((12, 20), 20, "hole"),
        ((8, 16), 17, "end at byte"),
        ((8, 16), 15, "has 146 bytes, expected 147"),
        ((16, 8), 16, "bytes of data"),
        ((-8, 0), 16, "data_offsets"),
    ],
)
def test_data_must_be_covered_exactly_once(file: Path, second: tuple[int, int], data: int, match: str) -> None:
    refused(raw(file, {"a": entry(), "b": entry(offsets=second)}, bytes(data)), match)


def test_hole_at_the_start(file: Path) -> None:
    refused(raw(file, {"a": entry(offsets=(8, 16))}, bytes(16)), "hole")


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"shape": [3]}, "expected 12"),
        ({"shape": [2, 2**63]}, "shape"),
        ({"shape": [2**36, 2**36, 2**36]}, "expected 12980742146"),
        ({"shape": [-2]}, "shape"),
        ({"shape": [True, 2]}, "shape"),
        ({"shape": [2.0]}, "shape"),
        ({"shape": "2"}, "shape"),
        ({"shape": [1] * 9}, "shape"),
        ({"shape": [0, 2**40], "data_offsets": [0, 0]}, "shape"),
        ({"dtype": "F31"}, "unknown dtype"),
        ({"dtype": ["F32"]}, "unknown dtype"),
        ({"data_offsets": [0, 8, 8]}, "data_offsets"),
        ({"data_offsets": [0]}, "data_offsets"),
        ({"data_offsets": [0, "8"]}, "data_offsets"),
        ({"data_offsets": [0, 2**70]}, "data_offsets"),
        ({"extra": 1}, "exactly dtype"),
    ],
)
def test_entry_must_be_consistent(file: Path, change: dict[str, object], match: str) -> None:
    refused(raw(file, {"a": {**entry(), **change}}, bytes(8)), match)


def test_duplicate_name(file: Path) -> None:
    one = json.dumps(entry())
    refused(raw(file, f'{{"a": {one}, "a": {one}}}'.encode(), bytes(8)), "'a' occurs twice")


@pytest.mark.parametrize(
    "name", ["", "../x", "a/b", "a\\b", "a\0b", "a\nb", "a b", "\x1b[31m", "\u00e9", "a" * 513, "a" * 10_000, "a..b"]
)
def test_name_rule(file: Path, name: str) -> None:
    refused(raw(file, {name: entry()}, bytes(8)), "expected a name")


def test_limits_are_quick(file: Path) -> None:
    one = json.dumps(entry(shape=(0,), offsets=(0, 0)))
    raw(file, ("{" + ",".join(f'"t{i}":{one}' for i in range(300_000)) + "}").encode())
    start = time.perf_counter()
    json.loads(file.read_bytes()[8:])
    parse = time.perf_counter() - start
    start = time.perf_counter()
    refused(file, "300000 tensors")
    assert time.perf_counter() - start < 3 * parse + 1.0


def test_only_regular_files(file: Path, tmp_path: Path) -> None:
    os.mkfifo(file)
    refused(file, "regular file")
    refused(tmp_path / "missing", "no such file")
    with pytest.raises(BadCheckpoint, match="regular file"):
        read_header(tmp_path)


# A13 is in test_checkpoint.py. B13: fuzz

GOOD = {"a": entry(), "bb": entry("BF16", (2, 3), (8, 20)), "c": entry("U8", (), (20, 21))}


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_fuzz_only_qkit_errors_leave(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    path = raw(tmp_path_factory.getbasetemp() / "fuzz.safetensors", GOOD, bytes(21))
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(content)))
        removed = data.draw(st.integers(0, 8))
        inserted = data.draw(st.binary(max_size=6) | st.sampled_from([b"[", b'"a":', b"-1", b"9" * 30, b"\\u0000"]))
        content[at : at + removed] = inserted
    path.write_bytes(content)
    try:
        infos = read_header(path)
        total = sum(read_tensor(info).nbytes for info in infos.values())
    except QkitError as error:
        assert str(error).isprintable()
    else:
        assert total <= len(content)


# Reading and writing


def sample() -> dict[str, torch.Tensor]:
    """Every dtype, odd sizes, no elements, rank 0."""
    random = torch.Generator().manual_seed(0)
    tensors = {
        f"t.{name}": torch.randint(0, 2 if name == "BOOL" else 256, (15 * size,), generator=random)
        .to(torch.uint8)
        .view(getattr(torch, dtype))
        .reshape(3, 5)
        for name, (dtype, size) in DTYPES.items()
    }
    return {**tensors, "empty": torch.empty(0, 3), "scalar": torch.tensor(2.5), "strided": torch.randn(4, 6).T}


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    bits = [x.contiguous().reshape(-1).view(torch.uint8) for x in (a, b)]
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(*bits)


def test_round_trip_of_every_dtype_also_with_the_library(file: Path, tmp_path: Path) -> None:
    tensors = sample()
    digest = save_tensors(file, tensors)
    assert digest == sha256_file(file)
    infos = read_header(file)
    by_library = load_file(file)
    assert infos.keys() == tensors.keys() == by_library.keys()
    for name, tensor in tensors.items():
        assert same(read_tensor(infos[name]), tensor), name
        assert same(by_library[name], tensor), name
        assert infos[name].begin % max(tensor.dtype.itemsize, 1) == 0
    save_file({n: t.contiguous() for n, t in tensors.items()}, tmp_path / "lib.safetensors", {"format": "pt"})
    theirs = read_header(tmp_path / "lib.safetensors")
    assert all(same(read_tensor(theirs[name]), tensors[name]) for name in tensors)


def test_bytes_depend_on_the_content_alone(file: Path, tmp_path: Path) -> None:
    tensors = sample()
    first = save_tensors(file, tensors)
    assert save_tensors(tmp_path / "y", dict(reversed(tensors.items()))) == first
    assert file.stat().st_size == 8 + int.from_bytes(file.read_bytes()[:8], "little") + sum(
        t.numel() * t.itemsize for t in tensors.values()
    )


def test_one_tensor_at_a_time(file: Path) -> None:
    alive: list[weakref.ref[numpy.ndarray]] = []  # the memory under a tensor, which views of it keep alive too

    def load(name: str) -> torch.Tensor:
        assert all(ref() is None for ref in alive), "the tensor before is still in memory"
        memory = numpy.full(1000, float(name), dtype=numpy.float32)
        alive.append(weakref.ref(memory))
        return torch.from_numpy(memory)

    write_safetensors(file, [(str(i), torch.float32, (1000,)) for i in range(5)], load)
    assert len(alive) == 5


@pytest.mark.parametrize("wrong", [torch.zeros(3, 2), torch.zeros(2, 3, dtype=torch.float64), torch.zeros(6)])
def test_writer_holds_tensors_to_their_spec(file: Path, wrong: torch.Tensor) -> None:
    file.write_bytes(b"old")
    with pytest.raises(VerifyFailure, match="expected"):
        write_safetensors(file, [("a", torch.float32, (2, 3))], lambda _: wrong)
    assert file.read_bytes() == b"old"
    assert os.listdir(file.parent) == [file.name]


@pytest.mark.parametrize("names", [["a/b"], ["a", "a"], [""], ["__metadata__"]])
def test_writer_refuses_names_that_the_reader_would(file: Path, names: list[str]) -> None:
    with pytest.raises(VerifyFailure, match="cannot be written"):
        write_safetensors(file, [(name, torch.float32, (1,)) for name in names], lambda _: torch.zeros(1))


def test_short_read_and_vanished_file(file: Path) -> None:
    save_tensors(file, {"a": torch.arange(1000)})
    info = read_header(file)["a"]
    os.truncate(file, info.end - 1)
    with pytest.raises(BadCheckpoint, match="ends after 7999 bytes, expected 8000"):
        read_tensor(info)
    file.unlink()
    with pytest.raises(BadCheckpoint, match="no such file"):
        read_tensor(info)


def test_bool_must_be_zero_or_one(file: Path) -> None:
    raw(file, {"a": entry("BOOL", (2,), (0, 2))}, b"\1\2")
    with pytest.raises(BadCheckpoint, match="BOOL"):
        read_tensor(read_header(file)["a"])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e5m2])
def test_count_nonfinite(dtype: torch.dtype) -> None:
    t = torch.zeros(safefile.CHUNK + 3, dtype=torch.float32)
    assert count_nonfinite(t.to(dtype)) == 0
    t[0], t[5], t[-1] = float("nan"), float("inf"), float("-inf")
    assert count_nonfinite(t.to(dtype)) == 3
    assert count_nonfinite(t.to(dtype).reshape(-1, 1).expand(-1, 2)) == 6


def test_count_nonfinite_of_other_dtypes() -> None:
    assert count_nonfinite(torch.tensor([float("nan"), 1]).to(torch.float8_e4m3fn)) == 1
    assert count_nonfinite(torch.tensor([255, 254], dtype=torch.uint8).view(torch.float8_e8m0fnu)) == 1
    assert count_nonfinite(torch.full((3,), torch.finfo(torch.bfloat16).max, dtype=torch.bfloat16)) == 0
    assert count_nonfinite(torch.arange(3)) == count_nonfinite(torch.empty(0)) == 0


# D2, D3, D7, D15: durability


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EDQUOT])
@pytest.mark.parametrize("call", ["open", "write", "fsync", "replace", "fchmod"])
def test_every_failing_call_leaves_the_old_file(
    file: Path, monkeypatch: pytest.MonkeyPatch, call: str, code: int
) -> None:
    """The N-th call of each kind fails, for every N until nothing fails any more."""
    tensors = {f"t{i}": torch.randn(50) for i in range(3)}
    real = getattr(os, call)
    for nth in range(100):
        file.write_bytes(b"old")
        calls = 0

        def failing(*args: object, **kwargs: object) -> object:
            nonlocal calls
            calls += 1
            if calls == nth + 1:  # noqa: B023
                raise OSError(code, os.strerror(code))
            return real(*args, **kwargs)

        with monkeypatch.context() as patch:
            patch.setattr(safefile.os, call, failing)
            try:
                save_tensors(file, tensors)
                break
            except IOFailure as error:
                assert os.strerror(code) in str(error)
                assert ("bytes are needed" in str(error)) == (code in (errno.ENOSPC, errno.EDQUOT))
        if file.read_bytes() != b"old":  # only the sync of the folder comes after the rename
            assert call in ("open", "fsync")
            assert len(read_header(file)) == 3
        assert os.listdir(file.parent) == [file.name]
    assert nth >= 1
    assert len(read_header(file)) == 3


def test_short_writes_are_continued(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.write
    monkeypatch.setattr(safefile.os, "write", lambda handle, view: real(handle, view[:7]))
    write_atomic(file, bytes(range(100)))
    assert file.read_bytes() == bytes(range(100))


def test_order_of_the_calls(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    for call in ("write", "fsync", "replace"):
        real = getattr(os, call)
        monkeypatch.setattr(safefile.os, call, lambda *a, call=call, real=real: (seen.append(call), real(*a))[1])
    write_atomic(file, b"abc")
    assert seen == ["write", "fsync", "replace", "fsync"]


def test_file_size_limit_of_the_process(file: Path) -> None:
    """A real failure of the kernel, as a full disk gives it: at some write in the middle."""
    file.write_bytes(b"old")
    code = (
        "import sys, torch; from pathlib import Path; from qkit.files.safefile import save_tensors\n"
        "from qkit.errors import IOFailure\n"
        "try: save_tensors(Path(sys.argv[1]), {f't{i}': torch.zeros(10000) for i in range(10)})\n"
        "except IOFailure as e: sys.stdout.write(str(e)); sys.exit(5)\n"
    )
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))  # noqa: E731
    root = Path(safefile.__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-c", code, str(file)], preexec_fn=limit, capture_output=True, text=True, cwd=root, check=False
    )
    assert done.returncode == 5, done.stderr
    assert "File too large" in done.stdout and "40" in done.stdout
    assert file.read_bytes() == b"old"
    assert os.listdir(file.parent) == [file.name]


def test_exception_and_interrupt_in_the_loader(file: Path) -> None:
    def load(name: str) -> torch.Tensor:
        if name == "b":
            raise KeyboardInterrupt
        return torch.zeros(4)

    with pytest.raises(KeyboardInterrupt):
        write_safetensors(file, [("a", torch.float32, (4,)), ("b", torch.float32, (4,))], load)
    assert os.listdir(file.parent) == []


@pytest.mark.parametrize("mask", [0o022, 0o027, 0o077])
def test_mode_is_what_open_gives_or_what_was_there(file: Path, mask: int) -> None:
    before = os.umask(mask)
    try:
        write_atomic(file, b"new")
        save_tensors(file.with_name("t"), {"a": torch.zeros(1)})
        (file.parent / "plain").write_bytes(b"")
        expected = (file.parent / "plain").stat().st_mode
        assert file.stat().st_mode == file.with_name("t").stat().st_mode == expected
        file.chmod(0o644)
        write_atomic(file, b"again")
        assert file.stat().st_mode & 0o777 == 0o644
    finally:
        os.umask(before)


def test_long_and_odd_names(tmp_path: Path) -> None:
    for name in ("x" * 255, "with space \u00e9\u4e2d.bin"):
        write_atomic(tmp_path / name, b"1")
        assert (tmp_path / name).read_bytes() == b"1"
    with pytest.raises(IOFailure, match="cannot write"):
        write_atomic(tmp_path / "no" / "such" / "folder", b"1")


def test_one_file_may_have_more_than_64_gib(tmp_path):
    """A model of 405B in one file: the header is read, and no byte behind it. The file is sparse."""
    end = 0
    header = {}
    for name in ("a", "b"):
        header[name] = {"dtype": "BF16", "shape": [2**18, 2**18], "data_offsets": [end, end + 2**37]}
        end += 2**37
    path = raw(tmp_path / "model.safetensors", header)
    data = path.stat().st_size
    try:
        os.truncate(path, data + end)
    except OSError as e:
        pytest.skip(f"the file system has no sparse files of this size: {e}")
    assert [info.end for info in read_header(path).values()] == [data + 2**37, data + 2**38]
