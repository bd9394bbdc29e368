"""Safetensors files and atomic writes: the only code that touches the bytes of tensors on disk.

The layout (safetensors format, version 0.x): eight bytes, the header's length as a little-endian number;
the header, JSON that maps each name to its dtype, shape and place; then the data, without holes.

The reader here is stricter than the safetensors library, which accepts duplicate names, any name and any
number of dimensions, and it allocates nothing on the word of a header that the file's size does not bear
out. Tensors are read, not mapped: a mapped file that shrinks kills the process. The writer streams one
tensor at a time; a file appears under its name complete and on the disk, or not at all.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import secrets
import stat
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from qkit.errors import BadCheckpoint, IOFailure, VerifyFailure, write_failure

if TYPE_CHECKING:
    import torch

# As the format names them, with torch's name and the bytes of an element. torch itself is imported where tensors are.
DTYPES: dict[str, tuple[str, int]] = {
    "BOOL": ("bool", 1), "U8": ("uint8", 1), "I8": ("int8", 1), "F8_E4M3": ("float8_e4m3fn", 1),
    "F8_E5M2": ("float8_e5m2", 1), "F8_E8M0": ("float8_e8m0fnu", 1), "I16": ("int16", 2), "U16": ("uint16", 2),
    "F16": ("float16", 2), "BF16": ("bfloat16", 2), "I32": ("int32", 4), "U32": ("uint32", 4), "F32": ("float32", 4),
    "I64": ("int64", 8), "U64": ("uint64", 8), "F64": ("float64", 8),
}  # fmt: skip
DTYPE_NAMES = {f"torch.{name}": stored for stored, (name, _) in DTYPES.items()}

MAX_HEADER = 100_000_000  # bytes; the limit of the safetensors library
MAX_TENSORS = 200_000  # in one file; the largest published mixture-of-experts models stay below
MAX_RANK = 8
MAX_DIM = 2**36
MAX_OFFSET = 2**48  # bytes of a file; a model of 405B in one file has 2**40
MAX_NAME = 512
TEMP_PREFIX = ".qkit-tmp-"  # a file of this name is what a killed writer left behind
DAMAGED = "the file is damaged or unsafe; get it again from its source"  # ends the message of a file that is refused
CHUNK = 1 << 20
_NAME = re.compile(rf"[!-~]{{1,{MAX_NAME}}}")
_PREFIX_BYTES = 8
_SMALLEST_HEADER = 2  # {}


@dataclass(frozen=True, kw_only=True)
class TensorInfo:
    """Where a tensor lies: ``dtype`` as the format spells it ("BF16"), byte offsets from the start of ``file``."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    begin: int
    end: int

    @property
    def nbytes(self) -> int:
        """Size of the values in bytes."""
        return self.end - self.begin

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype as torch names it."""
        import torch

        dtype: torch.dtype = getattr(torch, DTYPES[self.dtype][0])
        return dtype


def shown(text: object, limit: int = 80) -> str:
    """Text from a file, quoted, escaped and shortened so that it is safe to print."""
    quoted = ascii(text)
    return quoted if len(quoted) <= limit else f"{quoted[:limit]}..."


def is_safe_name(name: str) -> bool:
    """Whether a tensor may have this name: printable ASCII without spaces, slashes and '..', up to 512 characters."""
    return _NAME.fullmatch(name) is not None and ".." not in name and "/" not in name and "\\" not in name


def parse_json(raw: bytes, where: str) -> Any:
    """JSON without the liberties of ``json.loads``; ``where`` names the file in messages.

    Raises BadCheckpoint for bytes that are not UTF-8, duplicate keys, NaN and infinite numbers, numbers of
    thousands of digits, and nesting deeper than the interpreter's stack.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) != len(pairs):
            double = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
            raise BadCheckpoint(f"{where}: the key {shown(double)} occurs twice in one object: export the file again")
        return result

    def finite(text: str) -> float:
        if math.isfinite(value := float(text)):
            return value
        raise BadCheckpoint(f"{where}: {shown(text)} where a finite number is expected: correct the file")

    try:
        return json.loads(raw.decode("utf-8"), object_pairs_hook=unique, parse_constant=finite, parse_float=finite)
    except RecursionError:
        raise BadCheckpoint(f"{where}: JSON nested too deep to be read: get the file again from its source") from None
    except ValueError as error:  # also a UnicodeDecodeError and a number of too many digits
        problem = "not UTF-8 text" if isinstance(error, UnicodeDecodeError) else f"not valid JSON ({error})"
        raise BadCheckpoint(f"{where}: {problem}: get the file again from its source") from None


