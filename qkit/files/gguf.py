"""A strict reader of GGUF headers: what the model is, and where its tensors lie. No weight is read.

Layout (the GGUF specification of llama.cpp, versions 2 and 3, little-endian): magic, version, number of tensors, number of
keys; every key with a typed value; every tensor with name, shape (the fastest axis first), type and offset; then, aligned,
the data. Every count is held against the bytes that are left before anything is made of it.
"""

from __future__ import annotations

import math
import os
import struct
from dataclasses import dataclass, field, replace
from io import BufferedReader, FileIO
from pathlib import Path
from typing import Any, NoReturn

from qkit.errors import BadCheckpoint
from qkit.files.safefile import open_regular, shown

MAX_KEYS = 65_536
MAX_TENSORS = 200_000
MAX_RANK = 4
MAX_STRING = 1 << 24  # bytes; chat templates are the longest
MAX_STRINGS = 4_000_000  # in all lists; vocabularies have a few hundred thousand
_SHORT = 200  # elements of a list that are kept
_NUMBERS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
_STRING, _LIST = 8, 9
# By number: name, elements of a block, bytes of a block.
TYPES = {
    0: ("F32", 1, 4), 1: ("F16", 1, 2), 2: ("Q4_0", 32, 18), 3: ("Q4_1", 32, 20), 6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24), 8: ("Q8_0", 32, 34), 9: ("Q8_1", 32, 36), 10: ("Q2_K", 256, 84), 11: ("Q3_K", 256, 110),
    12: ("Q4_K", 256, 144), 13: ("Q5_K", 256, 176), 14: ("Q6_K", 256, 210), 15: ("Q8_K", 256, 292),
    16: ("IQ2_XXS", 256, 66), 17: ("IQ2_XS", 256, 74), 18: ("IQ3_XXS", 256, 98), 19: ("IQ1_S", 256, 50),
    20: ("IQ4_NL", 32, 18), 21: ("IQ3_S", 256, 110), 22: ("IQ2_S", 256, 82), 23: ("IQ4_XS", 256, 136),
    24: ("I8", 1, 1), 25: ("I16", 1, 2), 26: ("I32", 1, 4), 27: ("I64", 1, 8), 28: ("F64", 1, 8),
    29: ("IQ1_M", 256, 56), 30: ("BF16", 1, 2), 34: ("TQ1_0", 256, 54), 35: ("TQ2_0", 256, 66), 39: ("MXFP4", 32, 17),
    40: ("NVFP4", 64, 36),
    41: ("Q1_0", 128, 18), 42: ("Q2_0", 64, 18),
}  # fmt: skip


@dataclass(frozen=True)
class GgufTensor:
    """One tensor of a GGUF file. nbytes: None for a type that is not known here."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int | None
    begin: int = 0  # in the file

    @property
    def count(self) -> int:
        """The number of elements."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class GgufHeader:
    """The header of a GGUF file. values: by key; of long lists the first elements; lengths: {key of a list: its elements}"""

    version: int
    values: dict[str, Any]
    tensors: tuple[GgufTensor, ...]
    lengths: dict[str, int] = field(default_factory=dict)


def read_gguf(path: Path) -> GgufHeader:
    """The header of a GGUF file. Raises BadCheckpoint for what is not exactly right, IOFailure."""
    with open_regular(path) as raw:
        size = os.fstat(raw.fileno()).st_size
        with BufferedReader(raw, 1 << 16) as file:
            return _GgufReader(path, file, size).header()


