"""The header of a GGUF file, read for the proof: keys and tensors, every length held against the file.

Part of the independent proof (see ``verify.py``). Version 3, little-endian, is all that qkit writes.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from qkit.errors import BadCheckpoint
from qkit.verification.decode import StoredTensor
from qkit.verification.gguf_blocks import TYPES

_NUMBERS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
_STRING, _LIST, _ALIGNMENT = 8, 9, 32


@dataclass(frozen=True)
class GgufFile:
    """keys: of the header, with their values; tensors: by name, shapes with the rows first, types as dtypes."""

    keys: dict[str, Any]
    tensors: dict[str, StoredTensor]


def read_gguf(path: Path) -> GgufFile:
    """The header of a file. Raises BadCheckpoint."""
    try:
        with path.open("rb") as file:
            raw = file.read(1 << 28)
        return _Reader(path, raw, path.stat().st_size).read()
    except (OSError, struct.error, UnicodeDecodeError) as error:
        raise BadCheckpoint(f"{path.name}: not a sound GGUF file ({error}); export the checkpoint again") from None


class _Reader:
    def __init__(self, path: Path, raw: bytes, size: int) -> None:
        self.path, self.raw, self.size, self.at = path, raw, size, 0

    def read(self) -> GgufFile:
        if self.raw[:4] != b"GGUF" or struct.unpack_from("<I", self.raw, 4)[0] != 3:
            self.refuse("does not begin as a GGUF file of version 3")
        self.at = 8
        count, keys = self.number("<Q"), self.number("<Q")
        values: dict[str, Any] = {}
        for _ in range(keys):
            key = self.text()
            if key in values:
                self.refuse(f"has the key {key!r} twice")
            values[key] = self.value(self.number("<I"))
        entries = [self.entry() for _ in range(count)]
        start = self.at + -self.at % _ALIGNMENT
        tensors: dict[str, StoredTensor] = {}
        end = start
        for name, dtype, shape, size, offset in entries:
            if name in tensors or start + offset != end or end + size > self.size:
                self.refuse(
                    f"tensor {name[:60]!r} is there twice, or does not lie behind the one before it within the file"
                )
            tensors[name] = StoredTensor(self.path, dtype, shape, start + offset, size)
            end += size + -size % _ALIGNMENT
        if end != self.size:
            self.refuse(f"has {self.size} bytes, and its tensors end at {end}")
        return GgufFile(values, tensors)

    def entry(self) -> tuple[str, str, tuple[int, ...], int, int]:
        name, rank = self.text(), self.number("<I")
        if rank > 4:
            self.refuse(f"tensor {name[:60]!r} has {rank} axes")
        shape = tuple(self.number("<Q") for _ in range(rank))[::-1]
        kind, offset = self.number("<I"), self.number("<Q")
        if kind not in TYPES or not shape or min(shape) == 0 or shape[-1] % TYPES[kind][1]:
            self.refuse(f"tensor {name[:60]!r} of type {kind} and shape {list(shape)} is nothing that qkit writes")
        dtype, columns, size = TYPES[kind]
        return name, dtype, shape, math.prod(shape) // columns * size, offset

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.text()
        if kind in _NUMBERS:
            return self.number(_NUMBERS[kind])
        if kind != _LIST:
            self.refuse(f"has a value of type {kind}")
        inner, count = self.number("<I"), self.number("<Q")
        if inner == _LIST or count > len(self.raw) - self.at:
            self.refuse(f"has a list of {count} values of type {inner}")
        return [self.value(inner) for _ in range(count)]

    def text(self) -> str:
        length = self.number("<Q")
        if length > len(self.raw) - self.at:
            self.refuse(f"has a text of {length} bytes")
        self.at += length
        return self.raw[self.at - length : self.at].decode()

    def number(self, form: str) -> Any:
        (value,) = struct.unpack_from(form, self.raw, self.at)
        self.at += struct.calcsize(form)
        return value

    def refuse(self, fault: str) -> NoReturn:
        raise BadCheckpoint(f"{self.path.name}: {fault}; export the checkpoint again")
