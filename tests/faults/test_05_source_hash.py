"""Point 5: the source of a result is known by every byte, read once and then by its cache."""

import json
import os
import shutil
import time
from pathlib import Path

import pytest
import torch
from conftest import Quiet, Stops
from tiny_dits import make_pipeline

from qkit.errors import JobConflict, UsageError, VerifyFailure
from qkit.files import hash_cache
from qkit.files.checkpoint import Checkpoint
from qkit.files.hash_cache import cached_sha256
from qkit.files.locate import recorded_source
from qkit.files.safefile import read_header, read_tensor, save_tensors, sha256_file
from qkit.planning.request import Request
from qkit.workflows.quantize import prepare, quantize


def unsampled(file: Path) -> int:
    """A place in the data that the 256 sampled pages leave out."""
    start = min(info.begin for info in read_header(file).values())
    size = file.stat().st_size
    sampled = [start + (size - start - 4096) * i // 255 for i in range(256)]
    return next(at for at in range(start, size) if not any(s <= at < s + 4096 for s in sampled))


def flip(file: Path, at: int) -> None:
    """The lowest bit of a byte, which is that of a weight in bfloat16."""
    data = bytearray(file.read_bytes())
    data[at] ^= 1
    file.write_bytes(data)


@pytest.fixture(scope="module")
def large(tiny, tmp_path_factory) -> Path:
    """A model of more than 256 pages."""
    folder = tmp_path_factory.mktemp("large") / "model"
    shutil.copytree(tiny("llama", hidden_size=128, intermediate_size=384, vocab_size=8192), folder)
    file = folder / "model.safetensors"
    save_tensors(file, {name: read_tensor(info) for name, info in read_header(file).items()})
    return folder


@pytest.fixture
def model(large, tmp_path) -> Path:
    return Path(shutil.copytree(large, tmp_path / "model"))


def request_for(model: Path) -> Request:
    return Request(model=str(model), scheme="w4a16", group_size=32, threads=1)


def test_one_bit_of_the_source_is_another_source(model, tmp_path):
    request = request_for(model)
    quantize(request, tmp_path / "out", Quiet())
    record = json.loads((tmp_path / "out" / "qkit.json").read_text())
    checkpoint = Checkpoint.open(model)
    known = record["source"]
    assert (known["sha256"], known["fingerprint"]) == (checkpoint.sha256(), checkpoint.fingerprint())
    (tmp_path / "out.job" / "source").write_text(str(model))
    assert recorded_source(tmp_path / "out") == model
    quantize(request, tmp_path / "out", Quiet())  # already complete
    file = model / "model.safetensors"
    flip(file, unsampled(file))
    assert Checkpoint.open(model).fingerprint() == known["fingerprint"]  # samples do not see it
    assert prepare(request).plan.hash == record["plan_hash"]
    assert recorded_source(tmp_path / "out") is None
    with pytest.raises(UsageError, match="have changed since"):
        quantize(request, tmp_path / "out", Quiet())
    quantize(request, tmp_path / "out", Quiet(), overwrite=True)
    made = json.loads((tmp_path / "out" / "qkit.json").read_text())
    assert made["source"]["sha256"] == Checkpoint.open(model).sha256() != known["sha256"]


def test_a_job_of_the_other_source_is_a_conflict(model, tmp_path):
    request = request_for(model)
    with pytest.raises(KeyboardInterrupt):
        quantize(request, tmp_path / "out", Stops(1))
    file = model / "model.safetensors"
    flip(file, unsampled(file))
    with pytest.raises(JobConflict, match=r"source_weights\.sha256"):
        quantize(request, tmp_path / "out", Quiet())
    flip(file, unsampled(file))
    quantize(request, tmp_path / "out", Quiet())


def test_weights_around_a_transformer_count(tmp_path):
    source = make_pipeline(tmp_path / "pipe")
    request = Request(model=str(source), scheme="w8a8", threads=1)
    quantize(request, tmp_path / "out", Quiet())
    around = json.loads((tmp_path / "out" / "transformer" / "qkit.json").read_text())["source"]["around"]
    file = next((source / "text_encoder").glob("*.safetensors"))
    flip(file, file.stat().st_size - 1)
    with pytest.raises(UsageError, match="not empty"):
        quantize(request, tmp_path / "out", Quiet())
    quantize(request, tmp_path / "out", Quiet(), overwrite=True)
    record = json.loads((tmp_path / "out" / "transformer" / "qkit.json").read_text())
    assert record["source"]["around"] != around


@pytest.mark.parametrize("victim", ["tokenizer.json", "config.json", "generation_config.json", "model.safetensors"])
def test_a_damaged_result_is_named_and_made_again_where_asked(model, tmp_path, run, victim):
    options = ["quantize", "--model", model, "--scheme", "w4a16", "--group-size", 32, "--out", tmp_path / "out"]
    assert run(*options)[0] == 0
    before = (tmp_path / "out" / victim).read_bytes()
    (tmp_path / "out" / victim).write_bytes(before + b" ")
    code, _, err = run(*options)
    assert code == 4 and "was damaged since" in err and victim in err and "--overwrite" in err
    code, said, _ = run(*options, "--overwrite")
    assert code == 0 and "already complete" not in said
    assert (tmp_path / "out" / victim).read_bytes() == before
    code, said, _ = run(*options)
    assert code == 0 and ", already complete: " in " ".join(said.split())
    (tmp_path / "out" / victim).unlink()
    with pytest.raises(VerifyFailure, match=victim):
        quantize(request_for(model), tmp_path / "out", Quiet())


# --- the cache ----------------------------------------------------------------------------------------------------


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(hash_cache, "SETTLED", 0)
    return tmp_path / "cache" / "qkit" / "sha256"


@pytest.fixture
def counted(monkeypatch) -> list[Path]:
    """Files that are read in full."""
    read: list[Path] = []
    monkeypatch.setattr(hash_cache, "sha256_file", lambda file: read.append(file) or sha256_file(file))
    return read


def test_a_file_is_read_once(tmp_path, cache, counted):
    file = tmp_path / "a.safetensors"
    file.write_bytes(b"one")
    assert cached_sha256(file) == cached_sha256(file) == sha256_file(file) and len(counted) == 1
    (tmp_path / "link").symlink_to(file)
    assert cached_sha256(tmp_path / "link") == sha256_file(file) and len(counted) == 1
    state = file.stat()
    time.sleep(0.02)
    file.write_bytes(b"two")
    os.utime(file, ns=(state.st_atime_ns, state.st_mtime_ns))  # as a tool that restores times
    assert cached_sha256(file) == sha256_file(file) and len(counted) == 2
    copy = tmp_path / "copy"
    shutil.copy2(file, copy)
    copy.replace(file)
    cached_sha256(file)
    assert len(counted) == 3
    assert all(p.parent == cache for p in (tmp_path / "cache").rglob("*") if p.is_file())


@pytest.mark.parametrize(
    "damage", [b"", b"{", b"[]", b"null", b'{"sha256": 7}', b"\xff", b"[" * 60_000, b"{" + b" " * 70_000]
)
def test_a_damaged_cache_is_none(tmp_path, cache, counted, damage):
    file = tmp_path / "a.safetensors"
    file.write_bytes(b"one")
    cached_sha256(file)
    (entry,) = cache.iterdir()
    entry.write_bytes(damage)
    assert cached_sha256(file) == sha256_file(file) and len(counted) == 2
    assert cached_sha256(file) == sha256_file(file) and len(counted) == 2


def test_a_cache_that_cannot_be_written_is_none(tmp_path, cache, counted):
    cache.parent.parent.write_text("a file")
    file = tmp_path / "a.safetensors"
    file.write_bytes(b"one")
    assert cached_sha256(file) == cached_sha256(file) == sha256_file(file) and len(counted) == 2


def test_a_file_that_has_just_changed_is_not_kept(tmp_path, cache, counted, monkeypatch):
    monkeypatch.setattr(hash_cache, "SETTLED", 10**12)
    file = tmp_path / "a.safetensors"
    file.write_bytes(b"one")
    cached_sha256(file)
    cached_sha256(file)
    assert len(counted) == 2


@pytest.mark.parametrize(("age", "reads"), [(100_000_000, 2), (100_000_001, 1)])
def test_a_file_is_settled_after_a_tenth_of_a_second(tmp_path, monkeypatch, counted, age, reads):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    file = tmp_path / "a.safetensors"
    file.write_bytes(b"one")
    state = file.stat()
    monkeypatch.setattr(hash_cache.time, "time_ns", lambda: max(state.st_mtime_ns, state.st_ctime_ns) + age)
    assert cached_sha256(file) == cached_sha256(file) == sha256_file(file) and len(counted) == reads


def test_plan_reads_no_weights_in_full_and_quantize_once(model, tmp_path, cache, counted, run):
    options = ["--model", model, "--scheme", "w4a16", "--group-size", 32]
    assert run("plan", *options)[0] == 0 and counted == []
    for out in ("a", "b"):
        assert run("quantize", *options, "--out", tmp_path / out)[0] == 0
    assert counted == [model / "model.safetensors"]
    assert torch.equal(
        *(read_tensor(read_header(tmp_path / out / "model.safetensors")["model.norm.weight"]) for out in "ab")
    )
