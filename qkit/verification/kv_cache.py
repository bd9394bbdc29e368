"""The check of the KV cache of a packed folder: its policy in qkit.json, and the static scales that engines read.

Part of the independent proof (see ``verify.py``). An engine that finds no scale for a layer uses 1, with one warning at the
most, so each is looked for here: under ``kv_cache_scheme`` every attention module has to have a scale for its keys and one for
its values, in the shape that the scheme says, and no other tensor may be called that.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from qkit.verification.decode import FLOATS, StoredTensor
from qkit.verification.record import Fields, Findings, Record, as_object, check_fields, is_int, short
from qkit.verification.relations import config_value

_STATIC = ("fp", "fp-head", "nvfp")  # with scales in the checkpoint
_CACHE: Fields = {
    "kind": (
        lambda v: v in ("progressive", "kivi", "rtn", "rotate", "hierarchical", "xquant", "xquant-cl", *_STATIC),
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
_FP8 = {"num_bits": 8, "type": "float", "strategy": "tensor", "symmetric": True, "dynamic": False}
_SCHEMES: dict[str, dict[str, Any]] = {
    "fp": _FP8,
    "fp-head": {**_FP8, "strategy": "attn_head"},
    "nvfp": {**_FP8, "num_bits": 4, "strategy": "tensor_group", "group_size": 16, "dynamic": "local"},
}
_SCHEME_MODELOPT = ("num_bits", "type", "dynamic")
_SERVED = ("auto", "fp8", "fp8_e5m2", "fp8_per_token_head", "int8_per_token_head", "nvfp4", "int4_per_token_head")
_PROJECTIONS = ("k_proj", "v_proj", "qkv_proj")
_ALL_SCALES = ("k_scale", "v_scale", "k_global_scale", "v_global_scale")


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
    kind = data["kind"] if has_policy else ""
    has_scales = kind in _STATIC
    where = "config.json: quantization_config.kv_cache_scheme"
    fault = f"found {short(scheme)}, and the cache of qkit.json {'has' if has_scales else 'has no'} static scales"
    findings.check("cache", has_scales == (scheme is not None), where, fault)
    modelopt = isinstance(quantization, dict) and quantization.get("quant_method") == "modelopt"
    if isinstance(scheme, dict):
        expected = _SCHEMES.get(kind, _FP8)
        for key, value in {k: v for k, v in expected.items() if not modelopt or k in _SCHEME_MODELOPT}.items():
            mismatch = scheme.get(key)
            findings.check(
                "cache", mismatch == value, f"{where}.{key}", f"found {short(mismatch)}, expected {short(value)}"
            )
    _check_serving(record.serving, config, findings)
    modules = _attentions(record, store) if scheme is not None else []
    suffixes = _ALL_SCALES[2:] if kind == "nvfp" else _ALL_SCALES[:2]
    dtypes, shape = _storage(kind, config)
    # ModelOpt stores them with the projections.
    inside = {"k_scale": "k_proj.", "v_scale": "v_proj."} if modelopt else {}
    scale_names = {f"{module}.{inside.get(scale, '')}{scale}" for module in modules for scale in suffixes}
    for name in sorted({*scale_names, *(n for n in store if n.rpartition(".")[2] in _ALL_SCALES)}):
        if not findings.check("cache", name in store, name, "is missing: engines take 1 for it"):
            continue
        stored = store[name]
        where = f"{stored.path.name}: {name}"
        findings.check(
            "cache", name in scale_names, where, "is a scale of a KV cache that config.json does not ask for"
        )
        shaped = stored.dtype in dtypes and stored.shape == shape
        mismatch = f"found {stored.dtype} {list(stored.shape)}, expected {' or '.join(dtypes)} {list(shape)}"
        if findings.check("cache", shaped, where, mismatch):
            bad = [float(x) for x in stored.float32().flatten() if not 0 < x < float("inf")]
            findings.check("cache", not bad, where, f"is {bad[:1]}, expected a positive number")


def _attentions(record: Record, store: Mapping[str, StoredTensor]) -> list[str]:
    """The attention modules that need scales: those that have some and all like them in other layers, for a model may have
    others in the towers beside its language model; all, where none has any."""
    linears = [name.rpartition(".") for name in (*record.linears, *record.skipped)]
    modules = sorted({parent for parent, _, leaf in linears if leaf in _PROJECTIONS})
    scaled = {_pattern(n.rpartition(".")[0]) for n in store if n.rpartition(".")[2] in _ALL_SCALES}
    return [m for m in modules if _pattern(m) in scaled] or modules


def _pattern(module: str) -> str:
    return re.sub(r"\d+", "#", module)


def _check_serving(data: Any, config: Mapping[str, Any], findings: Findings) -> None:
    """The cache that was chosen by measuring, where one was."""
    if data is None:
        return
    where = "qkit.json: serving"
    chosen = data.get("chosen") if isinstance(data, dict) else None
    chosen = as_object(chosen, "record", f"{where}.chosen", findings)
    if chosen is None:
        return
    dtype, skip, layers = chosen.get("dtype"), chosen.get("skip"), config_value(config, "num_hidden_layers")
    findings.check(
        "record", dtype in _SERVED, f"{where}.chosen.dtype", f"found {short(dtype)}, which vLLM does not know"
    )
    sound = isinstance(skip, list) and all(is_int(i) and (not is_int(layers) or i < layers) for i in skip)
    findings.check("record", sound, f"{where}.chosen.skip", f"found {short(skip)}, expected layers of the model")
    context = data.get("context")
    findings.check(
        "record", is_int(context, 2), f"{where}.context", f"found {short(context)}, expected a number of tokens"
    )


def _storage(kind: str, config: Mapping[str, Any]) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """(dtypes, shape) of a scale."""
    heads = config_value(config, "num_key_value_heads")
    if kind == "fp-head" and is_int(heads, 1):
        return FLOATS, (heads, 1, 1)
    return ("F32",) if kind == "nvfp" else FLOATS, (1,)


def _check_policy(data: dict[str, Any], findings: Findings) -> None:
    for key in ("finals", "budgets"):
        numbers = data.get(key)
        sound = numbers is None or (isinstance(numbers, list) and all(is_int(x, 1) for x in numbers))
        findings.check("record", sound, f"qkit.json: kv.{key}", f"found {short(numbers)}, expected a list of numbers")
    is_complete = data["kind"] != "progressive" or (bool(data.get("budgets")) and is_int(data.get("length"), 1))
    findings.check("record", is_complete, "qkit.json: kv", "a progressive cache without budgets and a length")