def open_regular(path: Path) -> FileIO:
    """Opens a file for reading, unbuffered, if it is a regular one: a pipe would block, a device never ends.

    Raises BadCheckpoint when there is no such file or it is of another kind, IOFailure when it cannot be opened.
    """
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except (FileNotFoundError, NotADirectoryError):
        raise BadCheckpoint(f"{path}: no such file: check that the model folder is complete") from None
    except OSError as error:
        raise _read_failure(path, error) from error
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise BadCheckpoint(f"{path}: found a folder or a device, expected a regular file: check the model folder")
    return FileIO(handle, "rb")


def read_bytes(path: Path, limit: int) -> bytes:
    """The content of a small file. Raises BadCheckpoint when it is longer than ``limit`` bytes, IOFailure."""
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > limit:
            raise BadCheckpoint(f"{path}: {size} bytes, expected at most {limit}: this is not the file it seems to be")
        return read_range(path, file, 0, size, "the file")


def read_header(path: Path) -> dict[str, TensorInfo]:
    """The tensors of a safetensors file, in the order of their data.

    Raises BadCheckpoint for any header that is not exactly right: too short or too long, not JSON, a name,
    dtype, rank or size outside the limits, shape and size that disagree, holes, overlaps or bytes left over.
    """
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size < _PREFIX_BYTES + _SMALLEST_HEADER:
            _refuse(path, f"header too small: {size} bytes, expected at least {_PREFIX_BYTES + _SMALLEST_HEADER}")
        prefix = read_range(path, file, 0, _PREFIX_BYTES, "the header length")
        if prefix == b"version ":  # begins what stands for a file in a repository of Git LFS
            _refuse(path, f"its {size} bytes are a pointer of Git LFS, and not the weights: run 'git lfs pull'")
        length = int.from_bytes(prefix, "little")
        if not _SMALLEST_HEADER <= length <= MAX_HEADER:
            _refuse(path, f"header length {length}, expected {_SMALLEST_HEADER} to {MAX_HEADER} bytes")
        if length > size - _PREFIX_BYTES:
            _refuse(
                path, f"the file has {size} bytes, expected {_PREFIX_BYTES + length} for its header: it is cut short"
            )
        raw = read_range(path, file, _PREFIX_BYTES, length, "the header")
    if raw[:1] != b"{":
        _refuse(path, "the header does not start with '{', expected a JSON object")
    entries = parse_json(raw, f"{path}: header")
    metadata = entries.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        _refuse(path, "__metadata__ is not an object of strings")
    if len(entries) > MAX_TENSORS:
        _refuse(path, f"{len(entries)} tensors, expected at most {MAX_TENSORS}")
    data = _PREFIX_BYTES + length
    infos = [_tensor_info(path, name, entry, data) for name, entry in entries.items()]
    infos.sort(key=lambda info: (info.begin, info.end))
    if infos and (end := max(info.end for info in infos)) > size:
        _refuse(path, f"the file has {size} bytes, expected {end}, as its header says: it is cut short")
    position = data
    for info in infos:  # the data must be covered exactly once
        if info.begin != position:
            fault = "overlaps the one before it" if info.begin < position else "leaves a hole before it"
            _refuse(path, f"tensor {shown(info.name)} {fault}: it starts at byte {info.begin}, expected {position}")
        position = info.end
    if position != size:
        _refuse(path, f"the tensors end at byte {position}, but the file has {size}")
    return {info.name: info for info in infos}


