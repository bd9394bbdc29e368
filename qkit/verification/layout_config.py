"""The check of ``quantization_config`` of GPTQ, AWQ, ModelOpt and MLX: what it says of each linear must agree with qkit.json.

Part of the independent proof (see ``verify.py``). The keys are those that vLLM 0.32, transformers 5.24 and
mlx_lm 0.32 read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from qkit.system.patterns import is_pattern, matched
from qkit.verification.layouts import AWQ, GPTQ, GPTQ_V2, MLX, MODELOPT
from qkit.verification.quantization_config import ConfigGroup, Patterns, QuantizationConfig
from qkit.verification.record import Findings, Record, RecordedLinear, is_int, read_json, short
from qkit.verification.spec import Spec

METHODS = ("gptq", "awq", "modelopt", "mlx")
_ROOT = "config.json: quantization_config"
_FILES = {"gptq": "quantize_config.json", "modelopt": "hf_quant_config.json"}

_FP8_TENSOR = Spec(
    kind="fp8", bits=8, strategy="tensor", group=None, block=None, symmetric=True, scale="model", dynamic=False
)
_TOKEN = replace(_FP8_TENSOR, strategy="token", dynamic=True)
_GROUP = replace(_FP8_TENSOR, strategy="group", group=128, dynamic=True)
_NVFP4 = replace(_FP8_TENSOR, kind="fp4", bits=4, strategy="tensor_group", group=16, scale="e4m3")
_MXFP8 = replace(_FP8_TENSOR, strategy="group", group=32, scale="e8m0")
_MXFP4 = replace(_MXFP8, kind="fp4", bits=4)
_ALGORITHMS: dict[str, tuple[Spec, Spec | None]] = {
    "NVFP4": (_NVFP4, replace(_NVFP4, dynamic=True)),
    "W4A16_NVFP4": (_NVFP4, None),
    "FP8": (_FP8_TENSOR, _FP8_TENSOR),
    "FP8_PER_CHANNEL_PER_TOKEN": (replace(_FP8_TENSOR, strategy="channel"), _TOKEN),
    "FP8_PB_WO": (replace(_FP8_TENSOR, strategy="block", block=(128, 128)), _GROUP),
    "MXFP8": (_MXFP8, replace(_MXFP8, dynamic=True)),
}


def method_of(config: Mapping[str, Any] | None) -> str | None:
    """The layout that config.json names, where it is one of METHODS."""
    quantization = (config or {}).get("quantization_config")
    method = quantization.get("quant_method") if isinstance(quantization, dict) else None
    return method if method in METHODS else None


def read_layout(
    out: Path, config: Mapping[str, Any], record: Record, findings: Findings
) -> tuple[QuantizationConfig, dict[str, ConfigGroup]]:
    """The groups that the config makes of all linears, and the one of each linear of the record."""
    data: dict[str, Any] = config["quantization_config"]
    method = str(data["quant_method"])
    names = [*record.linears, *record.skipped]
    says = {"gptq": _gptq, "awq": _awq, "modelopt": _modelopt, "mlx": _mlx}[method](data, record, names, findings)
    _check_beside(out, method, data, findings)
    if method == "mlx":
        _check_twin(config, findings)
    by_kind: dict[tuple[str, Spec, Spec | None], list[str]] = {}
    for name, linear in record.linears.items():
        found = says.get(name)
        fault = "is quantized, and the config says that it is not"
        if not findings.check("config", found is not None, f"{_ROOT}: {name}", fault) or found is None:
            continue
        _compare(linear, *found, findings)
        misfit = _misfit(linear, found[0])
        if findings.check("config", misfit is None, f"{_ROOT}: {name}", f"{misfit}, which {method} has no place for"):
            by_kind.setdefault((found[0], linear.format, linear.activations), []).append(name)
    for name in record.skipped:
        fault = "is not quantized, and the config says that it is"
        findings.check("config", name not in says, f"{_ROOT}: {name}", fault)
    groups, members = [], dict[str, ConfigGroup]()
    for i, ((packing, weights, activations), listed) in enumerate(by_kind.items()):
        group = ConfigGroup(f"{method}_{i}", packing, Patterns(listed, []), weights, activations)
        groups.append(group)
        members |= dict.fromkeys(listed, group)
    return QuantizationConfig(method, tuple(groups), Patterns([*record.skipped], [])), members


Says = dict[str, tuple[str, Spec, Spec | None]]  # {linear: (packing, weights, inputs)} of the quantized ones


def _compare(linear: RecordedLinear, packing: str, weights: Spec, inputs: Spec | None, findings: Findings) -> None:
    """A file that stores zero points also holds linears that need none: their zero points are looked at."""
    recorded = replace(linear.format, symmetric=weights.symmetric) if linear.format.symmetric else linear.format
    fault = f"says {weights}, and qkit.json says {linear.format}"
    findings.check("config", recorded == weights, f"{_ROOT}: {linear.name}", fault)
    fault = f"says {inputs} of its inputs, and qkit.json says {linear.activations}"
    findings.check("config", linear.activations == inputs, f"{_ROOT}: {linear.name}", fault)


def _misfit(linear: RecordedLinear, packing: str) -> str | None:
    """What of a recorded weight the layout cannot hold, or None."""
    spec, (rows, columns) = linear.format, linear.shape
    if packing == MODELOPT:
        cut = spec.block is not None and (rows % spec.block[0] or columns % spec.block[1])
        return f"blocks over {rows}x{columns} weights" if cut else None
    if packing == MLX and spec.scale == "e8m0":
        return None
    if packing == MLX:
        fits = spec.kind == "int" and spec.bits in (2, 3, 4, 5, 6, 8) and spec.group in (32, 64, 128)
        return None if fits else str(spec)
    if spec.kind != "int" or spec.strategy not in ("group", "channel"):
        return str(spec)
    words = (
        rows % 8 == 0 and spec.bits == 4 if packing == AWQ else not (rows * spec.bits % 32 or columns * spec.bits % 32)
    )
    known = spec.bits in (2, 3, 4, 8)
    return None if words and known else f"{rows}x{columns} weights of {spec.bits} bits"


def _integers(bits: int, group: int, symmetric: bool) -> Spec:
    strategy = "channel" if group == -1 else "group"
    size = None if group == -1 else group
    return Spec(
        kind="int",
        bits=bits,
        strategy=strategy,
        group=size,
        block=None,
        symmetric=symmetric,
        scale="model",
        dynamic=False,
    )


def _expect(data: Mapping[str, Any], values: Mapping[str, Any], findings: Findings) -> None:
    for key, value in values.items():
        found = data.get(key)
        same = found == value and type(found) is type(value)
        findings.check("config", same, f"{_ROOT}.{key}", f"found {short(found)}, expected {short(value)}")


def _numbers(data: Mapping[str, Any], where: str, findings: Findings) -> tuple[int, int] | None:
    """(bits, group) of an object; None, with a problem, where it has none."""
    bits, group = data.get("bits"), data.get("group_size")
    sound = is_int(bits, 2) and (group == -1 or is_int(group, 1))
    findings.check("config", sound, where, f"bits {short(bits)} and group_size {short(group)}, expected numbers")
    return (int(str(bits)), int(str(group))) if sound else None


def _gptq(data: dict[str, Any], record: Record, names: Sequence[str], findings: Findings) -> Says:
    _expect(data, {"desc_act": False}, findings)
    version, symmetric = data.get("checkpoint_format"), data.get("sym")
    sound = version in (GPTQ, GPTQ_V2) and data.get("format", version) == version
    findings.check("config", sound, f"{_ROOT}.checkpoint_format", f"found {short(version)}, expected gptq or gptq_v2")
    findings.check("config", isinstance(symmetric, bool), f"{_ROOT}.sym", f"found {short(symmetric)}")
    whole = _numbers(data, _ROOT, findings)
    rules = data.get("dynamic") or {}
    where = f"{_ROOT}.dynamic"
    if whole is None or not findings.check("config", isinstance(rules, dict), where, "expected an object"):
        return {}
    heads = {name for name in names if "head" in _uses(record, name)}
    says: Says = {}
    hits = _hits(rules, names, findings)
    for name in names:
        rule = next((key for key in rules if name in hits.get(key, ())), None)
        if (rule or "").startswith("-:") or (name in heads and data.get("lm_head") is not True):
            continue
        numbers = whole
        if rule is not None:
            asked = {"bits": whole[0], "group_size": whole[1], **rules[rule]}
            numbers = _numbers(asked, f"{where}: {rule[:60]}", findings) or whole
        says[name] = (str(version), _integers(*numbers, symmetric is True), None)
    return says


def _uses(record: Record, name: str) -> tuple[str, ...]:
    """What a matrix outside the blocks is for, of a quantized one as recorded, of another by its place."""
    if name in record.linears:
        return record.linears[name].uses
    return () if any(part.isdigit() for part in name.split(".")) else ("head",)


def _hits(rules: Mapping[str, Any], names: Sequence[str], findings: Findings) -> dict[str, frozenset[str]]:
    patterns = {key: "re:" + key.removeprefix("+:").removeprefix("-:") for key in rules}
    for key, pattern in patterns.items():
        findings.check("config", is_pattern(pattern), f"{_ROOT}.dynamic: {key[:60]}", "is no regular expression")
        findings.check("config", isinstance(rules[key], dict), f"{_ROOT}.dynamic: {key[:60]}", "expected an object")
    try:
        found = matched([p for p in patterns.values() if is_pattern(p)], names)
    except ValueError as error:
        findings.check("config", False, f"{_ROOT}.dynamic", str(error))
        return {}
    return {key: found.get(pattern, frozenset()) for key, pattern in patterns.items() if isinstance(rules[key], dict)}


def _awq(data: dict[str, Any], record: Record, names: Sequence[str], findings: Findings) -> Says:
    _expect(data, {"version": "gemm", "zero_point": True, "bits": 4}, findings)
    whole, plain = _numbers(data, _ROOT, findings), data.get("modules_to_not_convert") or []
    where = f"{_ROOT}.modules_to_not_convert"
    listed = isinstance(plain, list) and all(isinstance(name, str) for name in plain)
    if whole is None or not findings.check("config", listed, where, "expected a list of names"):
        return {}
    # Loaders look for these names inside the name of a layer.
    quantized = [name for name in names if not any(part in name for part in plain)]
    return {name: (AWQ, _integers(*whole, symmetric=False), None) for name in quantized}


def _modelopt(data: dict[str, Any], record: Record, names: Sequence[str], findings: Findings) -> Says:
    whole, ignore = data.get("quant_algo"), data.get("ignore")
    plain = [name for name in ignore if isinstance(name, str)] if isinstance(ignore, list) else []
    listed = isinstance(ignore, list) and len(plain) == len(ignore)
    if not findings.check("config", listed, f"{_ROOT}.ignore", "expected a list of names"):
        return {}
    layers = data.get("quantized_layers") if whole == "MIXED_PRECISION" else None
    where = f"{_ROOT}.quant_algo"
    if layers is None:
        known = findings.check("config", whole in _ALGORITHMS, where, f"found {short(whole)}")
        algorithms = dict.fromkeys([n for n in names if n not in plain], str(whole)) if known else {}
    else:
        where = f"{_ROOT}.quantized_layers"
        sound = isinstance(layers, dict) and all(isinstance(x, dict) for x in layers.values())
        if not findings.check("config", sound, where, "expected an object of objects"):
            return {}
        algorithms = {name: str(layer.get("quant_algo")) for name, layer in layers.items()}
        for name, text in algorithms.items():
            findings.check("config", text in _ALGORITHMS, f"{where}.{name}", f"found {short(text)}")
    return {n: (MODELOPT, *_ALGORITHMS[text]) for n, text in algorithms.items() if text in _ALGORITHMS}


def _mlx(data: dict[str, Any], record: Record, names: Sequence[str], findings: Findings) -> Says:
    """The setting of the file for each layer that has no entry of its own; ``false``: not quantized."""
    says: Says = {}
    for name in names:
        entry = data.get(name, data)
        where = f"{_ROOT}.{name}" if name in data else _ROOT
        if entry is False or not findings.check("config", isinstance(entry, dict), where, f"found {short(entry)}"):
            continue
        mode, numbers = entry.get("mode"), _numbers(entry, where, findings)
        spec = {"mxfp4": _MXFP4, "mxfp8": _MXFP8}.get(str(mode))
        known = mode == "affine" or (spec is not None and numbers == (spec.bits, spec.group))
        if findings.check("config", known, f"{where}.mode", f"found {short(mode)} with {numbers}") and numbers:
            # Whether there are zero points is said by the biases alone, which the decoder looks at.
            symmetric = name not in record.linears or record.linears[name].format.symmetric
            says[name] = (MLX, spec or _integers(*numbers, symmetric), None)
    return says


def _check_twin(config: Mapping[str, Any], findings: Findings) -> None:
    """mlx_lm reads the key ``quantization``, which says the same."""
    expected = {key: value for key, value in config["quantization_config"].items() if key != "quant_method"}
    found = config.get("quantization")
    fault = f"found {short(found)}, and quantization_config says {short(expected)}"
    findings.check("config", found == expected, "config.json: quantization", fault)


def _check_beside(out: Path, method: str, data: Mapping[str, Any], findings: Findings) -> None:
    """The file beside config.json, for older readers, says the same."""
    name = _FILES.get(method)
    content = None if name is None else read_json(out / name, findings)
    if name is None or content is None:
        return
    if method == "gptq":
        findings.check("config", content == dict(data), name, "differs from quantization_config in config.json")
        return
    inner = content.get("quantization")
    inner = inner if isinstance(inner, dict) else {}
    cache = "FP8" if data.get("kv_cache_scheme") is not None else None
    expected = {
        "quant_algo": data.get("quant_algo"),
        "exclude_modules": data.get("ignore"),
        "kv_cache_quant_algo": cache,
    }
    expected |= {key: data[key] for key in ("group_size", "quantized_layers") if key in data}
    for key, value in expected.items():
        fault = f"found {short(inner.get(key))}, and config.json says {short(value)}"
        findings.check("config", inner.get(key) == value, f"{name}: quantization.{key}", fault)
