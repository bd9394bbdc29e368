"""The keys of a GGUF file that a container makes, and the bytes of the file before it is written."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from qkit.files.gguf_container import Container
from qkit.system.version import __version__
from qkit.tensor.gguf_blocks import aligned

ARCHITECTURE = "general.architecture"
# llama.cpp's number for what most tensors of a file are.
_FILE_TYPES = {
    "q4_0": 2, "q4_1": 3, "q8_0": 7, "q5_0": 8, "q5_1": 9, "q2_k": 10, "q3_k": 11, "q4_k": 14, "q5_k": 16, "q6_k": 18,
    "iq4_nl": 25, "iq4_xs": 30, "gguf_mxfp4": 38, "gguf_nvfp4": 39,
}  # fmt: skip
_FIXED = 24  # magic, version, numbers of tensors and of keys
_KIND, _LENGTH = 4, 8  # of a value's type, and of a string's or a list's length


def file_keys(container: Container, kind: str) -> dict[str, Any]:
    """All keys of the file. kind: the type that most of its weights have"""
    keys = {
        ARCHITECTURE: container.architecture,
        "general.quantization_version": 2,
        "general.file_type": _FILE_TYPES[kind],
        "general.quantized_by": f"qkit {__version__}",
        **container.fields,
    }
    return {key: value for key, value in keys.items() if value != []}  # the writer has no type for an empty list


def file_bytes(keys: Mapping[str, Any], tensors: Iterable[tuple[str, int, int]]) -> int:
    """The size of a file with these keys and tensors. tensors: (name, dimensions, bytes of the data) of each"""
    header, data = _FIXED + sum(_text(key) + _KIND + _value(value) for key, value in keys.items()), 0
    for name, dimensions, size in tensors:
        header += _text(name) + 4 + 8 * dimensions + _KIND + 8
        data += aligned(size)
    return aligned(header) + data


def _text(text: str) -> int:
    return _LENGTH + len(text.encode("utf-8"))


def _value(value: Any) -> int:
    if isinstance(value, str):
        return _text(value)
    if isinstance(value, list):
        return _KIND + _LENGTH + sum(map(_value, value))
    return 1 if isinstance(value, bool) else 4
