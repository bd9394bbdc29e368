"""A copy of a GGUF file with the same numbers as float32: llama.cpp then rounds no inputs of products to 8 bits.

python tools/gguf_floats.py MODEL.gguf COPY.gguf
"""

from __future__ import annotations

import sys
from pathlib import Path

import gguf
import numpy as np


def as_floats(file: Path, target: Path) -> None:
    """A copy of a GGUF file in which every tensor is float32, decoded by the library gguf."""
    reader = gguf.GGUFReader(file)
    architecture = reader.get_field("general.architecture").contents()
    writer = gguf.GGUFWriter(target, architecture)
    for key, field in reader.fields.items():
        if key.startswith("GGUF.") or key == "general.architecture":
            continue
        inner = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(key, field.contents(), field.types[0], sub_type=inner)
    for tensor in reader.tensors:
        values = gguf.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        writer.add_tensor(tensor.name, values.reshape([int(n) for n in reversed(tensor.shape)]))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


if __name__ == "__main__":
    as_floats(Path(sys.argv[1]), Path(sys.argv[2]))
