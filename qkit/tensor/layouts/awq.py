"""AWQ, as AutoAWQ stores it (``version: gemm``): write side; ``qkit.files.sources.awq`` reads it.

Of a linear [out, in]: ``qweight`` int32 [in, out / 8], ``qzeros`` int32 [groups, out / 8] and ``scales`` [groups, out], 4 bits.
A word holds eight neighbouring outputs, from the lowest bits on in the order 0, 2, 4, 6, 1, 3, 5, 7. Zero points are always
stored; those of a symmetric weight are 8.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from qkit.tensor.formats import Format
from qkit.tensor.packing import pack_bits
from qkit.tensor.qtensor import QTensor, param_shape

Spec = tuple[torch.dtype, tuple[int, ...]]
Pair = tuple[Format, Format | None]

_BITS, _LANES = 4, 8
_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def refusal(weights: Format, activations: Format | None, shape: tuple[int, int]) -> str | None:
    """Why AWQ has no place for a weight [out, in], or None."""
    if weights.kind != "int" or weights.gguf or weights.strategy not in ("group", "channel"):
        return f"AWQ stores integers with a scale for each group or channel, and this is {weights}"
    if activations is not None:
        return f"its inputs are quantized ({activations}), and AWQ has no place for that"
    if weights.bits != _BITS:
        return f"it has {weights.bits} bits, and AWQ has {_BITS}"
    if shape[0] % _LANES:
        return f"its {shape[0]} outputs are not a multiple of {_LANES}, which AWQ stores in one word"
    return None


def specs(weights: Format, activations: Format | None, shape: tuple[int, int], dtype: torch.dtype) -> dict[str, Spec]:
    """{suffix: (dtype, shape)} of the tensors of a linear [out, in]. dtype: of the scales"""
    out, columns = shape
    groups = param_shape(weights, shape)[1]
    return {
        "qweight": (torch.int32, (columns, out // _LANES)),
        "qzeros": (torch.int32, (groups, out // _LANES)),
        "scales": (dtype, (groups, out)),
    }


def write(q: QTensor, activations: Format | None, static: Tensor | None, dtype: torch.dtype) -> dict[str, Tensor]:
    """{suffix: tensor} of a linear."""
    scale = q.params.scale.T.contiguous()
    zero = torch.zeros_like(scale, dtype=torch.int8) if q.params.zero is None else q.params.zero.T.contiguous()
    return {"qweight": _pack(q.codes.T.contiguous()), "qzeros": _pack(zero), "scales": scale.to(dtype)}


def _pack(codes: Tensor) -> Tensor:
    """Signed codes [n, out] to words [n, out / 8]."""
    return pack_bits(codes.unflatten(1, (-1, _LANES))[..., list(_ORDER)].flatten(1), _BITS)


def config(pairs: Mapping[str, Pair], skipped: Sequence[str], heads: Sequence[str], cache: bool) -> dict[str, Any]:
    """The ``quantization_config``; all linears have one group size (``table.mixed_refusal``)."""
    group = Counter(w.group or -1 for w, _ in pairs.values()).most_common(1)[0][0]
    return {
        "quant_method": "awq",
        "bits": _BITS,
        "group_size": group,
        "zero_point": True,
        "version": "gemm",
        "lm_head": any(name in pairs for name in heads),
        "modules_to_not_convert": sorted(skipped) or None,
    }


def files(quantization: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Nothing lies beside config.json."""
    return {}
