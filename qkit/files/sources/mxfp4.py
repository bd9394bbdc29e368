"""MXFP4 as gpt-oss has it: all experts of a layer in ``NAME_blocks`` and ``NAME_scales``.

``NAME_blocks`` is uint8 [experts, rows, groups, 16], two E2M1 codes a byte, the even column in the low half; ``NAME_scales`` is
uint8 [experts, rows, groups], exponents of two plus 127, one for 32 columns. The plain tensor NAME is [experts, columns, rows],
transposed as the class of the model has it (transformers' ``convert_moe_packed_tensors``), and every value of it is exact.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from qkit.files.sources.decoded import DecodedInfo, Found, Parts, Stored, row_steps

if TYPE_CHECKING:
    import torch
    from torch import Tensor

_BLOCKS, _SCALES = "_blocks", "_scales"
_GROUP = 32
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_NOT_KEPT = "a result has no place for the experts of a layer in one MXFP4 tensor"


def find(stored: Stored) -> Found:
    """The MXFP4 tensors of a folder. Raises BadCheckpoint for blocks and scales that do not belong together."""
    weights: dict[str, DecodedInfo] = {}
    for name, blocks in stored.tensors.items():
        if not name.endswith(_BLOCKS) or blocks.dtype != "U8":
            continue
        plain = name.removesuffix(_BLOCKS)
        scales = stored.part(plain + _SCALES, "scales", name)
        if len(blocks.shape) != 4 or blocks.shape[-1] * 2 != _GROUP:
            stored.refuse(name, f"has shape {list(blocks.shape)}, expected [experts, rows, groups, {_GROUP // 2}]")
        if scales.dtype != "U8" or scales.shape != blocks.shape[:-1]:
            found = f"{scales.dtype} {list(scales.shape)}"
            stored.refuse(scales.name, f"is {found}, expected U8 {list(blocks.shape[:-1])}, one scale for a block")
        if plain in stored.tensors:
            stored.refuse(plain, f"is there beside {name}: the same weight twice")
        experts, rows, groups, _ = blocks.shape
        shape = (experts, groups * _GROUP, rows)
        decode = partial(_decode, dtype=stored.torch_dtype)
        parts = {"blocks": blocks, "scales": scales}
        weights[plain] = stored.decoded(plain, shape, parts, decode, "MXFP4", _NOT_KEPT)
    return Found(weights)


def _decode(parts: Parts, dtype: torch.dtype) -> Tensor:
    """[experts, columns, rows], some rows at a time."""
    import torch

    blocks, scales = parts["blocks"], parts["scales"].to(torch.int32) - 127
    experts, rows, groups, _ = blocks.shape
    table = torch.tensor((*_E2M1, *(-v for v in _E2M1)))
    result = torch.empty(experts, groups * _GROUP, rows, dtype=dtype)
    for block, exponent, into in zip(blocks, scales, result, strict=True):
        for some in row_steps(rows, groups * _GROUP):
            codes = torch.stack((block[some] & 15, block[some] >> 4), dim=-1).flatten(-2)
            values = torch.ldexp(table[codes.to(torch.int32)], exponent[some][..., None])
            into[:, some] = values.flatten(-2).T
    return result
