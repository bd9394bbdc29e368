"""The scales of a KV cache: what the config promises, which tensors are there, and whether an engine takes their names."""

from __future__ import annotations

import re
from typing import Any

import torch

from qkit.diagnosis.findings import Findings
from qkit.diagnosis.opened import Opened
from qkit.files.safefile import TensorInfo, read_tensor

_SCALE = re.compile(
    r"(.+?)\.(?:(?:[kv]_proj|qkv_proj|attn|[kv]_cache|key|value|kv_b_proj|kv_a_proj_with_mqa)\.)?(k|v|kv)(?:_cache)?(?:_scale|_scaling_factor|\.scale|_output_scale)$"
)
_OUTPUT = re.compile(r"(.+)\.([kv])_proj\.output_scale$")
# What vLLM 0.32 gives to its attention layers (maybe_remap_kv_scale_name).
_TAKEN = re.compile(
    r"\.self_attn\.[kv]_proj\.[kv]_scale$|\.self_attn\.qkv_proj\.[kv]_scale$|\.mixer\.[kv]_proj\.[kv]_scale$"
    r"|\.[kv]_cache\.scale$|\.kv_scale$|\.(?:self_attn|attn|attention|mixer|mla_attn|linear_attn)\.[kvq]_scale$|\.attn\.[kv]_scale$"
)
_PROJECTIONS = ("k_proj", "qkv_proj", "kv_b_proj", "Wqkv", "query_key_value")
_CALIBRATE = "calibrate the cache again"


def check_cache(opened: Opened, findings: Findings) -> None:
    """Compare the config with the scales that are there."""
    scheme = _scheme(opened)
    scales = _scales(opened)
    if scheme is None:
        if scales:
            findings.warn(
                "KV scales", sorted(scales), "scales of a KV cache are there, and the config says nothing of it: engines leave "
                "them out", "kv_cache_scheme or kv_cache_quant_algo", "add it to the config, or remove the tensors", 3,
            )  # fmt: skip
        return
    modules = _attention(opened)
    found: dict[str, set[str]] = {m: set() for m in modules}
    for name in scales:
        match = _SCALE.match(name) or _OUTPUT.match(name)
        if match is not None:
            found.setdefault(match[1], set()).update(("k", "v") if match[2] == "kv" else (match[2],))
    missing = {f"{m}.{side}_scale" for m in modules for side in ("k", "v") if side not in found[m]}
    if missing and opened.complete:
        every = len(missing) == 2 * len(modules)
        findings.fault(
            "KV scales", sorted(missing), f"{'none of' if every else 'some of'} the scales of the KV cache are there"
            f" ({len(missing)} of {2 * len(modules)} are missing): engines take 1 for them",
            f"k_scale and v_scale of each attention, as the config says ({scheme})", _CALIBRATE, 8,
        )  # fmt: skip
    strange = [n for n in scales if not _TAKEN.search(n)]
    if strange:
        findings.fault(
            "KV scales", strange, "the engine does not know the scale by this name, and takes 1 for it",
            "NAME.self_attn.k_scale and v_scale", "rename the tensors", 8,
        )  # fmt: skip
    _check_values(scales, findings)


def _scheme(opened: Opened) -> str | None:
    """What the config says of a cache with static scales; None for none."""
    quantization = opened.quantization
    scheme = quantization.get("kv_cache_scheme")
    if isinstance(scheme, dict):
        return None if scheme.get("dynamic") else f"kv_cache_scheme of {scheme.get('num_bits')} bits"
    if isinstance(scheme, str) and scheme:
        return f"kv_cache_scheme {scheme}"
    inner = opened.beside.get("hf_quant_config.json", {}).get("quantization")
    for source in (quantization, inner if isinstance(inner, dict) else {}):
        algorithm = source.get("kv_cache_quant_algo")
        if isinstance(algorithm, str) and algorithm:
            return f"kv_cache_quant_algo {algorithm}"
    return None


def _scales(opened: Opened) -> dict[str, TensorInfo]:
    return {
        name: info
        for name, info in opened.tensors.items()
        if (_SCALE.match(name) or _OUTPUT.match(name)) and not name.endswith((".weight_scale", ".input_scale"))
    }


def _attention(opened: Opened) -> list[str]:
    """The modules that have keys, by the names of their projections."""
    owners = {name.rpartition(".")[0] for name in opened.tensors}
    return sorted({o.rpartition(".")[0] for o in owners if o.rpartition(".")[2] in _PROJECTIONS and "vis" not in o})


def _check_values(scales: dict[str, TensorInfo], findings: Findings) -> None:
    values: dict[str, Any] = {name: read_tensor(info).to(torch.float32) for name, info in scales.items()}
    wrong = [n for n, v in values.items() if not bool((v.isfinite() & (v > 0)).all())]
    if wrong:
        first = float(values[wrong[0]].flatten()[0])
        findings.fault("KV scales", wrong, f"the scale is {first:g}", "a positive number", _CALIBRATE, 9)
    ones = [n for n, v in values.items() if bool((v == 1).all())]
    if ones and len(ones) == len(values):
        findings.warn(
            "KV scales", ones, "all scales of the KV cache are 1: they were never calibrated", "the largest key or value / 448",
            _CALIBRATE, 5,
        )  # fmt: skip
    elif ones:
        findings.warn(
            "KV scales", ones, "the scale is exactly 1, and others are not", "a calibrated scale", _CALIBRATE, 4
        )
