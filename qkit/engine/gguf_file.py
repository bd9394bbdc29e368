"""Writes model.gguf: header and tensors, one at a time, by the writer of the library gguf.

The blocks of quantized weights are put in the order of rows that llama.cpp's converter makes; all other tensors are what the
converter makes of their values.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from qkit.engine.export_tensors import ExportTensors
from qkit.errors import write_failure
from qkit.families.structure import ModelStructure
from qkit.files.gguf_container import FileTensor, stored_tensors
from qkit.files.gguf_converter import WHAT, Made, converter
from qkit.files.gguf_places import SCALE
from qkit.files.gguf_rows import Rows
from qkit.files.gguf_size import ARCHITECTURE, file_keys
from qkit.files.safefile import sha256_file
from qkit.planning.gguf import float_bytes, most_used, scale_name, type_of
from qkit.planning.plan import Plan
from qkit.system.extras import needs

if TYPE_CHECKING:
    from gguf import GGUFWriter

    from qkit.planning.linear_plan import LinearPlan

Plain = dict[str, dict[str, Any]]  # of the record: {tensor of the file: dtype, shape, sha256}
Array = npt.NDArray[Any]


def write_gguf(path: Path, plan: Plan, structure: ModelStructure, source: ExportTensors) -> tuple[str, Plain]:
    """Write the file; its sha256, and what its tensors are that are not quantized. Raises IOFailure."""
    with needs(WHAT, "gguf"):
        import gguf
    written, checkpoint = structure.gguf, structure.checkpoint
    writer = gguf.GGUFWriter(None, written.architecture)
    for key, value in file_keys(written, most_used(plan.packed)).items():
        if key != ARCHITECTURE:  # which the writer has added
            _add(writer, key, value)
    types = {tensor.name: type_of(tensor, plan.packed) for tensor in written.tensors}
    scales = {
        tensor.name: p
        for tensor in written.tensors
        if (p := types[tensor.name]) is not None and p.weights.scale == "e4m3"
    }
    for tensor in written.tensors:
        _add_info(writer, tensor, types[tensor.name])
    for name in scales:
        writer.add_tensor_info(scale_name(name), [1], np.dtype(np.float32), 4)
    plain: Plain = {}
    try:
        writer.write_header_to_file(path)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        stored = stored_tensors(checkpoint, structure.tied)
        with converter(checkpoint.path, checkpoint.config, stored) as made_by:
            made = {m.name: m for m in made_by.made(source.load)}
            for tensor in written.tensors:
                packed = types[tensor.name] is not None
                data = _blocks(tensor, source) if packed else _values(tensor, made.pop(tensor.name), plain)
                writer.write_tensor_data(data)
        for name, p in scales.items():
            data = source.load(f"{p.name}{SCALE}").numpy()
            plain[scale_name(name)] = _entry("F32", (1,), data)
            writer.write_tensor_data(data)
        writer.close()
        with path.open("rb") as file:
            os.fsync(file.fileno())
    except OSError as e:
        raise write_failure(path, e) from e
    return sha256_file(path), plain


def _add_info(writer: GGUFWriter, tensor: FileTensor, p: LinearPlan | None) -> None:
    import gguf

    if p is None:
        kind = gguf.GGMLQuantizationType[tensor.kind]
        writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.float32), float_bytes(tensor), kind)
        return
    kind = gguf.GGMLQuantizationType[p.weights.ggml]
    # The writer takes shapes of bytes where the type is a quantized one.
    shape = gguf.quant_shape_to_byte_shape(tensor.shape, kind)
    writer.add_tensor_info(tensor.name, shape, np.dtype(np.uint8), int(np.prod(shape)), kind)


def _blocks(tensor: FileTensor, source: ExportTensors) -> Array:
    """The blocks of the matrices in a tensor, rows in its order."""
    assert tensor.rows is not None
    whole: Array | None = None
    for name, there, own in _parts(tensor.rows):
        blocks = source.load(name).numpy()
        if whole is None:
            whole = np.empty((len(tensor.rows.rows), blocks.shape[1]), dtype=np.uint8)
        whole[there] = blocks[own]
    assert whole is not None
    return whole.reshape(-1)


def _parts(rows: Rows) -> Iterator[tuple[str, Array, Array]]:
    """Of each matrix: its name, its rows in the file, and which of its own they are."""
    for i, name in enumerate(rows.names):
        there = np.flatnonzero(rows.index == i)
        if len(there):
            yield f"{name}", there, rows.rows[there]


def _values(tensor: FileTensor, made: Made, plain: Plain) -> Array:
    """What the converter makes of a tensor that is not quantized; its entry of the record is made, too."""
    data = np.ascontiguousarray(made.values())
    plain[tensor.name] = _entry(tensor.kind, tensor.shape, data)
    return data


def _entry(kind: str, shape: tuple[int, ...], data: Array) -> dict[str, Any]:
    return {"dtype": kind, "shape": list(shape), "sha256": hashlib.sha256(data.tobytes()).hexdigest()}


def _add(writer: GGUFWriter, key: str, value: Any) -> None:
    adders: dict[type, Any] = {
        bool: writer.add_bool,
        int: writer.add_uint32,
        float: writer.add_float32,
        str: writer.add_string,
    }
    adders.get(type(value), writer.add_array)(key, value)