def _tensor_info(path: Path, name: str, entry: Any, data: int) -> TensorInfo:
    """One entry of the header, checked on its own; ``data`` is where the values start."""
    where = f"tensor {shown(name)}"
    if not is_safe_name(name):
        _refuse(path, f"{where}: expected a name of 1 to {MAX_NAME} printable characters without spaces, '/' and '..'")
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        _refuse(path, f"{where}: found {shown(entry)}, expected exactly dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        _refuse(path, f"{where}: unknown dtype {shown(dtype)}, expected one of {', '.join(DTYPES)}")
    if not _are_counts(shape, MAX_RANK, MAX_DIM):
        _refuse(path, f"{where}: shape {shown(shape)}, expected at most {MAX_RANK} whole numbers from 0 to {MAX_DIM}")
    if not _are_counts(offsets, 2, MAX_OFFSET) or len(offsets) != 2:
        _refuse(path, f"{where}: data_offsets {shown(offsets)}, expected where its bytes begin and end")
    begin, end = offsets
    expected = math.prod(shape) * DTYPES[dtype][1]
    if end - begin != expected:
        _refuse(path, f"{where}: {end - begin} bytes of data, expected {expected} for {dtype} {shown(shape)}")
    return TensorInfo(name=name, dtype=dtype, shape=tuple(shape), file=path, begin=data + begin, end=data + end)


def _are_counts(value: Any, longest: int, largest: int) -> bool:
    return (
        isinstance(value, list) and len(value) <= longest and all(type(n) is int and 0 <= n <= largest for n in value)
    )


def read_tensor(info: TensorInfo) -> torch.Tensor:
    """The tensor in its stored dtype and shape, in memory of its own on the CPU.

    Raises BadCheckpoint when the file ends too soon or a BOOL holds more than 0 and 1; IOFailure.
    """
    import torch

    where = f"tensor {shown(info.name)}"
    try:
        flat = torch.empty(info.nbytes, dtype=torch.uint8)
    except (RuntimeError, MemoryError):
        raise IOFailure(
            f"{info.file}: {where}: {info.nbytes} bytes of memory are not to be had: close other programs"
        ) from None
    if info.nbytes:
        with open_regular(info.file) as file:
            _fill(info.file, file, flat.numpy().data, info.begin, where)
    if info.dtype == "BOOL" and bool((flat > 1).any()):
        _refuse(info.file, f"{where}: a BOOL tensor with bytes other than 0 and 1")
    return flat.view(info.torch_dtype).reshape(info.shape)


def read_range(path: Path, file: FileIO, offset: int, count: int, label: str) -> bytes:
    """``count`` bytes of an open file. Raises BadCheckpoint when it ends before them, IOFailure."""
    buffer = bytearray(count)
    _fill(path, file, memoryview(buffer), offset, label)
    return bytes(buffer)


def _fill(path: Path, file: FileIO, buffer: memoryview, offset: int, label: str) -> None:
    """Reads len(into) bytes from ``offset``; a short read is an error, for the file was long enough before."""
    filled = 0
    try:
        file.seek(offset)
        while filled < len(buffer):
            count = file.readinto(buffer[filled:])
            if not count:
                _refuse(path, f"{label}: the file ends after {filled} bytes, expected {len(buffer)}")
            filled += count
    except OSError as error:
        raise _read_failure(path, error) from error


def _refuse(path: Path, problem: str) -> NoReturn:
    raise BadCheckpoint(f"{path}: {problem}: {DAMAGED}")


def _read_failure(path: Path, error: OSError) -> IOFailure:
    return IOFailure(f"cannot read {path}: {error.strerror or error}: check the disk and the permissions")


def write_atomic(path: Path, data: bytes) -> None:
    """Writes a file so that after any crash either the old content or the new one is there, never a part.

    The mode is that of the file replaced, or what plain ``open`` would give. Raises IOFailure.
    """
    _replace_with(path, len(data), [data])


def write_safetensors(
    path: Path,
    specs: Sequence[tuple[str, torch.dtype, tuple[int, ...]]],
    load: Callable[[str], torch.Tensor],
) -> str:
    """Streams tensors into a file, with the durability of ``write_atomic``; returns its sha256 in hex.

    specs: (name, dtype, shape) of every tensor; their order has no influence on the file. The data are laid
    out by falling element size, then by name, as the safetensors library does, which puts every tensor at a
    multiple of its element size; ``load`` is called once for each name in that order.
    Raises IOFailure, and VerifyFailure when a spec cannot be written or a tensor is not what its spec says.
    """
    ordered = sorted(specs, key=lambda spec: (-spec[1].itemsize, spec[0]))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, dtype, shape in ordered:
        if name in header or not is_safe_name(name) or str(dtype) not in DTYPE_NAMES:
            raise VerifyFailure(f"{path}: tensor {shown(name)} of {dtype}: cannot be written under this name and dtype")
        end = at + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": DTYPE_NAMES[str(dtype)], "shape": list(shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(header, separators=(",", ":")).encode("ascii")
    text += b" " * (-len(text) % 8)

    def chunks() -> Iterator[bytes | memoryview]:
        yield len(text).to_bytes(_PREFIX_BYTES, "little") + text
        for spec in ordered:
            # Neither this generator nor its consumer keeps a tensor while the next one is loaded.
            yield _tensor_bytes(path, spec, load(spec[0]))

    return _replace_with(path, _PREFIX_BYTES + len(text) + at, chunks())


def save_tensors(path: Path, tensors: Mapping[str, torch.Tensor]) -> str:
    """Writes tensors that are in memory already; the rest as ``write_safetensors``."""
    return write_safetensors(path, [(n, t.dtype, tuple(t.shape)) for n, t in tensors.items()], tensors.__getitem__)


def _tensor_bytes(path: Path, spec: tuple[str, torch.dtype, tuple[int, ...]], tensor: torch.Tensor) -> memoryview:
    import torch

    name, dtype, shape = spec
    if tensor.dtype != dtype or tensor.shape != tuple(shape):
        actual = f"{tensor.dtype} {tuple(tensor.shape)}"
        raise VerifyFailure(f"{path}: tensor {shown(name)} is {actual}, expected {dtype} {tuple(shape)}")
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data


def _replace_with(path: Path, size: int, chunks: Iterable[bytes | memoryview]) -> str:
    """Puts the chunks, ``size`` bytes in all, where ``path`` is; returns their sha256.

    The order write, fsync, rename, fsync of the folder is what survives a loss of power.
    """
    temp = path.with_name(TEMP_PREFIX + secrets.token_hex(8))
    digest = hashlib.sha256()
    try:
        try:
            handle = os.open(temp, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
            try:
                for chunk in chunks:
                    digest.update(chunk)
                    _write_all(handle, chunk)
                    del chunk
                with suppress(FileNotFoundError):
                    old = os.lstat(path)
                    if stat.S_ISREG(old.st_mode):
                        os.fchmod(handle, stat.S_IMODE(old.st_mode))
                os.fsync(handle)
            finally:
                os.close(handle)
            os.replace(temp, path)
            sync_dir(path.parent)
        finally:
            with suppress(OSError):  # after the rename there is nothing left to remove
                os.unlink(temp)
    except OSError as error:
        raise write_failure(path, error, size) from error
    return digest.hexdigest()


def _write_all(handle: int, chunk: bytes | memoryview) -> None:
    view = memoryview(chunk)
    while len(view):
        view = view[os.write(handle, view) :]


def sync_dir(path: Path) -> None:
    """Makes the names in a folder durable. Raises OSError."""
    handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sha256_file(path: Path) -> str:
    """The sha256 of a file's content in hex. Raises BadCheckpoint when there is none, IOFailure."""
    digest = hashlib.sha256()
    buffer = memoryview(bytearray(CHUNK))
    with open_regular(path) as file:
        try:
            while count := file.readinto(buffer):
                digest.update(buffer[:count])
        except OSError as error:
            raise _read_failure(path, error) from error
    return digest.hexdigest()


def count_nonfinite(t: torch.Tensor) -> int:
    """How many elements are NaN or infinite; 0 for integers. Extra memory is bounded for contiguous tensors."""
    import torch

    if not t.is_floating_point():
        return 0
    count = 0
    for chunk in torch.split(t.detach().reshape(-1), CHUNK):
        values = chunk.float() if chunk.dtype.itemsize == 1 else chunk  # torch lacks these operations for 8-bit floats
        # One pass that sees NaN and infinity is several times faster than counting, and nearly always enough.
        if values.numel() and not all(bool(torch.isfinite(extreme)) for extreme in torch.aminmax(values)):
            count += int(torch.isfinite(values).logical_not().sum())
    return count
