"""A folder in GPTQ, AWQ, AutoRound, ModelOpt or MLX layout seen as one of compressed-tensors, so that it runs packed.

Codes, scales and the formats of inputs are those of the file; only names and the order of bits are others. Tensors are made
when they are read.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qkit.errors import Unsupported
from qkit.files.checkpoint import Checkpoint
from qkit.files.safefile import DTYPE_NAMES, TensorInfo
from qkit.files.sources.decoded import DecodedInfo, Parts
from qkit.files.sources.packed import PackedFolder, PackedLinear, open_packed
from qkit.tensor import compressed_tensors as ct
from qkit.tensor.formats import ACTIVATION_FORMATS
from qkit.tensor.layouts.table import cache_name_back

if TYPE_CHECKING:
    from torch import Tensor

METHODS = ("gptq", "awq", "auto-round", "modelopt", "mlx")


def as_compressed(folder: Path) -> Checkpoint | None:
    """The view; None where compressed-tensors has no place for what a linear of the folder holds. Raises as
    ``Checkpoint.open``."""
    try:
        packed = open_packed(folder)
    except Unsupported:
        return None
    tensors: dict[str, TensorInfo] = dict(packed.plain)
    for linear in packed.linears.values():
        tensors |= {info.name: info for info in _parts(linear)}
    for name, info in packed.cache.items():
        tensors[cache_name_back(name)] = replace(info, name=cache_name_back(name), shape=(1,))
    config = {**packed.checkpoint.config, "quantization_config": _config(packed)}
    return replace(packed.checkpoint, tensors=tensors, config=config)


def _parts(linear: PackedLinear) -> list[DecodedInfo]:
    """Headers of the tensors that compressed-tensors has of a linear."""

    def decode(leaf: str) -> Callable[[Parts], Tensor]:
        return lambda parts: linear.kept.make(parts)[leaf].reshape(linear.kept.specs[leaf][1])

    return [
        replace(
            linear.info,
            name=f"{linear.name}.{leaf}",
            dtype=DTYPE_NAMES[str(dtype)],
            shape=shape,
            end=math.prod(shape) * dtype.itemsize,
            decode=decode(leaf),
        )
        for leaf, (dtype, shape) in linear.kept.specs.items()
    ]


def _config(packed: PackedFolder) -> dict[str, Any]:
    """A ``quantization_config`` in which every quantized linear is named, and no class is."""
    pairs = {name: (x.kept.weights, x.kept.activations) for name, x in packed.linears.items()}
    cache = ACTIVATION_FORMATS["fp8_static"] if any(name.endswith("k_scale") for name in packed.cache) else None
    config = ct.config(pairs, [], {}, cache, tuple(pairs))
    for group in config["config_groups"].values():
        group["targets"] = [target for target in group["targets"] if target != ct.CLASS]
    return config
