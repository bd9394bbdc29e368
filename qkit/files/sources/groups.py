"""Integers with a scale and a zero point for each group of inputs: what GPTQ and AWQ mean, once their words are unpacked."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from qkit.files.safefile import TensorInfo
from qkit.files.sources.decoded import Kept, Parts, row_steps

if TYPE_CHECKING:
    import torch
    from torch import Tensor


@dataclass(frozen=True)
class Groups:
    """Some outputs of a linear: codes int16 [n, in] and zero points int16 [n, groups], both from 0 on; scale [n, groups] in its
    stored dtype; group_of: int64 [in], the group of each input (None: groups of one width, in order)."""

    codes: Tensor
    zero: Tensor
    scale: Tensor
    group_of: Tensor | None


def in_order(columns: int, groups: int) -> Tensor:
    """int64 [columns]: the group of each input where groups of one width follow each other."""
    import torch

    return torch.arange(columns) // (columns // groups)


def decode_groups(
    parts: Parts,
    shape: tuple[int, int],
    cut: Callable[[Parts, slice], Parts],
    unpack: Callable[[Parts], Groups],
    dtype: torch.dtype,
) -> Tensor:
    """The plain weight [out, in], some outputs at a time: (code - zero) * scale in the dtype of the scales, then ``dtype``.

    cut: the stored tensors of some outputs. Raises ValueError for an input of a group that is not there.
    """
    import torch

    result = torch.empty(shape, dtype=dtype)
    for some in row_steps(*shape, 32):
        found = unpack(cut(parts, some))
        count = found.scale.shape[1]
        group_of = in_order(shape[1], count) if found.group_of is None else found.group_of
        if int(group_of.min()) < 0 or int(group_of.max()) >= count:
            raise ValueError(f"g_idx names groups {int(group_of.min())} to {int(group_of.max())} of {count}")
        whole = found.codes - found.zero[:, group_of]  # exact in every float that scales have
        result[some] = (whole.to(found.scale.dtype) * found.scale[:, group_of]).to(dtype)
    return result


def kept_groups(
    bits: int,
    shape: tuple[int, int],
    scale: TensorInfo,
    unpack: Callable[[Parts], Groups],
    doubt: Callable[[Callable[[str], Tensor]], str | None] = lambda read: None,
    symmetric: bool = False,
) -> Kept | str:
    """The same integers, scales and zero points as compressed-tensors packs them, groups following each other.

    symmetric: all zero points are half the range, and need no place of their own; doubt: as in ``Kept``
    """
    from qkit.tensor import compressed_tensors as ct
    from qkit.tensor.formats import FORMATS
    from qkit.tensor.qtensor import Params, QTensor

    groups = scale.shape[0]
    if shape[1] % groups:
        return f"its {groups} groups do not divide {shape[1]} inputs"
    fmt = FORMATS[f"int{bits}{'' if symmetric else '_asym'}{'' if groups > 1 else '_channel'}"]
    fmt = replace(fmt, group=shape[1] // groups) if groups > 1 else fmt
    scale_dtype, half = scale.torch_dtype, 1 << (bits - 1)

    def make(parts: Parts) -> dict[str, Tensor]:
        import torch

        found = unpack(parts)
        codes, zero = ((t - half).to(torch.int8).contiguous() for t in (found.codes, found.zero))
        params = Params(found.scale.contiguous(), None if symmetric else zero)
        return ct.write(QTensor(codes, params, fmt), None, None, scale_dtype)

    specs = ct.specs(fmt, None, shape, scale_dtype)
    return Kept(weights=fmt, activations=None, specs=specs, make=make, doubt=doubt)
