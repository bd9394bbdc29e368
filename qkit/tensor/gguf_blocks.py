"""Blocks of GGUF as llama.cpp reads them: from codes and parameters to bytes.

The layouts are those of ggml's ``block_*`` structures. A row of a weight is a sequence of blocks; of a block of 32 columns the
low half of each byte has a column of the first 16, the high half one of the others. K types have blocks of 256 columns.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from qkit.tensor.formats import SUPER_BLOCK, Format
from qkit.tensor.qtensor import QTensor

# Columns and bytes of a block.
BLOCKS: dict[str, tuple[int, int]] = {
    "q8_0": (32, 34), "q5_0": (32, 22), "q4_0": (32, 18), "q5_1": (32, 24), "q4_1": (32, 20), "iq4_nl": (32, 18),
    "q6_k": (256, 210), "q5_k": (256, 176), "q4_k": (256, 144), "q3_k": (256, 110), "q2_k": (256, 84), "iq4_xs": (256, 136),
    "gguf_mxfp4": (32, 17), "gguf_nvfp4": (64, 36),
}  # fmt: skip


ALIGNMENT = 32  # of tensors in a file


def block_bytes(fmt: Format, shape: tuple[int, ...]) -> int:
    """Bytes of a weight of that shape."""
    columns, size = BLOCKS[fmt.name]
    return math.prod(shape) // columns * size


def scale_of_tensor(q: QTensor) -> Tensor:
    """float32 [1]: what llama.cpp multiplies the products of an NVFP4 weight with; a power of two, so that it is exact."""
    assert q.params.global_scale is not None
    return 1 / q.params.global_scale


def aligned(size: int) -> int:
    """The bytes that so many bytes of a tensor take in a file."""
    return -(-size // ALIGNMENT) * ALIGNMENT


def pack(q: QTensor) -> Tensor:
    """uint8 [out, bytes of a row]."""
    fmt, rows = q.format, q.shape[0]
    columns, size = BLOCKS[fmt.name]
    low = {"q8_0": 0, "q5_0": -16, "q4_0": -8, "q6_k": -32, "q3_k": -4}.get(
        fmt.name, 0
    )  # of codes that are stored from 0 on
    codes = (q.codes.to(torch.int16) - low).to(torch.int8 if fmt.name == "q8_0" else torch.uint8).reshape(-1, columns)
    blocks = torch.cat(_PACKERS[fmt.name](codes.view(torch.uint8), q), dim=1)
    assert blocks.shape[1] == size
    return blocks.reshape(rows, -1)


def _bytes(t: Tensor | None, columns: int = 1) -> Tensor:
    """The bytes of one number for every block, or of some."""
    assert t is not None
    return t.contiguous().reshape(-1, columns).view(torch.uint8)


def _halves(codes: Tensor, width: int) -> Tensor:
    """Two codes a byte: of every 2 * width columns the first ``width`` in the low half."""
    pairs = (codes & 15).reshape(len(codes), -1, 2, width)
    return (pairs[:, :, 0] | pairs[:, :, 1] << 4).flatten(1)


def _quarters(codes: Tensor) -> Tensor:
    """Four codes a byte: column i of every 128 in byte i % 32, the first 32 in the lowest bits."""
    parts = (codes & 3).reshape(len(codes), -1, 4, 32)
    return (parts[:, :, 0] | parts[:, :, 1] << 2 | parts[:, :, 2] << 4 | parts[:, :, 3] << 6).flatten(1)


def _bits(codes: Tensor, bit: int, width: int) -> Tensor:
    """One bit of every code: column i of the block is bit i // width of byte i % width."""
    planes = (codes >> bit & 1).reshape(len(codes), -1, width)
    return _or(planes << torch.arange(planes.shape[1], dtype=torch.uint8)[:, None])


def _or(planes: Tensor) -> Tensor:
    """[N, planes, width] of separate bits -> [N, width]."""
    return planes.sum(1, dtype=torch.int32).to(torch.uint8)


def _bit_row(codes: Tensor) -> Tensor:
    """The fifth bit of 32 codes as a little-endian word: column i is bit i."""
    eights = (codes >> 4 & 1).reshape(len(codes), 4, 8)
    return (eights << torch.arange(8, dtype=torch.uint8)).sum(-1, dtype=torch.int32).to(torch.uint8)


