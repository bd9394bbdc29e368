"""NVIDIA ModelOpt's layout of Hugging Face checkpoints: write side; ``qkit.files.sources.modelopt`` reads it.

NVFP4 has ``weight`` uint8 [out, in / 2], the even column in the low half, ``weight_scale`` E4M3 [out, in / 16] and
``weight_scale_2`` float32 [], a number that is multiplied with: the reciprocal of compressed-tensors' global scale. FP8 has
``weight`` E4M3 and ``weight_scale`` float32: [] for the whole weight, [out] for channels, [out / 128, 1, in / 128, 1] for
blocks. MXFP8 has ``weight_scale`` uint8 [out, in / 32]. Measured inputs have ``input_scale`` float32 [], multiplied with as
well. Scales of the KV cache are those of the projections: ``k_proj.k_scale``, ``v_proj.v_scale``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from qkit.system.version import __version__
from qkit.tensor.formats import ACTIVATION_FORMATS, FORMATS, NVFP4_RANGE, Format
from qkit.tensor.packing import pack_nibbles
from qkit.tensor.qtensor import QTensor, nvfp4_global_scale, param_shape

Spec = tuple[torch.dtype, tuple[int, ...]]
Pair = tuple[Format, Format | None]

FILE = "hf_quant_config.json"
MIXED = "MIXED_PRECISION"
_NEAR = (0, 1, -1, 2, -2)  # units in the last place
_SHORT = 12  # zeros at the end of a mantissa that has 11 bits or less
# What ModelOpt calls a pair of formats.
ALGORITHMS: dict[str, tuple[str, str | None]] = {
    "NVFP4": ("nvfp4", "nvfp4_dynamic"),
    "W4A16_NVFP4": ("nvfp4", None),
    "FP8": ("fp8", "fp8_static"),
    "FP8_PER_CHANNEL_PER_TOKEN": ("fp8_channel", "fp8_token"),
    "FP8_PB_WO": ("fp8_block", "fp8_group"),
    "MXFP8": ("mxfp8", "mxfp8_dynamic"),
}


def pair_of(algorithm: str) -> Pair:
    """The formats of one of ALGORITHMS."""
    weights, activations = ALGORITHMS[algorithm]
    return FORMATS[weights], None if activations is None else ACTIVATION_FORMATS[activations]


def algorithm_of(weights: Format, activations: Format | None) -> str | None:
    """The name of a pair of formats; None for one that ModelOpt has no name for."""
    return next((name for name in ALGORITHMS if _same(pair_of(name), (weights, activations))), None)


def _same(known: Pair, found: Pair) -> bool:
    """Whether two pairs mean the same, whatever they are called."""
    keys = ("kind", "bits", "strategy", "group", "block", "symmetric", "scale", "dynamic")
    return all(
        (a is None) == (b is None) and (a is None or all(getattr(a, k) == getattr(b, k) for k in keys))
        for a, b in zip(known, found, strict=True)
    )


def refusal(weights: Format, activations: Format | None, shape: tuple[int, int]) -> str | None:
    """Why ModelOpt's layout has no place for a weight [out, in], or None."""
    if algorithm_of(weights, activations) is None:
        inputs = "with inputs as they are" if activations is None else f"with inputs in {activations}"
        return f"ModelOpt has no name for {weights} {inputs} (it has {', '.join(ALGORITHMS)})"
    if weights.block and (shape[0] % weights.block[0] or shape[1] % weights.block[1]):
        return f"blocks of {weights.block[0]}x{weights.block[1]} do not divide its {shape[0]}x{shape[1]} weights"
    return None