class _GgufReader:
    def __init__(self, path: Path, file: BufferedReader[FileIO], size: int) -> None:
        self._path, self._file, self._size = path, file, size
        self._at = 0
        self._strings = 0
        self._listed = 0  # elements of the list that was read last

    def header(self) -> GgufHeader:
        magic = self._take(4, "the magic")
        if magic != b"GGUF":
            self._refuse(f"begins with {magic!r}, expected b'GGUF'")
        version = self._number("<I", "the version")
        if version not in (2, 3):
            self._refuse(f"version {version}, expected 2 or 3 (of a big-endian file the version is very large)")
        tensors, keys = self._number("<Q", "the number of tensors"), self._number("<Q", "the number of keys")
        if tensors > MAX_TENSORS or keys > MAX_KEYS:
            self._refuse(f"{tensors} tensors and {keys} keys, expected at most {MAX_TENSORS} and {MAX_KEYS}")
        values, lengths = dict[str, Any](), dict[str, int]()
        for _ in range(keys):
            key = self._string("a key", 65_535)
            if key in values:
                self._refuse(f"key {shown(key)} is there twice")
            kind = self._number("<I", f"the type of {shown(key)}")
            values[key] = self._value(kind, shown(key), 0)
            if kind == _LIST:
                lengths[key] = self._listed
        entries = [self._tensor() for _ in range(tensors)]
        names = {t.name for t, _ in entries}
        if len(names) < len(entries):
            self._refuse("two tensors have the same name")
        alignment = values.get("general.alignment", 32)
        if not isinstance(alignment, int) or not 0 < alignment <= 1 << 20:
            self._refuse(f"general.alignment is {shown(alignment)}, expected a small number")
        start = self._at + -self._at % alignment
        for tensor, offset in entries:
            if offset % alignment:
                self._refuse(f"tensor {shown(tensor.name)} lies at byte {offset}, expected a multiple of {alignment}")
        end = max((start + offset + (tensor.nbytes or 0) for tensor, offset in entries), default=0)
        if end > self._size:
            self._refuse(f"the file has {self._size} bytes, expected {end}, as its header says: it is cut short")
        tensors_found = tuple(replace(t, begin=start + offset) for t, offset in entries)
        return GgufHeader(version, values, tensors_found, lengths)

    def _tensor(self) -> tuple[GgufTensor, int]:
        name = self._string("the name of a tensor", 512)
        rank = self._number("<I", f"the rank of {shown(name)}")
        if rank > MAX_RANK:
            self._refuse(f"tensor {shown(name)} has {rank} axes, expected at most {MAX_RANK}")
        shape = tuple(self._number("<Q", f"the shape of {shown(name)}") for _ in range(rank))
        kind = self._number("<I", f"the type of {shown(name)}")
        offset = self._number("<Q", f"the offset of {shown(name)}")
        if any(n > 1 << 40 for n in shape):
            self._refuse(f"tensor {shown(name)}: shape {shown(shape)} is too large")
        if kind not in TYPES:
            return GgufTensor(name, f"type {kind}", shape, None), offset
        type_name, block, size = TYPES[kind]
        if shape and shape[0] % block:
            self._refuse(
                f"tensor {shown(name)}: rows of {shape[0]} elements are no whole blocks of {block} ({type_name})"
            )
        return GgufTensor(name, type_name, shape, math.prod(shape) // block * size), offset

    def _value(self, kind: int, where: str, depth: int) -> Any:
        if kind == _STRING:
            return self._string(f"the value of {where}", MAX_STRING)
        if kind in _NUMBERS:
            return self._number(_NUMBERS[kind], f"the value of {where}")
        if kind != _LIST or depth > 3:
            self._refuse(f"the value of {where} has type {kind}, expected one of 0 to 12")
        inner, count = self._number("<I", f"the list of {where}"), self._number("<Q", f"the list of {where}")
        if depth == 0:
            self._listed = count
        if inner in _NUMBERS:
            width = struct.calcsize(_NUMBERS[inner])
            elements = [self._number(_NUMBERS[inner], f"the list of {where}") for _ in range(min(count, _SHORT))]
            self._skip((count - len(elements)) * width, f"the list of {where}")
            return elements
        self._strings += count
        if self._strings > MAX_STRINGS:
            self._refuse(f"the list of {where} has {count} elements, expected at most {MAX_STRINGS} in all")
        elements = []
        for i in range(count):
            value = self._value(inner, where, depth + 1)
            if i < _SHORT:
                elements.append(value)
        return elements

    def _string(self, label: str, longest: int) -> str:
        length = self._number("<Q", f"the length of {label}")
        if length > longest:
            self._refuse(f"{label} has {length} bytes, expected at most {longest}")
        try:
            return self._take(length, label).decode("utf-8")
        except UnicodeDecodeError:
            self._refuse(f"{label} is not UTF-8")

    def _number(self, form: str, label: str) -> Any:
        (value,) = struct.unpack(form, self._take(struct.calcsize(form), label))
        return value

    def _take(self, count: int, label: str) -> bytes:
        if count > self._size - self._at:
            more = self._at + count
            self._refuse(f"the file has {self._size} bytes, expected {more} or more: it ends within {label}")
        data = self._file.read(count)
        self._at += count
        if len(data) != count:
            self._refuse(f"ended within {label} while it was read")
        return data

    def _skip(self, count: int, label: str) -> None:
        if count > self._size - self._at:
            more = self._at + count
            self._refuse(f"the file has {self._size} bytes, expected {more} or more: it ends within {label}")
        self._file.seek(count, os.SEEK_CUR)
        self._at += count

    def _refuse(self, problem: str) -> NoReturn:
        raise BadCheckpoint(f"{self._path}: {problem}: get the file again from its source")
