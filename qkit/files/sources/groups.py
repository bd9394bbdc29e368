"""Integers with a scale and a zero point for each group of inputs: what GPTQ and AWQ mean, once their words are unpacked."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

from qkit.errors import BadCheckpoint, Unsupported
from qkit.files.safefile import TensorInfo
from qkit.files.sources.decoded import Kept, Parts, row_steps

if TYPE_CHECKING:
    import torch
    from torch import Tensor


def decode_groups(codes: Tensor, zero: Tensor, scale: Tensor, group_of: Tensor | None, dtype: torch.dtype) -> Tensor:
    """(code - zero) * scale of every weight, in the dtype of the scales, rounded to ``dtype``.

    codes: uint8 [out, in]; zero: int16 [out, groups]; scale: [out, groups]; group_of: int64 [in], None: groups of one width
    Raises BadCheckpoint for an input of a group that is not there.
    """
    import torch

    rows, columns = codes.shape
    if group_of is None:
        group_of = torch.arange(columns) // (columns // scale.shape[1])
    if columns and (int(group_of.min()) < 0 or int(group_of.max()) >= scale.shape[1]):
        raise BadCheckpoint(
            f"g_idx names groups {int(group_of.min())} to {int(group_of.max())} of {scale.shape[1]}: get the model again from "
            "its source"
        )
    result = torch.empty(rows, columns, dtype=dtype)
    for some in row_steps(rows, columns):
        whole = codes[some].to(torch.int16) - zero[some][:, group_of]  # exact in every float that scales have
        result[some] = (whole.to(scale.dtype) * scale[some][:, group_of]).to(dtype)
    return result


def kept_groups(
    bits: int, shape: tuple[int, int], scale: TensorInfo, unpack: Callable[[Parts], tuple[Tensor, Tensor, Tensor]]
) -> Kept | str:
    """The same integers, scales and zero points as compressed-tensors packs them, groups following each other.

    unpack: codes uint8 [out, in], zero points int16 [out, groups] and scales [out, groups]
    """
    from qkit.tensor import compressed_tensors as ct
    from qkit.tensor.formats import FORMATS
    from qkit.tensor.qtensor import Params, QTensor

    groups = scale.shape[0]
    if shape[1] % groups:
        return f"its {groups} groups do not divide {shape[1]} inputs"
    fmt = FORMATS[f"int{bits}_asym" if groups > 1 else f"int{bits}_asym_channel"]
    fmt = replace(fmt, group=shape[1] // groups) if groups > 1 else fmt
    scale_dtype = scale.torch_dtype

    def make(parts: Parts) -> dict[str, Tensor]:
        import torch

        codes, zero, values = unpack(parts)
        half = 1 << (bits - 1)
        shifted = zero - half
        if bool((shifted < -half).any()) or bool((shifted >= half).any()):
            raise Unsupported(
                f"a zero point of {int(zero.max())} does not fit {bits} bits, so that a linear cannot be kept as it is: leave "
                "it out of --keep-source"
            )
        signed = (codes.to(torch.int16) - half).to(torch.int8)
        q = QTensor(signed, Params(values.contiguous(), shifted.to(torch.int8).contiguous()), fmt)
        return ct.write(q, None, None, scale_dtype)

    return Kept(weights=fmt, activations=None, specs=ct.specs(fmt, None, shape, scale_dtype), make=make)
