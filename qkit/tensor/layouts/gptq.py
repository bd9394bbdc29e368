"""GPTQ, as AutoGPTQ and GPTQModel store it: write side; ``qkit.files.sources.gptq`` reads it.

Of a linear [out, in]: ``qweight`` int32 [in * bits / 32, out], codes from 0 on along the inputs, the first in the lowest bits;
``qzeros`` int32 [groups, out * bits / 32] likewise along the outputs; ``scales`` [groups, out]; ``g_idx`` int32 [in], the group
of every input. Version 1 of the format stores a zero point less one, version 2 as it is. A zero point of 0 has no place in
version 1 that all readers agree about, so files with zero points are of version 2 and symmetric ones, whose zero points are
all half the range, of version 1, which every reader knows.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from qkit.system.version import __version__
from qkit.tensor.formats import Format
from qkit.tensor.layouts.names import with_fused
from qkit.tensor.packing import pack_bits
from qkit.tensor.qtensor import QTensor, param_shape

Spec = tuple[torch.dtype, tuple[int, ...]]
Pair = tuple[Format, Format | None]

BITS = (2, 3, 4, 8)
FILE = "quantize_config.json"
_NAMES = 20  # in one rule


def refusal(weights: Format, activations: Format | None, shape: tuple[int, int]) -> str | None:
    """Why GPTQ has no place for a weight [out, in], or None."""
    if weights.kind != "int" or weights.gguf or weights.strategy not in ("group", "channel"):
        return f"GPTQ stores integers with a scale for each group or channel, and this is {weights}"
    if activations is not None:
        return f"its inputs are quantized ({activations}), and GPTQ has no place for that"
    if weights.bits not in BITS:
        return f"it has {weights.bits} bits, and GPTQ has {', '.join(map(str, BITS))}"
    for side, count in (("outputs", shape[0]), ("inputs", shape[1])):
        if count * weights.bits % 32:
            return f"its {count} {side} of {weights.bits} bits do not fill words of 32 bits"
    return None


def specs(weights: Format, activations: Format | None, shape: tuple[int, int], dtype: torch.dtype) -> dict[str, Spec]:
    """{suffix: (dtype, shape)} of the tensors of a linear [out, in]. dtype: of the scales"""
    out, columns = shape
    groups = param_shape(weights, shape)[1]
    return {
        "g_idx": (torch.int32, (columns,)),
        "qweight": (torch.int32, (columns * weights.bits // 32, out)),
        "qzeros": (torch.int32, (groups, out * weights.bits // 32)),
        "scales": (dtype, (groups, out)),
    }


def write(q: QTensor, activations: Format | None, static: Tensor | None, dtype: torch.dtype) -> dict[str, Tensor]:
    """{suffix: tensor} of a linear."""
    fmt, columns = q.format, q.shape[1]
    scale = q.params.scale.T.contiguous()
    zero = torch.full_like(scale, -1, dtype=torch.int8) if q.params.zero is None else q.params.zero.T.contiguous()
    return {
        "g_idx": (torch.arange(columns) // (columns // scale.shape[0])).to(torch.int32),
        "qweight": pack_bits(q.codes, fmt.bits).T.contiguous(),
        "qzeros": pack_bits(zero, fmt.bits),
        "scales": scale.to(dtype),
    }


def config(pairs: Mapping[str, Pair], skipped: Sequence[str], heads: Sequence[str], cache: bool) -> dict[str, Any]:
    """The ``quantization_config``: the most common format for all linears, and rules (``dynamic``) for the others.

    pairs: {linear: formats}; skipped: linears that are not quantized; heads: output heads among all of them
    """
    kinds = Counter((w.bits, w.group or -1) for w, _ in pairs.values())
    bits, group = kinds.most_common(1)[0][0]
    symmetric = all(w.symmetric for w, _ in pairs.values())
    version = "gptq" if symmetric else "gptq_v2"
    dynamic: dict[str, dict[str, int]] = {}
    for kind in kinds:
        if kind != (bits, group):
            mine = [name for name, (w, _) in pairs.items() if (w.bits, w.group or -1) == kind]
            dynamic |= {f"+:{p}": {"bits": kind[0], "group_size": kind[1]} for p in _patterns(mine)}
    dynamic |= {f"-:{p}": {} for p in _patterns([name for name in skipped if name not in heads])}
    return {
        "quant_method": "gptq",
        "bits": bits,
        "group_size": group,
        "desc_act": False,
        "sym": symmetric,
        "lm_head": any(name in pairs for name in heads),
        "true_sequential": True,
        "damp_percent": 0.05,
        "checkpoint_format": version,
        "format": version,
        "pack_dtype": "int32",
        **({"dynamic": dynamic} if dynamic else {}),
        "meta": {"quantizer": [f"qkit:{__version__}"]},
    }


def files(quantization: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """{name: content} of what lies beside config.json and says the same for older readers."""
    return {FILE: dict(quantization)}


def _patterns(names: Sequence[str]) -> list[str]:
    """Regular expressions for exactly these layers, from the start of a name to its end, each of some layers."""
    listed = sorted(with_fused(names))
    pieces = [listed[i : i + _NAMES] for i in range(0, len(listed), _NAMES)]
    return [f"({'|'.join(re.escape(name) for name in piece)})$" for piece in pieces]
