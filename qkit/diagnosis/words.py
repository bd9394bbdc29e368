"""GPTQ and AWQ: what the config says against the words, zero points and orders of columns that are stored."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from qkit.diagnosis.expected import Expected, weight_names
from qkit.diagnosis.findings import Findings
from qkit.diagnosis.layers import Layer
from qkit.diagnosis.opened import Opened
from qkit.files.safefile import read_tensor, shown
from qkit.files.sources.groups import in_order
from qkit.tensor.formats import Format
from qkit.tensor.packing import unpack_bits

_CONFIG = "get the config of this file, or quantize again"
_STACK = re.compile(r"(.*?\b(?:layers|h|blocks)\.)\d+\.")
_BITS = (2, 3, 4, 5, 6, 7, 8)
_SAME = ("bits", "group_size", "desc_act", "sym", "checkpoint_format", "zero_point", "version")
_NOT_QUANTIZED = ("lm_head", "embed_tokens", "wte", "gate", "router", "shared_expert_gate", "embed_out", "score")


def is_awq(opened: Opened) -> bool:
    """Whether words run along the outputs, as AWQ packs them."""
    packing = str(opened.quantization.get("packing_format", ""))
    return opened.method == "awq" or "awq" in packing


def set_formats(opened: Opened, findings: Findings) -> None:
    """The formats and shapes of all layers, after a check of their tensors against the config."""
    _check_files(opened, findings)
    awq = is_awq(opened)
    for layer in opened.layers.values():
        missing = [leaf for leaf in ("qweight", "qzeros", "scales") if leaf not in layer.leaves]
        if missing:
            findings.fault(
                "lost tensors",
                layer.name,
                f"it has no {', '.join(missing)}",
                "qweight, qzeros and scales",
                "quantize again",
                9,
            )
        if {"qweight", "scales"} <= layer.leaves.keys():
            _check_layer(opened, layer, awq, findings)


def rule_of(opened: Opened, name: str) -> Mapping[str, Any] | None:
    """What the config says of one layer; None: that it is not quantized."""
    quantization: dict[str, Any] = dict(opened.quantization)
    dynamic = quantization.get("dynamic")
    for pattern, changes in dynamic.items() if isinstance(dynamic, dict) else ():
        negative, bare = pattern.startswith("-:"), re.sub(r"^[+-]:", "", pattern)
        if not _matches(bare, name):
            continue
        if negative or changes is False:
            return None
        return {**quantization, **(changes if isinstance(changes, dict) else {})}
    extra = quantization.get("extra_config")
    for pattern, changes in extra.items() if isinstance(extra, dict) else ():
        if isinstance(changes, dict) and (pattern == name or _matches(pattern, name)):
            return {**quantization, **changes}
    return quantization


def _matches(pattern: str, name: str) -> bool:
    try:
        return bool(re.match(pattern, name))
    except (re.error, RecursionError):
        return False


def _check_files(opened: Opened, findings: Findings) -> None:
    """config.json against the file of the quantization beside it."""
    for name, content in opened.beside.items():
        for key in _SAME:
            both = key in content and key in opened.quantization
            if both and content[key] != opened.quantization[key] and name != "hf_quant_config.json":
                findings.fault(
                    "config", f"{name}: {key}", f"{shown(content[key])}; config.json has {shown(opened.quantization[key])}",
                    "both files say the same", "keep the one that the tensors agree with: engines read different ones", 7,
                )  # fmt: skip


def _check_layer(opened: Opened, layer: Layer, awq: bool, findings: Findings) -> None:
    codes, scale, zero = layer.leaves["qweight"], layer.leaves["scales"], layer.leaves.get("qzeros")
    if len(codes.shape) != 2 or len(scale.shape) != 2 or codes.dtype != "I32" or 0 in codes.shape or 0 in scale.shape:
        findings.fault(
            "shapes", layer.name, f"qweight is {codes.dtype} {list(codes.shape)}, scales {scale.dtype} {list(scale.shape)}",
            "I32 words and a matrix of scales", "quantize again", 8,
        )  # fmt: skip
        return
    rule = rule_of(opened, layer.name)
    if rule is None:
        findings.fault(
            "config", layer.name, "it is quantized, and quantization_config.dynamic leaves it out", "a plain weight",
            "take the rule out: engines would load its codes as a plain weight", 8,
        )  # fmt: skip
        rule = opened.quantization
    groups, rows = scale.shape
    said = rule.get("bits", rule.get("w_bit", 4))
    bits = _bits(codes.shape, rows, zero.shape if zero is not None else None, awq)
    if bits is None:
        findings.fault(
            "shapes", layer.name, f"qweight is {list(codes.shape)}, and scales are for {rows} rows", "shapes of one weight",
            "quantize again", 8,
        )  # fmt: skip
        return
    if said != bits:
        findings.fault(
            "config",
            layer.name,
            f"its words hold codes of {bits} bits",
            f"{said} bits, as config.json says",
            _CONFIG,
            9,
        )
    columns = codes.shape[0] if awq else codes.shape[0] * 32 // bits
    layer.shape = rows, columns
    _check_groups(rule, layer, groups, columns, findings)
    ordered = _check_order(rule, layer, groups, columns, findings)
    symmetric = False if awq else rule.get("sym") is True
    if zero is not None and not awq:
        _check_zeros(opened, rule, layer, bits, symmetric, findings)
    size = columns // groups if groups > 1 and columns % groups == 0 else None
    strategy = "group" if size else "channel"
    name = f"int{bits}{'' if symmetric else '_asym'}{'_channel' if size is None else ''}"
    layer.weights = Format(name=name, kind="int", bits=bits, strategy=strategy, group=size, symmetric=symmetric)
    layer.packing = ("AWQ" if awq else "GPTQ") + (", ordered by activations" if ordered else "")


def _bits(codes: tuple[int, ...], rows: int, zero: tuple[int, ...] | None, awq: bool) -> int | None:
    """The width that the shapes of a layer tell."""
    if awq:
        return next((b for b in (4, 8, 2) if codes[1] * (32 // b) == rows), None)
    if codes[1] != rows:
        return None
    if zero is None or len(zero) != 2:
        return 4
    fitting = [b for b in _BITS if -(-rows * b // 32) == zero[1] and codes[0] * 32 % b == 0]
    return fitting[0] if fitting else None


def _check_groups(rule: Mapping[str, Any], layer: Layer, groups: int, columns: int, findings: Findings) -> None:
    said = rule.get("group_size", rule.get("q_group_size"))
    if not isinstance(said, int):
        return
    wanted = 1 if said <= 0 else -(-columns // said)
    if groups != wanted:
        found = f"{groups} groups for {columns} columns" + (
            f", of {columns // groups} each" if columns % groups == 0 else ""
        )
        findings.fault("config", layer.name, found, f"{wanted}: config.json says groups of {said}", _CONFIG, 8)


def _check_order(rule: Mapping[str, Any], layer: Layer, groups: int, columns: int, findings: Findings) -> bool:
    """Whether columns have groups in an order of their own, after a check of g_idx."""
    info, says = layer.leaves.get("g_idx"), rule.get("desc_act") is True
    if info is None:
        if says:
            findings.fault(
                "config", layer.name, "it has no g_idx, and config.json says desc_act", "the group of each column",
                "quantize again, or set desc_act to false if columns are in order", 8,
            )  # fmt: skip
        return False
    order = read_tensor(info).flatten().long()
    if len(order) != columns or int(order.min()) < 0 or int(order.max()) >= groups:
        findings.fault(
            "zero points", layer.name, f"g_idx has {len(order)} entries from {int(order.min())} to {int(order.max())}",
            f"{columns} entries below {groups}", "quantize again", 8,
        )  # fmt: skip
        return True
    plain = columns % groups == 0 and torch.equal(order, in_order(columns, groups))
    if not plain and not says and groups > 1 and columns % groups == 0:
        findings.fault(
            "config", layer.name, "its columns are ordered by activations (g_idx), and config.json says desc_act false",
            "desc_act: true", "set desc_act to true: engines that believe the config take wrong scales", 9,
        )  # fmt: skip
    return not plain


def zero_points(opened: Opened, layer: Layer, bits: int) -> Tensor:
    """int16 [groups, out], from 0 on, as they are stored in a GPTQ layer."""
    rows = layer.leaves["scales"].shape[1]
    words = read_tensor(layer.leaves["qzeros"])
    return unpack_bits(words.contiguous(), bits, rows).to(torch.int16) + (1 << (bits - 1))


def version_of(opened: Opened) -> str:
    """The version of GPTQ's layout: zero points less one in the first."""
    found = opened.quantization.get("checkpoint_format") or opened.quantization.get("format") or "gptq"
    return str(found)


