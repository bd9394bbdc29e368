"""The layout that the Triton kernels read, made once from a checkpoint's codes when a model is loaded.

A checkpoint keeps codes row by row. A tensor core wants something else: in ``mma.m16n8k16`` lane l of a warp holds,
of the 16 x 16 tile of weights, rows l / 4 and l / 4 + 8, and of each row the columns 2 (l % 4) and 2 (l % 4) + 1,
then the same eight columns on. So codes are laid out such that what a lane loads is what that lane multiplies, with
nothing exchanged between lanes:

  pair    two neighbouring columns; their codes sit at the same place in the low and the high half of a 32-bit
          word: one AND takes both out, and one instruction on pairs of 16 bits turns both into numbers
  unit    what four words (w = 0 .. 3) hold: J pairs a word. Pair j of word w is columns 8 j + 2 w and 8 j + 2 w + 1 of
          the unit: pair j of all four words is eight consecutive columns, one half of the lanes' 16
  block   four units (u = 0 .. 3) that follow each other; a lane's load of 16 bytes is word w of units 0 to 3

  bits  codes a word  J   columns of a unit  of a block
   8        4         2         16               64
   4        8         4         32              128
   2       16         8         64              256
   3    32 in three  16        128              512

Three-bit codes fill three words: each half word takes five codes (pairs 0-4, 5-9, 10-14 of words a, b, c), and the
three bits left over in the halves are the code of pair 15 (bit 0 in a, 1 in b, 2 in c). A block has then three loads:
all a, all b, all c.

Words: int32 [rows / 8, blocks, words of a code group, 8, 4 (w), 4 (u)]: the 512 bytes that a warp reads at a time are
consecutive, and so are those of the next block. Rows are filled up to a multiple of 16 and columns to whole blocks,
with codes of zero weight.

Integer codes are stored with 2^(bits - 1) added; E2M1 and E4M3 codes as they are.

Scales: [rows / 8, blocks, 8, scales of a block]. Where a group has a block's columns or more, a block of a row has one
(the group's, repeated); else one a group, or four parts of a unit that share it, in the order (part, unit). Held as
  float  in the dtype of the activations
  e4m3   as the checkpoint has them, one byte
  e8m0   relative to the largest of the row: one byte, the high byte of a float16 or the exponent of a bfloat16
and a factor per row, float32 [rows], takes what remains: a scale per channel, a global scale, the largest exponent.
Zero points: int8, arranged as the scales.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from qkit_kernels.weight import CodeFormat, Weight, float_scale

ROWS = 16  # rows are filled up to a multiple of this
PAIRS = {2: 8, 3: 16, 4: 4, 8: 2}  # J, by bits
E4M3_FACTOR = 2.0**7  # decode.scales_of_bytes leaves this to the factor of the row


@dataclass(frozen=True, kw_only=True)
class KernelWeight:
    """A weight in this layout.

    words:  int32 [rows / 8, blocks, 1 or 3, 8, 4, 4]
    scale:  [rows / 8, blocks, 8, scales of a block]; None where ``row`` has all of it
    zero:   int8, shape of scale; None for symmetric formats
    row:    float32 [rows], factors of the rows of the product
    counts: int32 [rows / 16]: zero between launches; programs that share rows count here how many are done. So a weight serves
            one stream at a time.
    """

    format: CodeFormat
    shape: tuple[int, int]
    dtype: torch.dtype
    words: Tensor
    scale: Tensor | None
    zero: Tensor | None
    row: Tensor
    counts: Tensor

    @property
    def nbytes(self) -> int:
        """Bytes of the weight, which a product reads."""
        return sum(t.nbytes for t in (self.words, self.scale, self.zero, self.row) if t is not None)


def block_columns(bits: int) -> int:
    """Number of columns in a block."""
    return 32 * PAIRS[bits]


def why_not(fmt: CodeFormat, shape: tuple[int, int], dtype: torch.dtype) -> str | None:
    """The reason why the layout does not support a weight; None where it does."""
    unit, block = 8 * PAIRS.get(fmt.bits, 0), 32 * PAIRS.get(fmt.bits, 0)
    if not unit:
        return f"{fmt.bits}-bit codes: expected 2, 3, 4 or 8"
    if dtype not in (torch.float16, torch.bfloat16):
        return f"activations in {dtype}: expected float16 or bfloat16"
    if shape[1] % 8:
        return f"{shape[1]} columns: expected a multiple of 8"
    if fmt.group is not None and fmt.group < shape[1] and not (fmt.group % block == 0 or _divides(fmt.group, unit)):
        return f"groups of {fmt.group}: expected 8 x 2^n up to {block} columns, or a multiple of {block}"
    if fmt.scale != "float" and not (fmt.group and fmt.group < block):
        return f"{fmt.scale} scales of groups of {fmt.group}: expected less than {block} columns"
    return None


def _divides(group: int, unit: int) -> bool:
    return group % 8 == 0 and (unit % group == 0 or group in (unit, 2 * unit, 4 * unit))


def lay_out(weight: Weight, dtype: torch.dtype) -> KernelWeight:
    """The weight in the kernels' layout, for activations in ``dtype`` (float16 or bfloat16).

    Raises ValueError for what ``why_not`` names.
    """
    fmt, shape = weight.format, weight.shape
    reason = why_not(fmt, shape, dtype)
    if reason is not None:
        raise ValueError(f"no kernel layout for {reason}")
    block = block_columns(fmt.bits)
    row_padding, column_padding = -shape[0] % ROWS, -shape[1] % block
    codes = weight.codes.view(torch.uint8).to(torch.int32)
    if fmt.kind == "int":
        codes = (weight.codes.to(torch.int32) + (1 << (fmt.bits - 1))) & 0xFF
    codes = functional.pad(
        codes, (0, column_padding, 0, row_padding), value=1 << (fmt.bits - 1) if fmt.kind == "int" else 0
    )
    scale, zero, row = _scales(weight, dtype, codes.shape[1] // block)
    row = functional.pad(row, (0, row_padding))
    counts = torch.zeros(len(row) // ROWS, dtype=torch.int32, device=row.device)
    return KernelWeight(
        format=fmt,
        shape=shape,
        dtype=dtype,
        words=_words(codes, fmt.bits),
        scale=_by_eight(scale, row_padding),
        zero=_by_eight(zero, row_padding),
        row=row,
        counts=counts,
    )


def lay_out_gated(gate: Weight, up: Weight, dtype: torch.dtype) -> KernelWeight:
    """Two weights of one format and shape, stacked, for silu(gate x) * (up x) in one product."""
    halves = [lay_out(w, dtype) for w in (gate, up)]
    if gate.format != up.format or gate.shape != up.shape:
        raise ValueError(f"gate and up differ: {gate.format} {gate.shape} and {up.format} {up.shape}")
    shape = (2 * gate.shape[0], gate.shape[1])
    joined = {n: [getattr(h, n) for h in halves] for n in ("words", "scale", "zero", "row", "counts")}
    tensors: dict[str, Any] = {n: None if p[0] is None else torch.cat(p) for n, p in joined.items()}
    return KernelWeight(format=gate.format, shape=shape, dtype=dtype, **tensors)


def _words(codes: Tensor, bits: int) -> Tensor:
    """Words of int32 codes [rows, columns]."""
    pairs = PAIRS[bits]
    # rows / 8, 8, block, u, j, w, h
    split = codes.view(codes.shape[0] // 8, 8, -1, 4, pairs, 4, 2)
    low, high = split.unbind(-1)
    code_pairs = (low | high << 16).permute(0, 2, 4, 1, 5, 3)  # rows / 8, block, j, 8, w, u
    if bits != 3:
        return _packed([code_pairs[:, :, j] for j in range(pairs)], bits)[:, :, None].contiguous()
    last_pair = code_pairs[:, :, 15]
    thirds = [_packed([code_pairs[:, :, 5 * t + i] for i in range(5)], 3) for t in range(3)]
    return torch.stack([w | ((last_pair >> t) & 0x00010001) << 15 for t, w in enumerate(thirds)], dim=2)


def _packed(codes_by_position: list[Tensor], bits: int) -> Tensor:
    """Words with one pair of codes at each position."""
    word = codes_by_position[0].clone()
    for j, codes in enumerate(codes_by_position[1:], 1):
        word |= codes << (bits * j)
    return word


def codes_of(weight: KernelWeight) -> Tensor:
    """The codes of a weight, int32 [out, in], as stored (integers with 2^(bits - 1) added): the inverse of ``lay_out``."""
    bits, pairs = weight.format.bits, PAIRS[weight.format.bits]
    words, mask = weight.words, ((1 << weight.format.bits) - 1) * 0x00010001
    if bits == 3:
        code_pairs = [(words[:, :, j // 5] >> (3 * (j % 5))) & mask for j in range(15)]
        code_pairs.append(_packed([(words[:, :, t] >> 15) & 0x00010001 for t in range(3)], 1))
    else:
        code_pairs = [(words[:, :, 0] >> (bits * j)) & mask for j in range(pairs)]
    stacked_pairs = torch.stack(code_pairs, dim=2)  # rows / 8, block, j, 8, w, u
    halves = torch.stack((stacked_pairs & 0xFFFF, (stacked_pairs >> 16) & 0xFFFF), dim=-1).permute(0, 3, 1, 5, 2, 4, 6)
    return halves.reshape(words.shape[0] * 8, -1)[: weight.shape[0], : weight.shape[1]]


def _scales(weight: Weight, dtype: torch.dtype, blocks: int) -> tuple[Tensor | None, Tensor | None, Tensor]:
    """(scales of blocks [rows, blocks, scales of a block], zero points like them, factor of rows [rows])."""
    fmt = weight.format
    if weight.scale.shape[1] == 1 and weight.zero is None:
        return None, None, float_scale(weight)[:, 0].contiguous()
    scale, row = weight.scale, torch.ones(weight.shape[0], device=weight.scale.device)
    if fmt.scale == "e4m3":
        scale = scale.view(torch.uint8)
        row = row * E4M3_FACTOR / (1.0 if weight.global_scale is None else weight.global_scale.to(torch.float32))
    elif fmt.scale == "e8m0":
        base = scale.amax(1, keepdim=True).to(torch.int32)
        row = torch.exp2(base[:, 0].to(torch.float32) - 127.0)
        relative = scale.to(torch.int32) - base
        if dtype == torch.float16:
            scale = (
                torch.exp2(relative.float()).to(torch.float16).view(torch.int16).bitwise_right_shift(8).to(torch.uint8)
            )
        else:
            scale = (relative + 127).clamp_min(0).to(torch.uint8)
    else:
        scale = scale.to(dtype)
    group = weight.shape[1] // weight.scale.shape[1]
    return _of_blocks(scale, group, fmt.bits, blocks), _of_blocks(weight.zero, group, fmt.bits, blocks), row


def _of_blocks(per_group: Tensor | None, group: int, bits: int, blocks: int) -> Tensor | None:
    """[rows, groups] to [rows, blocks, scales of a block], in the order (part, u)."""
    if per_group is None:
        return None
    unit = 8 * PAIRS[bits]
    rows = per_group.shape[0]
    if group >= 4 * unit:
        index = torch.arange(blocks, device=per_group.device) * 4 * unit // group
        return per_group[:, index.clamp_max(per_group.shape[1] - 1)][:, :, None]
    parts_per_unit = max(1, unit // group)
    start = torch.arange(blocks * 4 * parts_per_unit, device=per_group.device) * (
        unit // parts_per_unit
    )  # of every part of every unit
    index = (start // group).clamp_max(per_group.shape[1] - 1)
    return (
        per_group[:, index]
        .view(rows, blocks, 4, parts_per_unit)
        .transpose(2, 3)
        .reshape(rows, blocks, 4 * parts_per_unit)
    )


def _by_eight(t: Tensor | None, row_padding: int) -> Tensor | None:
    """[rows, blocks, n] to [rows / 8, blocks, 8, n], rows filled up."""
    if t is None:
        return None
    raw = t.view(torch.uint8) if t.dtype == torch.float8_e4m3fn else t
    padded = functional.pad(raw, (0, 0, 0, 0, 0, row_padding))
    return padded.view(-1, 8, *raw.shape[1:]).transpose(1, 2).contiguous()
