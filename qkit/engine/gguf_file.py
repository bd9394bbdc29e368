"""Writes model.gguf: header and tensors, one at a time, by the writer of the library gguf."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from qkit.engine.export_tensors import ExportTensors
from qkit.errors import write_failure
from qkit.files.gguf_container import ROPE, WHAT, Container
from qkit.files.gguf_size import ARCHITECTURE, file_keys
from qkit.files.safefile import sha256_file
from qkit.planning.gguf import most_used
from qkit.planning.plan import Plan
from qkit.system.extras import needs

if TYPE_CHECKING:
    from gguf import GGUFWriter

_FLOATS = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


def write_gguf(path: Path, plan: Plan, source: ExportTensors, container: Container) -> str:
    """Write the file and give its sha256. Raises IOFailure."""
    with needs(WHAT, "gguf"):
        import gguf
    writer = gguf.GGUFWriter(None, container.architecture)
    for key, value in file_keys(container, most_used(plan.packed)).items():
        if key != ARCHITECTURE:  # which the writer has added
            _add(writer, key, value)
    types = {f"{p.name}.weight": p.weights.ggml for p in plan.packed.values()}
    for name, (dtype, shape) in source.specs.items():
        kind = gguf.GGMLQuantizationType[types.get(name) or _FLOATS[dtype]]
        size = torch.Size(shape).numel() * dtype.itemsize
        # The writer takes shapes of bytes where the type is a quantized one.
        given = np.dtype(np.uint8 if name in types else np.float32)
        writer.add_tensor_info(container.names[name][0], shape, given, size, kind)
    if container.rope is not None:
        writer.add_tensor_info(ROPE, [len(container.rope)], np.dtype(np.float32), 4 * len(container.rope))
    try:
        writer.write_header_to_file(path)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for name in source.specs:
            writer.write_tensor_data(_bytes(interleaved(source.load(name), container.names[name][1])))
        if container.rope is not None:
            writer.write_tensor_data(np.array(container.rope, dtype=np.float32))
        writer.close()
        with path.open("rb") as file:
            os.fsync(file.fileno())
    except OSError as e:
        raise write_failure(path, e) from e
    return sha256_file(path)


def interleaved(rows: Tensor, heads: int) -> Tensor:
    """The rows of each head in llama.cpp's order, where the two halves of a rotation are neighbours. heads: 0 leaves them."""
    if not heads:
        return rows
    return rows.reshape(heads, 2, len(rows) // heads // 2, *rows.shape[1:]).transpose(1, 2).reshape(rows.shape)


def _bytes(tensor: Tensor) -> Any:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy()


def _add(writer: GGUFWriter, key: str, value: Any) -> None:
    adders: dict[type, Any] = {
        bool: writer.add_bool,
        int: writer.add_uint32,
        float: writer.add_float32,
        str: writer.add_string,
    }
    adders.get(type(value), writer.add_array)(key, value)
