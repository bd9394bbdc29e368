"""What the model's class expects of a file, and what the file has: lost tensors, tensors that nothing uses, other shapes.

The class is transformers' own, built on the meta device from config.json; no code of the folder is run. Its tables say under
which names a file stores its parameters (``families.conversion``).
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from qkit.diagnosis.findings import Findings
from qkit.diagnosis.opened import Opened, said
from qkit.errors import QkitError, Unsupported
from qkit.files.checkpoint import check_config
from qkit.files.safefile import TensorInfo, read_tensor
from qkit.files.sources.decoded import CACHE_SCALES

_COMPUTED = re.compile(r"rotary_emb\.inv_freq$|\.masked_bias$|\.attn\.bias$|position_ids$")
_EXPERT = re.compile(r"(.+\.experts)\.(\d{1,6})\.(.+)")
_MTP_COUNTS = ("num_nextn_predict_layers", "mtp_num_hidden_layers", "num_mtp_modules", "num_mtp_layers")
_MTP_NAMES = re.compile(r"(^|\.)(mtp|nextn|multi_token)")
_LAYER = re.compile(r"(?:^|\.)layers\.(\d{1,6})\.")
_AGAIN = "quantize the model again with these tensors, or take them from the original"
_MANY = 12  # shapes that are named one by one


@dataclass
class Expected:
    """What the class of a model says. linears: names of its linear layers, as the file has them; modules: of all its modules"""

    model: Any = None
    linears: set[str] = field(default_factory=set)
    modules: set[str] = field(default_factory=set)


def expect(opened: Opened, findings: Findings) -> Expected:
    """Compare the file with the class of its model. What could not be compared is a note."""
    try:
        check_config(opened.config, opened.tensors)
    except QkitError as error:
        findings.fault(
            "config", "config.json", said(error).removeprefix("config.json: "), "numbers that fit the file",
            "get the config of this model", 8,
        )  # fmt: skip
        return Expected()
    model = _skeleton(opened, findings)
    if model is None:
        return Expected()
    try:
        return _compare(opened, model, findings)
    except QkitError as error:
        findings.note("lost tensors", "config.json", f"not looked for: {said(error)}")
        return Expected()


def _skeleton(opened: Opened, findings: Findings) -> Any:
    import torch

    from qkit.families.discover import build_skeleton

    try:
        return build_skeleton(opened.config, str(opened.folder), torch.bfloat16)
    except Unsupported as error:
        findings.note("lost tensors", "config.json", f"not looked for: {said(error)}")
    except QkitError as error:
        findings.fault(
            "config", "config.json", said(error), "a config that transformers reads", "get the config again", 9
        )
    return None


def _compare(opened: Opened, model: Any, findings: Findings) -> Expected:
    from torch import nn

    from qkit.families.conversion import conversion_of
    from qkit.families.unsaved import unsaved_parameters

    plain = opened.plain
    shapes = {name: info.shape for name, info in plain.items() if not name.endswith(CACHE_SCALES)}
    shapes |= {layer.plain_name: layer.shape or () for layer in opened.layers.values()}
    conversion = conversion_of(model, shapes, str(opened.folder))
    params = {n: tuple(p.shape) for n, p in model.state_dict().items()}
    tied = dict(getattr(model, "all_tied_weights_keys", None) or {})
    used = {stored for target, stored in conversion.names.items() if target in params}
    for target, pieces in conversion.pieces.items():
        used |= {p.stored for p in pieces} if target in params else set()
    for target, computed in conversion.computed.items():
        used |= set(computed.sources) if target in params else set()
    for converted in conversion.converted:
        if any(re.search(t.replace("\\1", ".*"), n) for t in converted.targets for n in params):
            used |= set(converted.stored)
    covered = {
        t for t in params if conversion.names.get(t) in shapes or t in conversion.pieces or t in conversion.computed
    }
    left_out = set(unsaved_parameters(model, shapes))
    missing = [t for t in params if t not in covered and t not in left_out and not _COMPUTED.search(t)]
    apart = {t: found for t in missing if (found := _apart(t, params[t], shapes))}
    used |= {n for found in apart.values() for n in found}
    missing = [t for t in missing if t not in apart and not (t in tied and (tied[t] in covered or tied[t] in left_out))]
    if opened.complete:
        _report_missing([conversion.stored_name(t) for t in missing], findings)
        _check_experts(conversion.pieces, params, findings)
    _report_unused(opened, model, set(shapes) - used, findings)
    _check_shapes(conversion.names, params, shapes, {x.plain_name for x in opened.layers.values()}, findings)
    _check_tied(opened, {conversion.stored_name(a): conversion.stored_name(b) for a, b in tied.items()}, findings)
    linears = {conversion.stored_name(n) for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    modules = {n for n, _ in model.named_modules()} | {conversion.stored_name(n) for n, _ in model.named_modules()}
    return Expected(model, linears, modules)


def _check_tied(opened: Opened, tied: Mapping[str, str], findings: Findings) -> None:
    """Tensors that the config says are one, and the file has both."""
    for first, second in tied.items():
        a, b = opened.tensors.get(first), opened.tensors.get(second)
        if a is None or b is None or a.dtype != b.dtype or a.shape != b.shape:
            continue
        if not read_tensor(a).equal(read_tensor(b)):
            findings.fault(
                "config", [first, second], "config.json ties them, and they differ", "one tensor",
                "set tie_word_embeddings to false if both are meant: engines load one of them alone", 8,
            )  # fmt: skip


def _apart(target: str, shape: tuple[int, ...], stored: Iterable[str]) -> list[str]:
    """Tensors of the experts of a parameter [experts, ..] that are stored one by one under its own name."""
    owner, _, leaf = target.rpartition(".")
    if len(shape) != 3:
        return []
    pattern = re.compile(rf"{re.escape(owner)}\.\d+\.{re.escape(leaf)}\.weight")
    return [n for n in stored if pattern.fullmatch(n)]


def _report_missing(names: list[str], findings: Findings) -> None:
    if not names:
        return
    found = "the tensor is in no file" if len(names) == 1 else f"{len(names)} tensors are in no file"
    findings.fault("lost tensors", sorted(names), found, "all tensors that the model's class has", _AGAIN, 8)


def _check_experts(pieces: Mapping[str, list[Any]], params: Mapping[str, tuple[int, ...]], findings: Findings) -> None:
    """Experts that are stored one by one: each number once for every matrix."""
    for target, parts in pieces.items():
        if target not in params:
            continue
        numbers: dict[tuple[str, str], set[int]] = {}
        for part in parts:
            match = _EXPERT.fullmatch(part.stored)
            if match is not None:
                numbers.setdefault((match[1], match[3]), set()).add(int(match[2]))
        count = params[target][0]
        for (layer, leaf), found in numbers.items():
            missing = sorted(set(range(count)) - found)
            if missing:
                findings.fault(
                    "experts", [f"{layer}.{e}.{leaf}" for e in missing], f"experts {missing[:8]} of {count} are in no file",
                    f"{count} experts in the layer, as config.json says", _AGAIN, 8,
                )  # fmt: skip
            if max(found) >= count:
                findings.fault(
                    "experts", f"{layer}.{leaf}", f"experts up to {max(found)}", f"{count} experts, as config.json says",
                    "get the config of this file", 8,
                )  # fmt: skip


def _report_unused(opened: Opened, model: Any, names: Iterable[str], findings: Findings) -> None:
    ignored = [re.compile(p) for p in getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()]
    ignored.append(_COMPUTED)
    counted = opened.text.get("num_hidden_layers")
    left: list[str] = []
    extra: list[str] = []
    for name in sorted(names):
        layer = _LAYER.search(name)
        beyond = layer is not None and isinstance(counted, int) and int(layer[1]) >= counted
        if _MTP_NAMES.search(name) or (beyond and _mtp_count(opened)):
            extra.append(name)
        elif any(p.search(name) for p in ignored) or _is_idle_bias(opened, name):
            continue
        else:
            left.append(name)
    if left:
        found = (
            f"the model's class has no place for {len(left)} tensors"
            if len(left) > 1
            else "the model's class has no place for it"
        )
        findings.warn(
            "unused tensors", left, found, "tensors that the class loads", "check the names, or leave them out", 2
        )
    if extra:
        findings.note(
            "MTP layers", extra, f"{len(extra)} tensors for multi-token prediction, which the class does not load"
        )


def _is_idle_bias(opened: Opened, name: str) -> bool:
    """A bias of zeros beside a quantized weight, which writers of GPTQ add to every layer."""
    info = opened.tensors.get(name)
    if info is None or not name.endswith(".bias") or name.removesuffix(".bias") not in opened.layers:
        return False
    return not bool(read_tensor(info).any())


def _check_shapes(
    names: Mapping[str, str],
    params: Mapping[str, tuple[int, ...]],
    shapes: Mapping[str, tuple[int, ...]],
    packed: Collection[str],
    findings: Findings,
) -> None:
    """packed: names of quantized weights, which lie as [out, in] whatever the class has"""
    wrong = {
        stored: (shapes[stored], params[target])
        for target, stored in names.items()
        if target in params
        and shapes.get(stored)
        and tuple(shapes[stored]) != params[target]
        and not (stored in packed and tuple(shapes[stored]) == params[target][::-1])
    }
    if len(wrong) > _MANY:
        stored, (found, wanted) = next(iter(wrong.items()))
        findings.fault(
            "shapes", wrong, f"{len(wrong)} tensors have other shapes than config.json implies, first {stored} {list(found)}",
            f"{list(wanted)}", "get the config of this model", 8,
        )  # fmt: skip
        return
    for stored, (found, wanted) in wrong.items():
        findings.fault(
            "shapes", stored, f"the shape is {list(found)}", f"{list(wanted)}, as config.json implies",
            "get the config of this file, or the tensor again", 8,
        )  # fmt: skip


def check_mtp(opened: Opened, findings: Findings) -> None:
    """Layers for multi-token prediction that the config counts and the file has not."""
    count, key = _mtp_count(opened), next((k for k in _MTP_COUNTS if opened.text.get(k)), "")
    if not count or not opened.tensors or not opened.complete:
        return
    layers = opened.text.get("num_hidden_layers")
    first = layers if isinstance(layers, int) else 0
    numbers = {int(m[1]) for n in opened.tensors if (m := _LAYER.search(n)) and not _MTP_NAMES.search(n)}
    named = any(_MTP_NAMES.search(n) for n in opened.tensors)
    missing = [i for i in range(first, first + min(count, 1000)) if i not in numbers]
    if not named and missing:
        findings.fault(
            "lost MTP layers", [f"layers.{i}" for i in missing],
            f"config.json: {key} is {count}, and the file has no tensor of such a layer",
            f"{count} layers for multi-token prediction behind the {first} of the model",
            f"copy them from the original, or set {key} to 0: speculative decoding fails without them", 7,
        )  # fmt: skip


def _mtp_count(opened: Opened) -> int:
    found = (opened.text.get(key, opened.config.get(key)) for key in _MTP_COUNTS)
    return next((n for n in found if isinstance(n, int) and not isinstance(n, bool) and n > 0), 0)


def weight_names(opened: Opened) -> dict[str, TensorInfo]:
    """{module: its plain weight} of all plain matrices."""
    return {
        name.removesuffix(".weight"): info
        for name, info in opened.plain.items()
        if name.endswith(".weight") and len(info.shape) == 2
    }
