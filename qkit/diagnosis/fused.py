"""Layers that engines load as one: q/k/v, gate/up, and the experts of a layer."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

from qkit.diagnosis.expected import weight_names
from qkit.diagnosis.findings import FAULT, WARNING, Findings
from qkit.diagnosis.layers import GLOBALS, Layer
from qkit.diagnosis.opened import Opened
from qkit.files.safefile import read_tensor
from qkit.verification.fused_layers import expert_groups, fused_groups

_ONE = "quantize them alike"


def check_fused(opened: Opened, findings: Findings) -> None:
    """Each group with one format, all of it or none, and one value of each scale that is shared."""
    names = [*opened.layers, *weight_names(opened)]
    level = WARNING if opened.for_any_engine or opened.method == "qkit" else FAULT
    for group in fused_groups(names):
        members = [opened.layers.get(n) for n in group if not _is_unknown(opened.layers.get(n))]
        if len(set(_kinds(members))) > 1:
            words = ", ".join(f"{n.rpartition('.')[2]} {_words(opened.layers.get(n))}" for n in group)
            findings.add(
                level, "fused layers", group, f"engines load them as one, and they differ: {words}", "one format for all of "
                "them", _ONE, 8,
            )  # fmt: skip
        else:
            _check_shared([opened.layers[n] for n in group if n in opened.layers], findings)
    for where, group in expert_groups(names).items():
        _check_experts(opened, where, group, level, findings)


def _is_unknown(layer: Layer | None) -> bool:
    """Whether a layer has a fault for which its format is not known; that one is told already."""
    return layer is not None and layer.weights is None and (layer.codes is None or layer.scale is None)


def _kinds(layers: Sequence[Layer | None]) -> list[object]:
    """The formats of layers that engines run as one. One group that is a whole row is one of the groups of wider layers, or a
    channel among channels."""
    kinds = [_kind(layer, as_channel=False) for layer in layers]
    return kinds if len(set(kinds)) < 2 else [_kind(layer, as_channel=True) for layer in layers]


def _kind(layer: Layer | None, as_channel: bool) -> object:
    if layer is None:
        return None
    if layer.weights is None:
        codes, scale = layer.codes, layer.scale
        return codes and codes.dtype, scale and scale.dtype
    weights, shape = layer.weights, layer.shape
    if as_channel and weights.group is not None and shape is not None and weights.group == shape[-1]:
        weights = replace(weights, group=None, strategy="channel")
    return weights, layer.activations, layer.packing.partition(",")[0]


def _words(layer: Layer | None) -> str:
    return "plain" if layer is None else str(layer.weights) if layer.weights is not None else "quantized"


def _check_experts(opened: Opened, where: str, group: list[str], level: str, findings: Findings) -> None:
    plain = [n for n in group if n not in opened.layers]
    if plain and len(plain) < len(group):
        findings.add(
            level, "experts", plain, f"{len(plain)} of the {len(group)} matrices of {where} are plain, the others quantized",
            "all experts of a layer quantized, or none", _ONE, 9,
        )  # fmt: skip
        return
    kinds: dict[object, list[str]] = {}
    for name, kind in zip(group, _kinds([opened.layers.get(n) for n in group]), strict=True):
        kinds.setdefault(kind, []).append(name)
    if len(kinds) > 1:
        fewest = min(kinds.values(), key=len)
        words = " and ".join(sorted({_words(opened.layers.get(n[0])) for n in kinds.values()}))
        findings.add(
            level, "experts", fewest, f"the experts of {where} have several formats: {words}", "one format and one group size "
            "for all matrices of a layer's experts: engines run them as one product", _ONE, 9,
        )  # fmt: skip
    by_expert: dict[str, list[Layer]] = {}
    for name in group:
        owner, _, leaf = name.rpartition(".")
        if leaf in ("gate_proj", "up_proj", "w1", "w3") and name in opened.layers:
            by_expert.setdefault(owner, []).append(opened.layers[name])
    for layers in by_expert.values():
        _check_shared(layers, findings)


def _check_shared(layers: Iterable[Layer], findings: Findings) -> None:
    """NVFP4's global scales, which engines take once for a fused layer."""
    members = [*layers]
    for leaf in GLOBALS:
        infos = {x.name: x.leaves[leaf] for x in members if leaf in x.leaves}
        if len(infos) < 2 or any(len(i.shape) > 1 for i in infos.values()):
            continue
        values = {name: float(read_tensor(info).flatten()[0]) for name, info in infos.items()}
        if len(set(values.values())) > 1:
            found = ", ".join(f"{n.rpartition('.')[2]} {v:.4g}" for n, v in values.items())
            findings.fault(
                "fused layers", values, f"{leaf} differs: {found}; engines take one for all of them", "one value",
                "quantize them with the largest magnitude of the group", 7,
            )  # fmt: skip