def _six_bits(scale: Tensor, minimum: Tensor) -> Tensor:
    """Eight scales and eight minima of six bits in 12 bytes: the low six of the first four of each, whose upper two bits are
    the upper ones of the last four; then the low four of these."""
    s, m = scale.reshape(-1, 8).to(torch.uint8), minimum.reshape(-1, 8).to(torch.uint8)
    first = s[:, :4] | (s[:, 4:] >> 4) << 6
    second = m[:, :4] | (m[:, 4:] >> 4) << 6
    return torch.cat([first, second, (s[:, 4:] & 15) | (m[:, 4:] & 15) << 4], dim=1)


def _legacy(codes: Tensor, q: QTensor) -> list[Tensor]:
    head = [_bytes(q.params.scale)] + ([_bytes(q.params.minimum)] if q.params.minimum is not None else [])
    if q.format.bits == 8:
        return [*head, codes]
    return [*head, *([_bit_row(codes)] if q.format.bits == 5 else []), _halves(codes, 16)]


def _q2_k(codes: Tensor, q: QTensor) -> list[Tensor]:
    p = q.params
    assert p.minimum is not None
    scales = (p.scale.to(torch.uint8) | p.minimum.to(torch.uint8) << 4).reshape(-1, 16)
    return [scales, _quarters(codes), _bytes(p.super_scale), _bytes(p.super_minimum)]


def _q3_k(codes: Tensor, q: QTensor) -> list[Tensor]:
    s = (q.params.scale.to(torch.int16) + 32).to(torch.uint8).reshape(-1, 16)
    low = (s[:, :8] & 15) | (s[:, 8:] & 15) << 4
    upper = (s >> 4).reshape(-1, 4, 4)
    high = upper[:, 0] | upper[:, 1] << 2 | upper[:, 2] << 4 | upper[:, 3] << 6
    return [_bits(codes, 2, 32), _quarters(codes), low, high, _bytes(q.params.super_scale)]


def _q4_k(codes: Tensor, q: QTensor) -> list[Tensor]:
    p = q.params
    assert p.minimum is not None
    high = [_bits(codes, 4, 32)] if q.format.bits == 5 else []
    return [_bytes(p.super_scale), _bytes(p.super_minimum), _six_bits(p.scale, p.minimum), *high, _halves(codes, 32)]


def _q6_k(codes: Tensor, q: QTensor) -> list[Tensor]:
    return [_halves(codes, 64), _quarters(codes >> 4), _bytes(q.params.scale, 16), _bytes(q.params.super_scale)]


def _iq4_xs(codes: Tensor, q: QTensor) -> list[Tensor]:
    s = (q.params.scale.to(torch.int16) + 32).reshape(-1, SUPER_BLOCK // 32)
    high = ((s >> 4) << torch.arange(0, 16, 2, dtype=torch.int16)).sum(1, dtype=torch.int32)
    high_bytes = torch.stack([high & 255, high >> 8], dim=1).to(torch.uint8)
    low = (s & 15).to(torch.uint8)
    return [_bytes(q.params.super_scale), high_bytes, low[:, ::2] | low[:, 1::2] << 4, _halves(codes, 16)]


def _mxfp4(codes: Tensor, q: QTensor) -> list[Tensor]:
    return [_bytes(q.params.scale), _halves(codes, 16)]


def _nvfp4(codes: Tensor, q: QTensor) -> list[Tensor]:
    return [_bytes(q.params.scale, 4), _halves(codes, 8)]


_PACKERS: dict[str, Callable[[Tensor, QTensor], list[Tensor]]] = {
    **dict.fromkeys(("q8_0", "q5_0", "q4_0", "q5_1", "q4_1", "iq4_nl"), _legacy),
    "q6_k": _q6_k,
    "q5_k": _q4_k,
    "q4_k": _q4_k,
    "q3_k": _q3_k,
    "q2_k": _q2_k,
    "iq4_xs": _iq4_xs,
    "gguf_mxfp4": _mxfp4,
    "gguf_nvfp4": _nvfp4,
}
