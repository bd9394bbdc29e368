"""FP8 weights with a scale for each block, channel or tensor: DeepSeek-V3, Qwen3-FP8, and whatever transformers saves so.

Beside an E4M3 (or E5M2) weight [.., out, in] lies its scale, ``weight_scale_inv`` in the first such models: numbers that codes
are multiplied by, float32 or powers of two (E8M0). The plain weight is float32(code) * float32(scale), rounded once to the
dtype of the model, as transformers' ``Fp8Dequantize`` and DeepSeek's ``weight_dequant`` compute it. A bare ``int8`` weight with
such a scale holds two E2M1 codes a byte (DeepSeek-V4's experts).

The blocks are those of the config, the last one cut off where they do not divide a weight (576 rows of DeepSeek's latent
projection are 4.5 blocks); where the config has none, and for FP4, the grid of scales itself says how large they are.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING

from qkit.files.safefile import TensorInfo, shown
from qkit.files.sources.decoded import CACHE_SCALES, DecodedInfo, Found, Kept, Parts, Stored, row_steps

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from qkit.tensor.formats import Format

CODES = ("F8_E4M3", "F8_E5M2")
_SCALES = ("weight_scale_inv", "weight_scale", "scale_inv", "scale", "qscale_weight")  # beside NAME.weight
_INPUTS = ("activation_scale", "input_scale", "qscale_act")
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
Block = tuple[int, int]


def find(stored: Stored) -> Found:
    """The FP8 weights of a folder. Raises BadCheckpoint for one without its scale, or with one of another shape."""
    weights: dict[str, DecodedInfo] = {}
    dropped = [name for name in stored.tensors if name.endswith(CACHE_SCALES)]
    for name, info in stored.tensors.items():
        scale_name = _scale_of(name, stored.tensors)
        packed = info.dtype == "I8" and scale_name is not None
        if info.dtype not in CODES and not packed:
            continue
        if scale_name is None:
            stored.refuse(name, f"is {info.dtype}, and no file has its scale {shown(_scale_names(name)[0])}")
        if len(info.shape) < 2:
            stored.refuse(name, f"is {info.dtype} {list(info.shape)}, expected a matrix")
        weights[name] = _weight(stored, info, stored.tensors[scale_name], packed)
        stem = name.removesuffix(".weight")
        dropped += [n for leaf in _INPUTS for n in (f"{stem}.{leaf}", f"{name}_{leaf}") if n in stored.tensors]
    return Found(weights, dropped)


def _scale_names(name: str) -> list[str]:
    """Names under which the scale of a weight is looked for, the usual one first."""
    if not name.endswith(".weight"):
        return [f"{name}_scale_inv", f"{name}_scale"]  # a fused tensor of experts
    stem = name.removesuffix("weight")
    return [stem + leaf for leaf in _SCALES]


def _scale_of(name: str, tensors: Mapping[str, TensorInfo]) -> str | None:
    return next((n for n in _scale_names(name) if n in tensors), None)


def _weight(stored: Stored, codes: TensorInfo, scale: TensorInfo, packed: bool) -> DecodedInfo:
    shape = (*codes.shape[:-1], codes.shape[-1] * (2 if packed else 1))
    block = _block(stored, shape, scale, packed)
    parts = {"weight": codes, "scale": scale}
    inputs = next(
        (n for leaf in _INPUTS if (n := f"{codes.name.removesuffix('.weight')}.{leaf}") in stored.tensors), None
    )
    if inputs is not None:
        parts["input_scale"] = stored.tensors[inputs]
    sizes = "one scale" if block == shape[-2:] else f"blocks of {block[0]}x{block[1]}"
    encoding = f"{'FP4' if packed else 'FP8'} with {sizes}"
    decode = partial(_decode, shape=shape, block=block, dtype=stored.torch_dtype)
    return stored.decoded(codes.name, shape, parts, decode, encoding, _kept(stored, parts, shape, block))


def _block(stored: Stored, shape: tuple[int, ...], scale: TensorInfo, packed: bool) -> Block:
    """(rows, columns) that share a scale. packed: the weight is FP4, whose blocks the config does not tell.

    Raises BadCheckpoint for a grid that no blocks of this weight give.
    """
    rows, columns = shape[-2:]
    if math.prod(scale.shape) == 1:
        return rows, columns
    grid = scale.shape if len(scale.shape) > 1 else (*scale.shape, 1)
    asked = stored.quantization.get("weight_block_size")
    sizes = (
        asked if isinstance(asked, list) and len(asked) == 2 and all(type(n) is int and n > 0 for n in asked) else None
    )
    if grid[:-2] == shape[:-2]:
        if sizes and grid[-2:] == (-(-rows // sizes[0]), -(-columns // sizes[1])):
            return sizes[0], sizes[1]
        if (packed or not sizes) and 0 not in grid and rows % grid[-2] == 0 and columns % grid[-1] == 0:
            return rows // grid[-2], columns // grid[-1]
    blocks = f" of blocks of {sizes[0]}x{sizes[1]}" if sizes else ""
    stored.refuse(
        scale.name, f"has shape {list(scale.shape)}, and no grid{blocks} over a weight {list(shape)} has that shape"
    )


def _scale_values(scale: Tensor) -> Tensor:
    """float32; bytes are exponents of two."""
    import torch

    return (scale.to(torch.float32) - 127.0).exp2() if scale.dtype == torch.uint8 else scale.to(torch.float32)


def _decode(parts: Parts, shape: tuple[int, ...], block: Block, dtype: torch.dtype) -> Tensor:
    """The plain weight, some rows at a time."""
    import torch

    rows, columns = shape[-2:]
    codes = parts["weight"].reshape(-1, rows, parts["weight"].shape[-1])
    grid = -(-rows // block[0]), -(-columns // block[1])
    scales = _scale_values(parts["scale"]).reshape(-1, *grid)
    column_of = torch.arange(columns) // block[1]
    result = torch.empty(len(codes), rows, columns, dtype=dtype)
    for matrix, scale, into in zip(codes, scales, result, strict=True):
        for some in row_steps(rows, columns):
            values = _unpacked(matrix[some]) if matrix.dtype == torch.int8 else matrix[some].to(torch.float32)
            row_of = torch.arange(some.start, some.stop) // block[0]
            into[some] = values.mul_(scale[row_of][:, column_of])
    return result.reshape(shape)


def _unpacked(codes: Tensor) -> Tensor:
    """float32 [rows, 2 n] from two E2M1 codes a byte, the even column in the low half."""
    import torch

    table = torch.tensor((*_E2M1, *(-v for v in _E2M1)))
    unsigned = codes.contiguous().view(torch.uint8)
    return table[torch.stack((unsigned & 15, unsigned >> 4), dim=-1).flatten(1).to(torch.int32)]


# ---- kept as it is ---------------------------------------------------------------------------------------------


def _kept(stored: Stored, parts: Mapping[str, TensorInfo], shape: tuple[int, ...], block: Block) -> Kept | str:
    """FP8 of compressed-tensors: the same codes, and the scale under its name there, in float32 where it was E8M0."""
    import torch

    codes, scale = parts["weight"], parts["scale"]
    if codes.dtype != "F8_E4M3" or len(shape) != 2 or not codes.name.endswith(".weight"):
        return f"{codes.dtype} {list(shape)} is no FP8 matrix of one linear"
    scale_dtype = scale.torch_dtype if scale.dtype in ("BF16", "F16", "F32") else torch.float32
    weights = _format(block, shape)
    activations = _activations(stored, weights, "input_scale" in parts)
    scale_shape = {"tensor": (1,), "channel": (shape[0], 1)}.get(weights.strategy, scale.shape)
    specs = {"weight": (torch.float8_e4m3fn, shape), "weight_scale": (scale_dtype, tuple(scale_shape))}
    static = activations is not None and not activations.dynamic
    if static:
        specs["input_scale"] = (torch.float32, (1,))

    def make(read: Parts) -> dict[str, Tensor]:
        values = read["scale"] if read["scale"].dtype == scale_dtype else _scale_values(read["scale"])
        tensors = {"weight": read["weight"], "weight_scale": values.reshape(specs["weight_scale"][1])}
        return {**tensors, **({"input_scale": read["input_scale"].float().reshape(1)} if static else {})}

    return Kept(weights=weights, activations=activations, specs=specs, make=make)


def _format(block: Block, shape: tuple[int, ...]) -> Format:
    from dataclasses import replace

    from qkit.tensor.formats import FORMATS

    if block == shape:
        return FORMATS["fp8"]
    if block == (1, shape[1]):
        return FORMATS["fp8_channel"]
    return replace(FORMATS["fp8_block"], block=block)


def _activations(stored: Stored, weights: Format, measured: bool) -> Format | None:
    """What the config says of inputs: measured scales, or ones made for every token or group of channels."""
    from dataclasses import replace

    from qkit.tensor.formats import ACTIVATION_FORMATS

    if measured and stored.quantization.get("activation_scheme") == "static":
        return ACTIVATION_FORMATS["fp8_static"]
    if weights.block:
        return replace(ACTIVATION_FORMATS["fp8_group"], group=weights.block[1])
    return ACTIVATION_FORMATS["fp8_token"]