def specs(weights: Format, activations: Format | None, shape: tuple[int, int], dtype: torch.dtype) -> dict[str, Spec]:
    """{suffix: (dtype, shape)} of the tensors of a linear [out, in]."""
    out, columns = shape
    rows, groups = param_shape(weights, shape)
    if weights.kind == "fp4":
        found: dict[str, Spec] = {"weight": (torch.uint8, (out, columns // 2))}
        found["weight_scale"] = (torch.float8_e4m3fn, (out, groups))
        found["weight_scale_2"] = (torch.float32, ())
    else:
        found = {"weight": (torch.float8_e4m3fn, shape)}
        shapes = {"tensor": (), "channel": (out,), "block": (rows, 1, groups, 1)}
        found["weight_scale"] = (
            (torch.uint8, (out, groups))
            if weights.scale == "e8m0"
            else (torch.float32, shapes.get(weights.strategy, ()))
        )
    if activations is not None and (not activations.dynamic or activations.strategy == "tensor_group"):
        found["input_scale"] = (torch.float32, ())
    return dict(sorted(found.items()))


def write(q: QTensor, activations: Format | None, static: Tensor | None, dtype: torch.dtype) -> dict[str, Tensor]:
    """{suffix: tensor} of a linear. static: of its inputs, as compressed-tensors has it"""
    expected = specs(q.format, activations, q.shape, dtype)
    scale_dtype, scale_shape = expected["weight_scale"]
    result = {
        "weight": pack_nibbles(q.codes) if q.format.kind == "fp4" else q.codes,
        "weight_scale": q.params.scale.to(scale_dtype).reshape(scale_shape),
    }
    if q.params.global_scale is not None:
        result["weight_scale_2"] = q.params.global_scale.to(torch.float32).reciprocal().reshape(())
    if "input_scale" in expected:
        assert static is not None and activations is not None
        value = static.to(torch.float32).reshape(())
        result["input_scale"] = value.reciprocal() if activations.strategy == "tensor_group" else value
    return result


def inverse(value: Tensor) -> Tensor:
    """float32: the number whose reciprocal is stored. Of several whose reciprocals round to the same number it is one with a
    short mantissa, as a writer has it that computes in 16 bits; else 1 / a * 2688 for a largest magnitude a of 16 bits; else
    the nearest."""
    stored = value.to(torch.float32)
    nearest = stored.reciprocal()
    around = [
        (nearest.reshape(1).view(torch.int32) + step).view(torch.float32).reshape(nearest.shape) for step in _NEAR
    ]
    largest = (stored * NVFP4_RANGE).to(torch.float16).to(torch.float32).reciprocal() * NVFP4_RANGE  # as torch divides
    fitting = [x for x in (*around, largest) if torch.equal(x.reciprocal(), stored)]
    short = [x for x in fitting if _trailing_zeros(x) >= _SHORT]
    if short:
        return max(short, key=_trailing_zeros)
    return largest if torch.equal(largest.reciprocal(), stored) else nearest


def _trailing_zeros(x: Tensor) -> int:
    mantissa = int(x.reshape(1).view(torch.int32)) & 0x7FFFFF
    return 23 if mantissa == 0 else (mantissa & -mantissa).bit_length() - 1


def exact_amax(amax: Tensor) -> Tensor:
    """A largest magnitude, as large or larger by some units in the last place, whose NVFP4 global scale comes back from its
    stored reciprocal: so that a result in this layout stands for the weights that were solved for, bit for bit."""
    while True:
        scale = nvfp4_global_scale(amax)
        if torch.equal(inverse(scale.reciprocal()), scale):
            return amax
        amax = torch.nextafter(amax, torch.full_like(amax, torch.inf))


def config(pairs: Mapping[str, Pair], skipped: Sequence[str], heads: Sequence[str], cache: bool) -> dict[str, Any]:
    """The ``quantization_config``, which repeats ``hf_quant_config.json`` with the keys that config.json has."""
    algorithms = {name: str(algorithm_of(*pair)) for name, pair in pairs.items()}
    kinds = list(dict.fromkeys(algorithms.values()))
    groups = {
        f"group_{i}": _group(pair_of(kind), [n for n, k in algorithms.items() if k == kind], len(kinds) == 1)
        for i, kind in enumerate(kinds)
    }
    layers = {name: {"quant_algo": kind, **_group_size(kind)} for name, kind in algorithms.items()}
    return {
        "quant_method": "modelopt",
        "quant_algo": MIXED if len(kinds) > 1 else kinds[0],
        "producer": {"name": "qkit", "version": __version__},
        "config_groups": groups,
        **({"quantized_layers": layers} if len(kinds) > 1 else _group_size(kinds[0])),
        "ignore": sorted(skipped),
        **({"kv_cache_scheme": {"dynamic": False, "num_bits": 8, "type": "float"}} if cache else {}),
    }


def files(quantization: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """hf_quant_config.json, which says the same for older readers."""
    inner = {
        "quant_algo": quantization["quant_algo"],
        "kv_cache_quant_algo": "FP8" if "kv_cache_scheme" in quantization else None,
        **{key: quantization[key] for key in ("group_size", "quantized_layers") if key in quantization},
        "exclude_modules": quantization["ignore"],
    }
    return {FILE: {"producer": quantization["producer"], "quantization": inner}}


def _group_size(algorithm: str) -> dict[str, int]:
    weights = pair_of(algorithm)[0]
    size = weights.group or (weights.block[0] if weights.block else None)
    return {} if size is None else {"group_size": size}


def _group(pair: Pair, names: list[str], alone: bool) -> dict[str, Any]:
    """An entry of ``config_groups``, in the words of ModelOpt's own conversion."""
    weights, activations = pair

    def fields(fmt: Format) -> dict[str, Any]:
        size = {} if fmt.group is None else {"group_size": fmt.group}
        strategy = {"strategy": fmt.strategy} if fmt.strategy == "channel" else {}
        return {"dynamic": False, "num_bits": fmt.bits, "type": "float", **size, **strategy}

    inputs = {} if activations is None else {"input_activations": fields(activations)}
    return {**inputs, "weights": fields(weights), "targets": ["Linear"] if alone else sorted(names)}
