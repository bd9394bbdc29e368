"""The config of compressed-tensors against the tensors: which group each layer belongs to, and whether its tensors are so."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from qkit.diagnosis.expected import Expected, weight_names
from qkit.diagnosis.findings import Findings
from qkit.diagnosis.layers import Layer, count
from qkit.diagnosis.opened import Opened, said
from qkit.errors import QkitError
from qkit.files.safefile import read_tensor, shown
from qkit.system.patterns import is_pattern, matched
from qkit.tensor import compressed_tensors as ct
from qkit.tensor.formats import Format
from qkit.tensor.packing import packed_words
from qkit.tensor.qtensor import param_shape

_CONFIG = "get the config of this file, or quantize again"
_CLASS = "Linear"


@dataclass
class Groups:
    """What config_groups say. of: {layer: label of its group}; named: layers that a target names, other than by class; parsed:
    {label: (weights, activations, format)}; ignored: names that the ignore list covers"""

    of: dict[str, str] = field(default_factory=dict)
    parsed: dict[str, tuple[Format, Format | None, str]] = field(default_factory=dict)
    ignored: set[str] = field(default_factory=set)
    named: set[str] = field(default_factory=set)


def read_groups(opened: Opened, findings: Findings) -> Groups:
    """The group of every quantized layer and every plain matrix; what is wrong in the lists themselves is noted."""
    config, groups = opened.quantization, Groups()
    given = config.get("config_groups")
    if not isinstance(given, dict) or not given:
        findings.fault("config", "config.json", f"config_groups is {shown(given)}", "an object of groups", _CONFIG, 8)
        return groups
    ignore = [t for t in _list(config.get("ignore"), "ignore", findings) if t]
    targets: dict[str, list[str]] = {}
    for label, group in given.items():
        if not isinstance(group, dict) or not isinstance(group.get("weights"), dict):
            findings.fault(
                "config", f"config_groups.{label}", "it says nothing of weights", "a group with weights", _CONFIG, 7
            )
            continue
        targets[label] = _list(group.get("targets"), f"config_groups.{label}.targets", findings)
        _parse(label, group, config, groups, findings)
    names = [*opened.layers, *(n for n in weight_names(opened) if n not in opened.layers)]
    try:
        hits = matched([*ignore, *(t for ts in targets.values() for t in ts)], names)
    except ValueError as error:
        findings.fault(
            "config", "config.json", f"quantization_config: {error}", "patterns that can be matched", _CONFIG, 7
        )
        return groups
    groups.ignored = {n for t in ignore for n in hits.get(t, (t,))}
    for name in names:
        named = [label for label, ts in targets.items() if any(name in hits.get(t, (t,)) for t in ts)]
        classes = [label for label, ts in targets.items() if _CLASS in ts]
        if named or classes:
            groups.of[name] = (named or classes)[0]
        if named:
            groups.named.add(name)
    _check_lists(opened, ignore, targets, hits, groups, findings)
    return groups


def _list(value: Any, where: str, findings: Findings) -> list[str]:
    if value is None and where == "ignore":
        return []
    if not isinstance(value, list) or not all(is_pattern(v) for v in value):
        findings.fault("config", where, f"it is {shown(value)}", "a list of names and valid patterns", _CONFIG, 7)
        return [v for v in value if is_pattern(v)] if isinstance(value, list) else []
    return value


def _parse(label: str, group: Mapping[str, Any], config: Mapping[str, Any], groups: Groups, findings: Findings) -> None:
    try:
        weights = ct.parse_args(group["weights"], f"config_groups.{label}.weights")
        given = group.get("input_activations")
        inputs = ct.parse_args(given, f"config_groups.{label}.input_activations") if isinstance(given, dict) else None
    except (QkitError, TypeError, ValueError, IndexError) as error:
        findings.fault("config", f"config_groups.{label}", said(error), "a number format", _CONFIG, 7)
        return
    top = config.get("format")
    packing = group.get("format") or (top if top != "mixed-precision" else None)
    groups.parsed[label] = weights, inputs, str(packing or ct_layout(weights, inputs))


def ct_layout(weights: Format, activations: Format | None) -> str:
    """The layout that compressed-tensors chooses for a format where the config names none."""
    from qkit.tensor.formats import layout

    return layout(weights, activations)


def _check_lists(
    opened: Opened,
    ignore: list[str],
    targets: Mapping[str, list[str]],
    hits: Mapping[str, Collection[str]],
    groups: Groups,
    findings: Findings,
) -> None:
    for name in opened.layers:
        if name in groups.ignored or _CLASS in ignore:
            findings.fault(
                "config", name, "the layer is quantized, and the ignore list names it", "ignore names plain layers alone",
                "take it out of ignore: engines would load its codes as a plain weight", 8,
            )  # fmt: skip
        elif name not in groups.of:
            findings.fault(
                "config", name, "the layer is quantized, and no group of config_groups is about it", "one group for it",
                "add it to the targets of its group: engines would load its codes as a plain weight", 8,
            )  # fmt: skip
    for label, listed in targets.items():
        claimed = [n for n in opened.layers if groups.of.get(n) == label]
        if not claimed and opened.layers:
            findings.warn(
                "config", f"config_groups.{label}", f"its targets {shown(listed)} match no quantized layer",
                "a group for layers that are there", _CONFIG, 3,
            )  # fmt: skip


def set_formats(opened: Opened, groups: Groups, findings: Findings) -> None:
    """The formats and shapes of all layers, after a check of their tensors."""
    for layer in opened.layers.values():
        label = groups.of.get(layer.name) or (next(iter(groups.parsed)) if len(groups.parsed) == 1 else "")
        if label not in groups.parsed:
            continue
        layer.weights, layer.activations, layer.packing = groups.parsed[label]
        _check_layer(layer, findings)


def _check_layer(layer: Layer, findings: Findings) -> None:
    fmt, codes = layer.weights, layer.codes
    if fmt is None:
        return
    if codes is None:
        findings.fault(
            "lost tensors",
            layer.name,
            f"of its tensors only {_leaves(layer)} are there",
            "its codes",
            "quantize again",
            8,
        )
        return
    if layer.scale is None:
        findings.fault("lost tensors", layer.name, "it has no weight_scale", "its scales", "quantize again", 9)
    wanted = {"int": "I32" if "pack" in layer.packing else "I8", "fp4": "U8", "fp8": "F8_E4M3"}[fmt.kind]
    if codes.dtype != wanted:
        findings.fault(
            "config", layer.name, f"its codes are {codes.dtype} in {codes.name.rpartition('.')[2]}",
            f"{wanted}, as {fmt.name} stored as {layer.packing} has them", _CONFIG, 8,
        )  # fmt: skip
        return
    if len(codes.shape) != 2:
        findings.fault(
            "shapes", layer.name, f"its codes have shape {list(codes.shape)}", "a matrix", "quantize again", 8
        )
        return
    layer.shape = _shape(layer, fmt, findings)
    if layer.shape is not None:
        _check_scale(layer, fmt, (layer.shape[0], layer.shape[1]), findings)


def _leaves(layer: Layer) -> str:
    return ", ".join(layer.leaves)


def _shape(layer: Layer, fmt: Format, findings: Findings) -> tuple[int, int] | None:
    """(out, in): what weight_shape says where that fits the words, else what the scales tell."""
    codes = layer.codes
    assert codes is not None
    rows, words = codes.shape
    if codes.dtype != "I32":
        return rows, words * (2 if fmt.kind == "fp4" else 1)
    stated = layer.leaves.get("weight_shape")
    if stated is None:
        findings.fault("lost tensors", layer.name, "it has no weight_shape", "weight_shape [2]", "quantize again", 7)
        return rows, words * 32 // fmt.bits
    values = [int(v) for v in read_tensor(stated).flatten().tolist()]
    if len(values) != 2 or min(values) < 1 or values[0] != rows:
        findings.fault(
            "config", layer.name, f"weight_shape says {values}, and the codes have {rows} rows", f"[{rows}, columns]",
            "quantize again", 8,
        )  # fmt: skip
        return rows, words * 32 // fmt.bits
    if packed_words(values[1], fmt.bits) != words:
        fitting = [b for b in range(1, 9) if packed_words(values[1], b) == words]
        found = f"its {words} words a row are codes of {fitting[0]} bits" if fitting else f"{words} words a row"
        findings.fault(
            "config", layer.name, f"{found} for the {values[1]} columns that weight_shape says",
            f"{packed_words(values[1], fmt.bits)} words: config.json says {fmt.bits} bits", _CONFIG, 8,
        )  # fmt: skip
        layer.weights = None
    return values[0], values[1]


def _check_scale(layer: Layer, fmt: Format, shape: tuple[int, int], findings: Findings) -> None:
    scale, zero = layer.scale, layer.first(("weight_zero_point",))
    if scale is not None:
        _check_grid(layer, fmt, shape, findings)
        floats = {"e4m3": ("F8_E4M3",), "e8m0": ("U8", "F8_E8M0")}.get(fmt.scale, ("BF16", "F16", "F32"))
        if scale.dtype not in floats:
            findings.fault(
                "config",
                layer.name,
                f"its scales are {scale.dtype}",
                f"{' or '.join(floats)} for {fmt.name}",
                _CONFIG,
                7,
            )
    if zero is not None and fmt.symmetric and _any(zero):
        findings.fault(
            "config", layer.name, "it has zero points that are not zero, and config.json says symmetric", "symmetric: false",
            _CONFIG, 8,
        )  # fmt: skip
    if zero is None and not fmt.symmetric:
        findings.fault(
            "lost tensors", layer.name, "it has no weight_zero_point, and config.json says that it is asymmetric",
            "a zero point for each scale", "quantize again, or correct symmetric in config.json", 8,
        )  # fmt: skip
    if fmt.scale == "e4m3" and "weight_global_scale" not in layer.leaves:
        findings.fault(
            "lost tensors",
            layer.name,
            "it has no weight_global_scale",
            "the global scale of NVFP4",
            "quantize again",
            9,
        )
    inputs = layer.activations
    if inputs is not None and not inputs.dynamic and "input_scale" not in layer.leaves and inputs.scale == "model":
        findings.fault(
            "lost tensors", layer.name, "it has no input_scale, and config.json says that inputs have a static one",
            "input_scale", "calibrate again", 7,
        )  # fmt: skip


def _any(info: Any) -> bool:
    return bool(read_tensor(info).any())


def _check_grid(layer: Layer, fmt: Format, shape: tuple[int, int], findings: Findings) -> None:
    """Scales in the number that the format has for a weight of this shape."""
    scale = layer.scale
    assert scale is not None
    grouped = fmt.strategy in ("group", "tensor_group")
    if (grouped and not fmt.group) or (fmt.strategy == "block" and not fmt.block):
        findings.fault(
            "config", layer.name, f"strategy {fmt.strategy} without a size", "group_size or block_structure", _CONFIG, 7
        )
        return
    if grouped and fmt.group and shape[1] % fmt.group:
        findings.fault(
            "groups", layer.name, f"groups of {fmt.group} do not divide its {shape[1]} columns", "a group that divides them",
            "quantize again with another group size", 7,
        )  # fmt: skip
        return
    wanted = param_shape(fmt, shape)
    if count(scale) == math.prod(wanted):
        return
    found = f"it has {list(scale.shape)} scales"
    columns = scale.shape[-1] if len(scale.shape) == 2 else 0
    if grouped and columns and scale.shape[0] == shape[0] and shape[1] % columns == 0:
        found = f"its scales are for groups of {shape[1] // columns}"
    findings.fault(
        "config", layer.name, found, f"{list(wanted)}: config.json says {fmt.strategy}"
        + (f" of {fmt.group}" if fmt.group else ""), _CONFIG, 8,
    )  # fmt: skip
    layer.weights = None


def check_plain(opened: Opened, groups: Groups, expected: Expected, findings: Findings) -> None:
    """Plain matrices that the config says are quantized, and entries of ignore that name nothing."""
    ignore = opened.quantization.get("ignore") or []
    for name in weight_names(opened):
        if name in opened.layers or name in groups.ignored or _CLASS in ignore or name not in groups.of:
            continue
        label = groups.of[name]
        known = name in expected.linears if expected.model is not None else name.endswith("proj")
        if name not in groups.named and not known and ".experts." not in name:
            continue
        findings.fault(
            "config", name, f"the weight is plain, and config_groups.{label} says that it is quantized",
            "a plain layer is listed in ignore", "add it to ignore: engines would look for its codes", 8,
        )  # fmt: skip
    stems = {n.rpartition(".")[0] for n in opened.tensors} | set(opened.layers) | expected.modules
    unknown = [t for t in ignore if isinstance(t, str) and not t.startswith("re:") and t not in stems and "." in t]
    unknown += [t for t in ignore if isinstance(t, str) and "." not in t and not t.startswith("re:") and t not in stems]
    classes = {type(m).__name__ for m in expected.model.modules()} if expected.model is not None else set()
    unknown = [t for t in unknown if t not in classes and t != _CLASS]
    if unknown and expected.model is not None:
        findings.warn(
            "config", unknown, "ignore names a layer that neither the file nor the model's class has", "names of layers",
            "correct the name", 1,
        )  # fmt: skip
