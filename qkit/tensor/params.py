"""The parameters of a quantized weight, and how their tiles lie in it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from qkit.errors import Unsupported
from qkit.tensor.formats import Format


@dataclass(frozen=True)
class Params:
    """Parameters of a quantized weight.

    scale: [R, C] in its dtype on disk (model dtype, float8_e4m3fn, or uint8 E8M0 exponents); of GGUF float16, or int8 under
    super- scales
    zero: int8 [R, C] for asymmetric integers; global_scale: float32 [1] for NVFP4
    minimum: [R, C] of GGUF's formats with one: float16, or int8 under super-minimums, which are subtracted
    super_scale, super_minimum: float16 [R, super-blocks] of K types
    """

    scale: Tensor
    zero: Tensor | None = None
    global_scale: Tensor | None = None
    minimum: Tensor | None = None
    super_scale: Tensor | None = None
    super_minimum: Tensor | None = None

    @staticmethod
    def cat(parts: Sequence[Params], dim: int) -> Params:
        """The parameters of slices of a weight, side by side: 0 for rows, 1 for columns."""

        def joined(name: str) -> Tensor | None:
            tensors = [t for p in parts if (t := getattr(p, name)) is not None]
            return torch.cat(tensors, dim) if tensors else None

        names = ("zero", "minimum", "super_scale", "super_minimum")
        return Params(
            torch.cat([p.scale for p in parts], dim),
            global_scale=parts[0].global_scale,
            **{name: joined(name) for name in names},
        )

    def to(self, device: torch.device) -> Params:
        """The params on another device."""
        return replace(self, **{name: t.to(device) for name, t in vars(self).items() if t is not None})

    def split(self, rows: Sequence[int]) -> list[Params]:
        """The params of slices of the rows of a weight with a scale of its own in each row: the inverse of ``cat``."""

        def cut(t: Tensor | None) -> list[Tensor] | list[None]:
            return [None] * len(rows) if t is None else [x.contiguous() for x in t.split(list(rows))]

        names = ("zero", "minimum", "super_scale", "super_minimum")
        columns = zip(cut(self.scale), *(cut(getattr(self, n)) for n in names), strict=True)
        return [Params(s, global_scale=self.global_scale, **dict(zip(names, x, strict=True))) for s, *x in columns]


def param_shape(fmt: Format, shape: tuple[int, int]) -> tuple[int, int]:
    """[R, C]: the shape of the scale of a weight [out, in]."""
    out, columns = shape
    if fmt.strategy in ("group", "tensor_group"):
        assert fmt.group is not None
        if columns % fmt.group:
            raise Unsupported(f"format {fmt.name}: {columns} columns are not a multiple of the group size {fmt.group}")
        return out, columns // fmt.group
    if fmt.strategy == "block":
        assert fmt.block is not None
        return -(-out // fmt.block[0]), -(-columns // fmt.block[1])
    return (1, 1) if fmt.strategy == "tensor" else (out, 1)


def tiles(w: Tensor, fmt: Format) -> Tensor:
    """[out, in] -> [R, C, n]: the last axis shares a scale. A view where possible."""
    out, columns = w.shape
    if fmt.strategy == "tensor":
        return w.reshape(1, 1, -1)
    if fmt.strategy != "block":
        r, c = param_shape(fmt, (out, columns))
        return w.reshape(r, c, columns // c)
    assert fmt.block is not None
    (bh, bw), (r, c) = fmt.block, param_shape(fmt, (out, columns))
    padded = torch.nn.functional.pad(w, (0, c * bw - columns, 0, r * bh - out))
    return padded.reshape(r, bh, c, bw).transpose(1, 2).reshape(r, c, bh * bw)


def untile(t: Tensor, fmt: Format, shape: tuple[int, int]) -> Tensor:
    """[R, C, n] -> [out, in]: the inverse of ``tiles``."""
    if fmt.strategy != "block":
        return t.reshape(shape)
    assert fmt.block is not None
    (r, c), (bh, bw) = t.shape[:2], fmt.block
    return t.reshape(r, c, bh, bw).transpose(1, 2).reshape(r * bh, c * bw)[: shape[0], : shape[1]]


def expand(per_tile: Tensor, fmt: Format, shape: tuple[int, int], columns: slice = slice(None)) -> Tensor:
    """[R, C] -> a tensor that broadcasts against columns ``columns`` of [out, in] element by element."""
    out, all_columns = shape
    if fmt.strategy in ("tensor", "channel"):
        return per_tile
    width = fmt.group if fmt.group is not None else fmt.block[1]  # type: ignore[index]
    index = torch.arange(all_columns, device=per_tile.device)[columns] // width
    values = per_tile[:, index]
    if fmt.strategy == "block":
        assert fmt.block is not None
        values = values.repeat_interleave(fmt.block[0], dim=0)[:out]
    return values


def effective_scale(p: Params, fmt: Format) -> Tensor:
    """Factors of codes, float32 [R, C]."""
    if fmt.scale == "e8m0":
        return torch.exp2(p.scale.to(torch.float32) - 127.0)
    scale = p.scale.to(torch.float32)
    if p.super_scale is not None:
        return scale * _over_groups(p.super_scale, scale)
    return scale if p.global_scale is None else scale / p.global_scale


def effective_minimum(p: Params) -> Tensor | None:
    """What is added to the scaled codes, float32 [R, C]; None for formats without it."""
    if p.minimum is None:
        return None
    minimum = p.minimum.to(torch.float32)
    return minimum if p.super_minimum is None else -(minimum * _over_groups(p.super_minimum, minimum))


def _over_groups(per_super_block: Tensor, like: Tensor) -> Tensor:
    """[R, super-blocks] -> float32 [R, C], one value for every group."""
    return per_super_block.to(torch.float32).repeat_interleave(like.shape[-1] // per_super_block.shape[-1], dim=-1)
