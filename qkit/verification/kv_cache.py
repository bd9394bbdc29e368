"""The check of the KV cache of a packed folder: its policy in qkit.json, and the static scales that engines read.

Part of the independent proof (see ``verify.py``). An engine that finds no scale for a layer uses 1, with one warning at the
most, so each is looked for here: under ``kv_cache_scheme`` every attention module has to have its ``k_scale`` and its
``v_scale``, and no other tensor may be called that.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qkit.verification.decode import FLOATS, StoredTensor
from qkit.verification.record import Fields, Findings, Record, check_fields, is_int, short

_CACHE: Fields = {
    "kind": (
        lambda v: v in ("progressive", "kivi", "rtn", "rotate", "hierarchical", "xquant", "xquant-cl", "fp"),
        "the kind of a KV cache",
    ),
    "widths": (
        lambda v: isinstance(v, list) and bool(v) and all(w in (2, 3, 4, 8) for w in v),
        "a list of 2, 3, 4 or 8",
    ),
    "group": (lambda v: is_int(v, 8), "a number from 8"),
    "sink": (lambda v: is_int(v, 0), "a number of tokens"),
    "window": (lambda v: is_int(v, 0), "a number of tokens"),
}
_SCHEME = {"num_bits": 8, "type": "float", "strategy": "tensor", "symmetric": True, "dynamic": False}
_SCHEME_MODELOPT = ("num_bits", "type", "dynamic")
_PROJECTIONS = ("k_proj", "v_proj", "qkv_proj")
_SCALES = ("k_scale", "v_scale")


def check_cache(
    record: Record, config: Mapping[str, Any], store: Mapping[str, StoredTensor], findings: Findings
) -> None:
    """Checks the cache policy (as plain data; whether ``qkit.load`` accepts it is not asked here), the scheme and the
    scales."""
    data = record.cache
    has_policy = data is not None and check_fields(data, _CACHE, "qkit.json: kv", findings)
    if has_policy:
        _check_policy(data, findings)
    quantization = config.get("quantization_config")
    scheme = quantization.get("kv_cache_scheme") if isinstance(quantization, dict) else None
    has_scales = has_policy and data["kind"] == "fp"
    where = "config.json: quantization_config.kv_cache_scheme"
    fault = f"found {short(scheme)}, and the cache of qkit.json {'has' if has_scales else 'has no'} static FP8 scales"
    findings.check("cache", has_scales == (scheme is not None), where, fault)
    modelopt = isinstance(quantization, dict) and quantization.get("quant_method") == "modelopt"
    if isinstance(scheme, dict):
        for key, value in {k: v for k, v in _SCHEME.items() if not modelopt or k in _SCHEME_MODELOPT}.items():
            mismatch = scheme.get(key)
            findings.check(
                "cache", mismatch == value, f"{where}.{key}", f"found {short(mismatch)}, expected {short(value)}"
            )
    linears = [name.rpartition(".") for name in (*record.linears, *record.skipped)]
    modules = sorted({parent for parent, _, leaf in linears if leaf in _PROJECTIONS}) if scheme is not None else []
    inside = (
        {"k_scale": "k_proj.", "v_scale": "v_proj."} if modelopt else {}
    )  # ModelOpt stores them with the projections
    scale_names = {f"{module}.{inside.get(scale, '')}{scale}" for module in modules for scale in _SCALES}
    for name in sorted({*scale_names, *(n for n in store if n.rpartition(".")[2] in _SCALES)}):
        if not findings.check("cache", name in store, name, "is missing: engines take 1 for it"):
            continue
        stored = store[name]
        where = f"{stored.path.name}: {name}"
        findings.check(
            "cache", name in scale_names, where, "is a scale of a KV cache that config.json does not ask for"
        )
        shaped = stored.dtype in FLOATS and stored.shape == (1,)
        mismatch = f"found {stored.dtype} {list(stored.shape)}, expected {' or '.join(FLOATS)} [1]"
        if findings.check("cache", shaped, where, mismatch):
            value = float(stored.float32()[0])
            findings.check("cache", 0 < value < float("inf"), where, f"is {value}, expected a positive number")


def _check_policy(data: dict[str, Any], findings: Findings) -> None:
    for key in ("finals", "budgets"):
        numbers = data.get(key)
        sound = numbers is None or (isinstance(numbers, list) and all(is_int(x, 1) for x in numbers))
        findings.check("record", sound, f"qkit.json: kv.{key}", f"found {short(numbers)}, expected a list of numbers")
    is_complete = data["kind"] != "progressive" or (bool(data.get("budgets")) and is_int(data.get("length"), 1))
    findings.check("record", is_complete, "qkit.json: kv", "a progressive cache without budgets and a length")
