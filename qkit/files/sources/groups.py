"""Integers with a scale and a zero point for each group of inputs: what GPTQ and AWQ mean, once their words are unpacked."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from qkit.errors import BadCheckpoint, Unsupported
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

    @property
    def in_order(self) -> Tensor:
        """int64 [in]: the group of each input where groups of one width follow each other."""
        import torch

        columns = self.codes.shape[1]
        return torch.arange(columns) // (columns // self.scale.shape[1])


def decode_groups(
    parts: Parts,
    shape: tuple[int, int],
    cut: Callable[[Parts, slice], Parts],
    unpack: Callable[[Parts], Groups],
    dtype: torch.dtype,
) -> Tensor:
    """The plain weight [out, in], some outputs at a time: (code - zero) * scale in the dtype of the scales, then ``dtype``.

    cut: the stored tensors of some outputs. Raises BadCheckpoint for an input of a group that is not there.
    """
    import torch

    result = torch.empty(shape, dtype=dtype)
    for some in row_steps(*shape, 32):
        found = unpack(cut(parts, some))
        group_of, count = found.in_order if found.group_of is None else found.group_of, found.scale.shape[1]
        if int(group_of.min()) < 0 or int(group_of.max()) >= count:
            raise BadCheckpoint(
                f"g_idx names groups {int(group_of.min())} to {int(group_of.max())} of {count}: get the model again from "
                "its source"
            )
        whole = found.codes - found.zero[:, group_of]  # exact in every float that scales have
        result[some] = (whole.to(found.scale.dtype) * found.scale[:, group_of]).to(dtype)
    return result


def kept_groups(bits: int, shape: tuple[int, int], scale: TensorInfo, unpack: Callable[[Parts], Groups]) -> Kept | str:
    """The same integers, scales and zero points as compressed-tensors packs them, groups following each other."""
    from qkit.tensor import compressed_tensors as ct
    from qkit.tensor.formats import FORMATS
    from qkit.tensor.qtensor import Params, QTensor

    groups = scale.shape[0]
    if shape[1] % groups:
        return f"its {groups} groups do not divide {shape[1]} inputs"
    fmt = FORMATS[f"int{bits}_asym" if groups > 1 else f"int{bits}_asym_channel"]
    fmt = replace(fmt, group=shape[1] // groups) if groups > 1 else fmt
    scale_dtype, half = scale.torch_dtype, 1 << (bits - 1)

    def make(parts: Parts) -> dict[str, Tensor]:
        import torch

        found = unpack(parts)
        if found.group_of is not None and not torch.equal(found.group_of, found.in_order):
            raise Unsupported(
                "a linear with its columns in another order (g_idx) cannot be kept as it is: leave it out of --keep-source"
            )
        codes, zero = ((t - half).to(torch.int8).contiguous() for t in (found.codes, found.zero))
        return ct.write(QTensor(codes, Params(found.scale.contiguous(), zero), fmt), None, None, scale_dtype)

    return Kept(weights=fmt, activations=None, specs=ct.specs(fmt, None, shape, scale_dtype), make=make)