def _check_zeros(
    opened: Opened, rule: Mapping[str, Any], layer: Layer, bits: int, symmetric: bool, findings: Findings
) -> None:
    if not symmetric:
        return
    stored, half = zero_points(opened, layer, bits), 1 << (bits - 1)
    offset = 0 if version_of(opened) == "gptq_v2" else 1
    wrong = stored + offset != half
    if not bool(wrong.any()):
        return
    share = float(wrong.float().mean())
    value = int(stored[wrong][0])
    if share == 1.0 and value + 1 - offset == half:
        other = "gptq" if offset == 0 else "gptq_v2"
        findings.fault(
            "zero points", layer.name, f"all zero points are stored as {value}, as {other} has them",
            f"{half - offset}: config.json says {version_of(opened)}", f"set checkpoint_format to {other}: each weight is one "
            "step off", 9,
        )  # fmt: skip
        return
    findings.fault(
        "zero points", layer.name, f"{int(wrong.sum())} zero points are not half the range, first {value}",
        f"{half - offset}: config.json says sym", "quantize again, or set sym to false", 8,
    )  # fmt: skip


def check_plain(opened: Opened, expected: Expected, findings: Findings) -> None:
    """Plain linears that the config does not name: engines take every linear for a quantized one."""
    kept = not_converted(opened)
    for name in opened.layers:
        if any(names_layer(entry, name) for entry in kept):
            findings.fault(
                "config", name, "it is quantized, and modules_to_not_convert names it", "a plain weight, or no such entry",
                "take it out of the list: engines would load its codes as a plain weight", 8,
            )  # fmt: skip
    listed = _listed(opened)
    for name in weight_names(opened):
        leaf, rule = name.rpartition(".")[2], rule_of(opened, name)
        known = name in expected.linears if expected.model is not None else leaf.endswith("proj")
        if name in opened.layers or leaf in _NOT_QUANTIZED or not (known or ".experts." in name):
            continue
        told = rule is None or (isinstance(rule.get("bits"), int) and rule["bits"] >= 16)
        told |= any(names_layer(entry, name) for entry in kept)
        told |= bool(listed) and not any(name.endswith(entry) for entry in listed)
        if not told and in_quantized_stack(opened, name):
            findings.fault(
                "config", name, "the weight is plain, and nothing in quantization_config says so",
                "an entry of modules_to_not_convert (AWQ) or dynamic (GPTQ)", "add it: engines would look for its codes", 8,
            )  # fmt: skip


def _listed(opened: Opened) -> list[str]:
    """Ends of the names of all quantized linears of a block, where the config lists them."""
    inside = opened.quantization.get("modules_in_block_to_quantize")
    groups = inside if isinstance(inside, list) else []
    return [str(leaf) for group in groups if isinstance(group, list) for leaf in group]


def in_quantized_stack(opened: Opened, name: str) -> bool:
    """Whether a layer is in a stack of blocks with quantized layers: engines leave towers of other stacks as they are."""
    found = _STACK.match(name)
    return found is not None and any(layer.startswith(found[1]) for layer in opened.layers)


def names_layer(entry: str, name: str) -> bool:
    """Whether an entry of a list names a layer: a pattern with '*', a part of its path, or its own name."""
    if not entry:
        return False
    if "*" in entry:
        return fnmatch.fnmatchcase(name, entry)
    return f".{entry.strip('.')}." in f".{name}."


def not_converted(opened: Opened) -> list[str]:
    """Names of modules, or parts of them, that the config says are plain."""
    for key in ("modules_to_not_convert", "ignored_layers", "exclude_modules"):
        found = opened.quantization.get(key)
        if isinstance(found, list):
            return [str(x) for x in found if isinstance(x, str)]
    return []
