"""The check of ``quantization_config``: what it promises to an engine must agree with qkit.json.

Part of the independent proof (see ``verify.py``). The layout and its rules are those of compressed-tensors 0.20:
``QuantizationConfig``, ``QuantizationScheme`` and ``QuantizationArgs``, of which the last two forbid unknown keys.
Current loaders accept most wrong values in silence, which is why each one is checked here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from qkit.system.patterns import is_pattern, matched
from qkit.verification.record import (
    Findings,
    Record,
    RecordedLinear,
    as_object,
    is_int,
    is_text,
    is_version,
)
from qkit.verification.spec import Spec, spec_fault

METHODS = ("compressed-tensors", "qkit")
HIGHEST_MAJOR = 0  # of compressed-tensors releases so far
_ROOT = "config.json: quantization_config"

# packing -> the (kind, strategy, scale) it can hold
_INT_LAYOUTS = {("int", strategy, "model") for strategy in ("tensor", "channel", "group")}
_FP8_LAYOUTS = {("fp8", strategy, "model") for strategy in ("tensor", "channel", "group", "block")}
PACKINGS: dict[str, set[tuple[str, str, str]]] = {
    "pack-quantized": _INT_LAYOUTS,
    "int-quantized": _INT_LAYOUTS,
    "naive-quantized": _INT_LAYOUTS | _FP8_LAYOUTS,
    "float-quantized": _FP8_LAYOUTS,
    "nvfp4-pack-quantized": {("fp4", "tensor_group", "e4m3")},
    "mxfp4-pack-quantized": {("fp4", "group", "e8m0")},
    "mxfp8-quantized": {("fp8", "group", "e8m0")},
}
_KINDS = {("int", b): "int" for b in range(1, 9)} | {("float", 4): "fp4", ("float", 8): "fp8"}
_SCALES = {None: "model", "torch.float8_e4m3fn": "e4m3", "torch.uint8": "e8m0"}
_SCHEME_KEYS = {"targets", "weights", "input_activations", "output_activations", "format"}
_ARGS_REQUIRED = ("num_bits", "type", "strategy", "symmetric", "dynamic")
_ARGS_OPTIONAL = (
    "group_size",
    "block_structure",
    "actorder",
    "scale_dtype",
    "zp_dtype",
    "observer",
    "observer_kwargs",
)


class Patterns:
    """A list of targets or of names to ignore, under compressed-tensors' rule: the exact name of a module, 're:' and a
    regex matched from the start of the name, or a class name, of which only 'Linear' can match here.

    modules: all names that will be asked about. Raises ValueError for patterns that take too long to match."""

    def __init__(self, patterns: list[str], modules: Sequence[str]) -> None:
        self.exact = frozenset(p for p in patterns if not p.startswith("re:"))
        self.hits = frozenset[str]().union(*matched(patterns, modules).values())
        self.by_class = "Linear" in self.exact

    def name(self, module: str) -> bool:
        """Whether one of the patterns names the module ``module``, other than by its class."""
        return module in self.exact or module in self.hits


@dataclass(frozen=True)
class ConfigGroup:
    """One entry of ``config_groups``."""

    name: str
    packing: str
    targets: Patterns
    weights: Spec
    activations: Spec | None


@dataclass(frozen=True)
class QuantizationConfig:
    """The groups, the ignore list and the method of a ``quantization_config``."""

    method: str
    groups: tuple[ConfigGroup, ...]
    ignore: Patterns


def is_ignored(name: str, config: QuantizationConfig) -> bool:
    """Whether an engine leaves the linear ``name`` alone."""
    return config.ignore.by_class or config.ignore.name(name)


def find_groups(name: str, config: QuantizationConfig, by_name: bool = False) -> list[ConfigGroup]:
    """The groups that claim the linear ``name``: those that name it, else those that name its class. by_name: for one that is
    not of the class Linear."""
    named = [g for g in config.groups if g.targets.name(name)]
    return named or [g for g in config.groups if g.targets.by_class and not by_name]


# --- reading ------------------------------------------------------------------------------------------------------


def _args_fault(args: dict[str, Any], weight: bool) -> str | None:
    """The first thing wrong with the fields of a QuantizationArgs, apart from their combination."""
    missing = [key for key in _ARGS_REQUIRED if args.get(key) is None]
    unknown = sorted(set(args) - set(_ARGS_REQUIRED) - set(_ARGS_OPTIONAL))
    group, block, dynamic = args.get("group_size"), args.get("block_structure"), args.get("dynamic")
    local = args.get("strategy") == "tensor_group" and not weight
    pair = isinstance(block, list) and len(block) == 2 and all(is_int(n, 1) for n in block)
    actorder = args.get("actorder")
    faults = {
        f"without {', '.join(missing)}": bool(missing),
        f"unknown key {', '.join(unknown)}, which compressed-tensors refuses": bool(unknown),
        f"num_bits {args.get('num_bits')} of type {args.get('type')}": not is_int(args.get("num_bits"), 1)
        or (str(args.get("type")), args.get("num_bits")) not in _KINDS,
        f"symmetric {args.get('symmetric')}": not isinstance(args.get("symmetric"), bool),
        f"dynamic {dynamic}, expected {'local' if local else 'true or false'}": dynamic != "local"
        if local
        else not isinstance(dynamic, bool),
        f"group_size {group}": not (group in (None, -1) or is_int(group, 1)),
        f"group_size -1 with strategy {args.get('strategy')}": group == -1 and args.get("strategy") != "channel",
        f"block_structure {block}": block is not None and not pair,
        f"scale_dtype {args.get('scale_dtype')}": not isinstance(args.get("scale_dtype"), (str, type(None)))
        or args.get("scale_dtype") not in _SCALES,
        f"actorder {actorder}, which compressed-tensors removed (weight, static or nothing)": actorder is not None
        and (actorder not in ("weight", "static") or not weight),
        f"observer {args.get('observer')}": not (args.get("observer") is None or is_text(args["observer"])),
    }
    return next((fault for fault, wrong in faults.items() if wrong), None)


def _read_args(args: Any, weight: bool, where: str, findings: Findings) -> Spec | None:
    if not findings.check("config", isinstance(args, dict), where, "expected an object"):
        return None
    fault = _args_fault(args, weight)
    if not findings.check("config", fault is None, where, str(fault)):
        return None
    block = args.get("block_structure")
    group = args.get("group_size")
    spec = Spec(
        kind=_KINDS[args["type"], args["num_bits"]],
        bits=args["num_bits"],
        strategy=args["strategy"],
        group=None if group == -1 else group,
        block=tuple(block) if block else None,
        symmetric=args["symmetric"],
        scale=_SCALES[args.get("scale_dtype")],
        dynamic=bool(args["dynamic"]),
    )
    fault = spec_fault(spec, weight)
    return spec if findings.check("config", fault is None, where, str(fault)) else None


def _patterns(patterns: list[str], modules: Sequence[str], where: str, findings: Findings) -> Patterns:
    """With none of them where they take too long to match."""
    try:
        return Patterns(patterns, modules)
    except ValueError as error:
        findings.check("config", False, where, str(error))
        return Patterns([p for p in patterns if not p.startswith("re:")], modules)


def _read_group(name: str, data: Any, top: Any, modules: Sequence[str], findings: Findings) -> ConfigGroup | None:
    where = f"{_ROOT}.config_groups.{name}"
    if as_object(data, "config", where, findings) is None:
        return None
    unknown = sorted(set(data) - _SCHEME_KEYS)
    findings.check("config", not unknown, where, f"unknown key {', '.join(unknown)}, which compressed-tensors refuses")
    output = data.get("output_activations")
    findings.check("config", output is None, f"{where}.output_activations", "qkit quantizes no outputs: expected null")
    names = data.get("targets")
    targets = names if isinstance(names, list) and names and all(map(is_pattern, names)) else None
    fault = "expected a list of names, 're:' patterns or class names"
    findings.check("config", targets is not None, f"{where}.targets", fault)
    form = data.get("format") or (top if top != "mixed-precision" else None)
    packing = form if isinstance(form, str) and form in PACKINGS else None
    fault = f"found {form!r}, expected one of {', '.join(PACKINGS)}"
    findings.check("config", packing is not None, f"{where}.format", fault)
    weights = _read_args(data.get("weights"), True, f"{where}.weights", findings)
    acts, activations = data.get("input_activations"), None
    if acts is not None:
        activations = _read_args(acts, False, f"{where}.input_activations", findings)
    if targets is None or packing is None or weights is None or (acts is not None and activations is None):
        return None
    holds = (weights.kind, weights.strategy, weights.scale) in PACKINGS[packing]
    if not findings.check("config", holds, f"{where}.format", f"{packing} cannot hold {weights} weights"):
        return None
    wasteful = packing == "int-quantized" and weights.bits < 8 and activations is not None and activations.kind == "int"
    fault = f"int-quantized stores a byte per {weights.bits}-bit weight and takes the legacy path: use pack-quantized"
    findings.check("config", not wasteful, f"{where}.format", fault)
    return ConfigGroup(name, packing, _patterns(targets, modules, f"{where}.targets", findings), weights, activations)


def _check_top(data: dict[str, Any], record: Record, findings: Findings) -> None:
    def expect(key: str, ok: bool, fault: str) -> None:
        findings.check("config", ok, f"{_ROOT}.{key}", fault)

    version, status = data.get("version"), data.get("quantization_status")
    expect("quant_method", data.get("quant_method") in METHODS, f"found {data.get('quant_method')!r}")
    expect("quantization_status", status == "compressed", f"found {status!r}, expected 'compressed'")
    is_release = is_version(version) and int(str(version).split(".")[0]) <= HIGHEST_MAJOR
    expect("version", is_release, f"{version!r} is not a compressed-tensors release (they are {HIGHEST_MAJOR}.x)")
    recorded_version = record.compressed_tensors
    expect(
        "version",
        not is_release or recorded_version in (None, version),
        f"{version!r}, and qkit.json says {recorded_version}",
    )
    ignore = data.get("ignore")
    expect("ignore", isinstance(ignore, list) and all(map(is_pattern, ignore)), "expected a list of names")
    ratio = data.get("global_compression_ratio")
    expect("global_compression_ratio", ratio is None or isinstance(ratio, (int, float)), "expected a number or null")
    for key in ("sparsity_config", "transform_config"):
        expect(key, data.get(key) in (None, {}), "expected {}: qkit folds its transforms into the weights")
    cache = data.get("kv_cache_scheme")
    if isinstance(cache, dict) and cache.get("strategy") == "attn_head":
        cache = {
            **cache,
            "strategy": "tensor",
        }  # a scale for each head, which ``kv_cache`` looks at, is for caches alone
    if cache is not None:
        _read_args(cache, False, f"{_ROOT}.kv_cache_scheme", findings)
    sparse = sorted(linear.name for linear in record.linears.values() if linear.sparse)
    expect("sparse", (data.get("sparse") or []) == sparse, f"expected the {len(sparse)} linears with a sparse part")
    low_rank = sorted(linear.name for linear in record.linears.values() if linear.rank)
    expect(
        "low_rank",
        (data.get("low_rank") or []) == low_rank,
        f"expected the {len(low_rank)} linears with a low-rank part",
    )
    rotated = {linear.name: linear.rotation for linear in record.linears.values() if linear.rotation}
    expect("rotated", (data.get("rotated") or {}) == rotated, f"expected the {len(rotated)} linears with turned inputs")
    scaled = sorted(linear.name for linear in record.linears.values() if linear.scaled)
    expect("scaled", (data.get("scaled") or []) == scaled, f"expected the {len(scaled)} linears with scaled inputs")
    residual = sorted(linear.name for linear in record.linears.values() if linear.residual)
    expect(
        "residual",
        (data.get("residual") or []) == residual,
        f"expected the {len(residual)} linears with residual channels",
    )
    needs_qkit = bool(sparse or low_rank or rotated or scaled or residual)
    expect(
        "quant_method",
        not needs_qkit or data.get("quant_method") == "qkit",
        "no other loader knows what is special here",
    )


def read_quantization(config: dict[str, Any], record: Record, findings: Findings) -> QuantizationConfig | None:
    """The ``quantization_config`` of config.json; None, with problems recorded, when there is none to use."""
    data = as_object(config.get("quantization_config"), "config", _ROOT, findings)
    if data is None:
        return None
    _check_top(data, record, findings)
    top = data.get("format")
    is_packing = isinstance(top, str) and (top in PACKINGS or top == "mixed-precision")
    findings.check("config", is_packing, f"{_ROOT}.format", f"found {top!r}, expected one of {', '.join(PACKINGS)}")
    groups = as_object(data.get("config_groups"), "config", f"{_ROOT}.config_groups", findings)
    if groups is None:
        return None
    plain_modules = (name.rpartition(".")[0] for name in record.plain)
    modules = sorted({*record.linears, *record.skipped, *plain_modules})
    parsed_groups = [_read_group(name, group, top, modules, findings) for name, group in groups.items()]
    packings = {group.packing for group in parsed_groups if group}
    expected = "mixed-precision" if len(packings) > 1 else next(iter(packings), top)
    findings.check("config", top == expected, f"{_ROOT}.format", f"found {top!r}, the groups make it {expected!r}")
    ignore = data.get("ignore")
    patterns = [p for p in ignore if is_pattern(p)] if isinstance(ignore, list) else []
    ignored = _patterns(patterns, modules, f"{_ROOT}.ignore", findings)
    return QuantizationConfig(str(data.get("quant_method")), tuple(g for g in parsed_groups if g), ignored)


# --- against the record -------------------------------------------------------------------------------------------


def resolve(config: QuantizationConfig, record: Record, findings: Findings) -> dict[str, ConfigGroup]:
    """The one group of each linear. Records a problem for linears with none or several, and for disagreement with
    qkit.json."""
    groups: dict[str, ConfigGroup] = {}
    for linear in record.linears.values():
        claims = find_groups(linear.name, config, by_name=bool(linear.uses))
        claimants = ", ".join(g.name for g in claims) or "no group"
        where = f"{_ROOT}: {linear.name}"
        if findings.check("config", len(claims) == 1, where, f"is claimed by {claimants}, expected exactly one group"):
            groups[linear.name] = claims[0]
        findings.check("config", not is_ignored(linear.name, config), where, "is quantized, and ignore lists it")
    for group in config.groups:
        members = [record.linears[name] for name, g in groups.items() if g.name == group.name]
        where = f"{_ROOT}.config_groups.{group.name}"
        findings.check("config", len(members) > 0, where, "no quantized linear belongs to it")
        _compare(members, "weights", group.weights, [m.format for m in members], where, findings)
        _compare(members, "input_activations", group.activations, [m.activations for m in members], where, findings)
    for name in (n for n in record.skipped if n not in record.plain):  # others are parameters, no layers
        where = f"{_ROOT}.ignore"
        findings.check("config", is_ignored(name, config), where, f"does not cover {name}, which was skipped")
    return groups


def _compare(
    members: list[RecordedLinear],
    part: str,
    config_spec: Spec | None,
    recorded_specs: list[Spec | None],
    where: str,
    findings: Findings,
) -> None:
    """One problem for each way in which members of a group differ from what the config says of it."""
    findings.checks["config"] += len(members)
    for recorded in {spec: None for spec in recorded_specs if spec != config_spec}:
        names = [m.name for m, spec in zip(members, recorded_specs, strict=True) if spec == recorded]
        fault = f"says {config_spec}, and qkit.json says {recorded} for {len(names)} linears, first {names[0]}"
        findings.check("config", False, f"{where}.{part}", fault)
