"""GGUF files that are not quantized, and the numbers of any GGUF file in the order of a checkpoint."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import torch
from torch import Tensor

from qkit.families.structure import ModelStructure
from qkit.files.gguf_container import stored_tensors
from qkit.files.gguf_converter import converter


def write_source(structure: ModelStructure, path: Path) -> None:
    """The model as a GGUF file in its own 16 bits, vectors in float32."""
    made, checkpoint = structure.gguf, structure.checkpoint
    writer = gguf.GGUFWriter(str(path), made.architecture)
    for key, value in made.fields.items():
        add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
        add.get(type(value), writer.add_array)(key, value)
    writer.add_file_type(32)  # bfloat16
    with converter(checkpoint.path, checkpoint.config, stored_tensors(checkpoint, structure.tied)) as by:
        for tensor in by.made(checkpoint.read_source):
            values = np.ascontiguousarray(tensor.values())
            kind = gguf.GGMLQuantizationType[tensor.kind]
            writer.add_tensor(tensor.name, values, raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()


def decoded(structure: ModelStructure, path: Path) -> tuple[dict[str, Tensor], int]:
    """The numbers of a file by checkpoint name, float32 in the checkpoint's order of rows; and bytes of all tensors."""
    found = {t.name: t for t in gguf.GGUFReader(path).tensors}
    values, used = {}, dict[str, int]()
    for name, place in structure.gguf.places.items():
        parts = []
        for inside, numbers in place.runs:
            tensor = found[inside]
            used[inside] = int(tensor.n_bytes)
            units = gguf.quants.dequantize(tensor.data, tensor.tensor_type).reshape(-1, place.unit)
            for first, count, step in zip(numbers[::3], numbers[1::3], numbers[2::3], strict=True):
                parts.append(units[first + step * np.arange(count)])
        joined = np.concatenate(parts).astype(np.float32).reshape(place.shape) - float(place.change)
        values[name] = torch.from_numpy(joined)
    return values, sum(used.values())
