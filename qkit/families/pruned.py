"""A model with fewer routed experts: what config.json says of it then, and where its tensors lie in the source.

Which value of config.json is the number of experts is proved and not guessed: the model is built without memory with another
value, and then nothing but its experts, and what has one entry for each of them, may have another shape. What shrinks in that
comparison (stacked weights, rows of a router, biases) is what is cut. The plan needs shapes alone, so it is made before it is
known which experts stay.
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from qkit.errors import QkitError, Unsupported
from qkit.families.blocks import BlockStructure, FusedExperts
from qkit.families.discover import build_skeleton
from qkit.families.structure import ModelStructure
from qkit.files.checkpoint import Checkpoint
from qkit.files.safefile import TensorInfo, shown
from qkit.files.sources.decoded import DecodedInfo, Parts

_TOKENS = 8  # of the row that shows how many experts a token gets
Keys = tuple[str, ...]  # the place of a value in config.json, key after key
Kept = dict[str, tuple[int, ...]]  # {module of the experts: those that stay, in their order}


@dataclass(frozen=True, kw_only=True)
class Cut:
    """What leaving experts out changes.

    before, left: experts of each block that has some
    used:   experts that each token gets; 0: a run without values does not show it
    fields: of config.json that hold the number; config: with the number that is left
    params: {parameter or buffer with an entry for each expert: (the module of the experts, the dimension of the entries)}
    """

    before: int
    left: int
    used: int
    fields: tuple[Keys, ...]
    config: dict[str, Any]
    params: dict[str, tuple[str, int]]

    @property
    def summary(self) -> str:
        """What is left, for the user."""
        return f"experts: {self.left} of {self.before} stay in each of {len(self.modules)} blocks; which, is measured first"

    @property
    def modules(self) -> tuple[str, ...]:
        """The modules of the experts."""
        return tuple(dict.fromkeys(module for module, _ in self.params.values()))


class PrunedStructure(ModelStructure):
    """The structure of a model without some of its experts.

    whole:  of the model as the source has it
    kept:   which experts stay; chosen: they were chosen by a measurement; before that the first ones stand for them
    scores: {module: (score of each expert, its calibration tokens)}, once measured
    """

    def __init__(self, whole: ModelStructure, cut: Cut, kept: Kept | None = None) -> None:
        self.whole, self.cut, self.chosen = whole, cut, kept is not None
        self.kept = kept or {name: tuple(range(cut.left)) for name in cut.modules}
        self.scores: dict[str, tuple[list[float], list[int]]] = {}
        super().__init__(_cut_checkpoint(whole, cut, self.kept))

    def record(self, plain: Collection[str]) -> dict[str, Any]:
        """What qkit.json says of the experts. plain: the tensors of the result that are not quantized"""
        assert self.chosen, "no experts were chosen"
        blocks = {
            self.stored_name(module): {
                "kept": list(kept),
                "scores": self.scores[module][0],
                "tokens": self.scores[module][1],
            }
            for module, kept in self.kept.items()
        }
        cut = {
            name: {"module": self.stored_name(module), "dim": dim}
            for param, (module, dim) in self.cut.params.items()
            if self._is_stored(param) and (name := self.stored_name(param)) in plain
        }
        fields = [list(path) for path in self.cut.fields]
        return {"before": self.cut.before, "left": self.cut.left, "fields": fields, "blocks": blocks, "cut": cut}

    def _is_stored(self, param: str) -> bool:
        """Whether a parameter is one stored tensor."""
        conversion = self.names.conversion
        return param not in {*conversion.pieces, *conversion.computed}


def without_experts(whole: ModelStructure, share: float) -> PrunedStructure:
    """The structure without that share of the experts of each block.

    Raises Unsupported for a model that has none, or whose experts cannot be left out, or where nothing would be left out or too
    few would be left.
    """
    where, asked = whole.checkpoint.path, f"--prune-experts {share:g}"
    counts = {x.count for _, _, x in experts_of(whole)}
    if not counts:
        raise Unsupported(
            f"{where}: {asked}: this {whole.kind_name} has no routed experts whose outputs qkit knows: leave it out"
        )
    if len(counts) > 1 or any(len(b.experts) > 1 for b in whole.blocks):
        raise Unsupported(
            f"{where}: {asked}: its blocks have several sets of experts ({', '.join(map(str, sorted(counts)))} of them), and "
            "one number is cut for all: leave it out"
        )
    before = counts.pop()
    left, used = before - round(share * before), _used(whole.model, whole)
    if left == before:
        raise Unsupported(
            f"{where}: {asked}: that is none of {before} experts: use at least {1 / before:g}, or leave it out"
        )
    check_left(str(where), left, used)
    fields, config, model = _config(whole, before, left, asked)
    if used and not _used(model, whole):
        raise Unsupported(
            f"{where}: {asked}: the model does not run with {left} of {before} experts: it chooses them in groups of a fixed "
            "number, or by rules of its own: use another share, or leave it out"
        )
    cut = Cut(
        before=before, left=left, used=used, fields=fields, config=config, params=_params(whole, model, before, left)
    )
    _check_unloaded(whole, cut, asked)
    return PrunedStructure(whole, cut)


def whole_of(structure: ModelStructure) -> ModelStructure:
    """The structure with all experts."""
    return structure.whole if isinstance(structure, PrunedStructure) else structure


def check_left(where: str, left: int, used: int) -> None:
    """Raises Unsupported where fewer experts are left than each token gets."""
    if left < max(1, used):
        raise Unsupported(
            f"{where}: --prune-experts: {left} experts are left, and each token gets {used}: use a smaller share"
        )


def experts_of(structure: ModelStructure) -> Iterator[tuple[BlockStructure, str, FusedExperts]]:
    """Yield (block, path of the module of its experts, their layout)."""
    for block in structure.blocks:
        for experts in block.experts:
            yield block, f"{block.path}.{experts.module}", experts


# ---- what changes --------------------------------------------------------------------------------------------------


class _CountedExperts(nn.Module):
    """Stand-in for routed experts that notes how many each token gets."""

    def __init__(self) -> None:
        super().__init__()
        self.used = 0

    def forward(self, hidden: Tensor, index: Tensor, *_: Any, **__: Any) -> Tensor:
        self.used = index.shape[-1]
        return torch.empty_like(hidden)


def _used(model: nn.Module, whole: ModelStructure) -> int:
    """How many experts each token gets, by a run of the whole or of a smaller model without values; 0 where it stops before."""
    used = _CountedExperts()
    replaced = {path: model.get_submodule(path) for _, path, _ in experts_of(whole)}
    base: Any = getattr(model, "base_model", model)
    try:
        for path in replaced:
            model.set_submodule(path, used)
        with torch.inference_mode(), suppress(RuntimeError, TypeError, ValueError, LookupError, AttributeError):
            base(input_ids=torch.zeros(1, _TOKENS, dtype=torch.long, device="meta"))
    finally:
        for path, module in replaced.items():
            model.set_submodule(path, module)
    return used.used


def _config(whole: ModelStructure, before: int, left: int, asked: str) -> tuple[tuple[Keys, ...], Any, nn.Module]:
    """(the fields with the number of experts, config.json with another number in them, the model that it describes)."""
    config, model = whole.checkpoint.config, whole.model
    parsed: Any = model.config
    written = tuple(_places(config, before))
    for places in (written, tuple(p for p in _places(parsed.to_dict(), before) if p not in written)):
        found = tuple(p for p in places if _built(whole, _with(config, (p,), left), before, left) is not None)
        if found:
            changed = _with(config, found, left)
            pruned = _built(whole, changed, before, left)
            if pruned is not None:
                return found, changed, pruned
    raise Unsupported(
        f"{whole.checkpoint.path}: {asked}: no field of config.json that is {before} is the number of its experts alone: "
        "this model cannot have fewer: leave it out"
    )


def _places(node: Any, value: int) -> Iterator[Keys]:
    """Yield the places of a number in nested objects."""
    for key, child in node.items():
        if isinstance(child, dict) and key != "quantization_config":
            yield from ((key, *rest) for rest in _places(child, value))
        elif type(child) is int and child == value:
            yield (key,)


def _with(config: Mapping[str, Any], places: Sequence[Keys], value: int) -> dict[str, Any]:
    result = copy.deepcopy(dict(config))
    for *outer, leaf in places:
        node = result
        for key in outer:
            node = node.setdefault(key, {})
        node[leaf] = value
    return result


def _built(whole: ModelStructure, config: dict[str, Any], before: int, left: int) -> nn.Module | None:
    """The model of a config, where it differs in its number of experts and in nothing else."""
    try:
        model = build_skeleton(config, str(whole.checkpoint.path), whole.dtype)
    except QkitError:
        return None
    old, new = whole.model.state_dict(), model.state_dict()
    differs = {n for n in old if n in new and old[n].shape != new[n].shape}
    shrinks = all(_entry_dim(old[n], new[n], before, left) is not None for n in differs)
    stacked = {f"{b.path}.{p}" for b, _, x in experts_of(whole) for p in x.params}
    return model if old.keys() == new.keys() and shrinks and stacked <= differs else None


def _entry_dim(old: Tensor, new: Tensor, before: int, left: int) -> int | None:
    """The one dimension in which a tensor shrinks, from one number of experts to the other; None where it is not so."""
    if old.dim() != new.dim():
        return None
    dims = [i for i, sizes in enumerate(zip(old.shape, new.shape, strict=True)) if sizes[0] != sizes[1]]
    return dims[0] if [(old.shape[i], new.shape[i]) for i in dims] == [(before, left)] else None


def _params(whole: ModelStructure, model: nn.Module, before: int, left: int) -> dict[str, tuple[str, int]]:
    """{what has an entry for each expert: (the module of the experts, the dimension of the entries)}.

    Raises Unsupported for what is outside their blocks."""
    new, result = model.state_dict(), dict[str, tuple[str, int]]()
    for name, value in whole.model.state_dict().items():
        dim = _entry_dim(value, new[name], before, left)
        if dim is None:
            continue
        module = next((p for b, p, _ in experts_of(whole) if name.startswith(f"{b.path}.")), None)
        if module is None:
            raise Unsupported(
                f"{whole.checkpoint.path}: --prune-experts: {name} has an entry for each expert and is in no block that has "
                "experts: leave it out"
            )
        result[name] = module, dim
    return result


def _check_unloaded(whole: ModelStructure, cut: Cut, asked: str) -> None:
    """Raises Unsupported where tensors that the model does not load have experts too: nobody could say which of these stay."""

    def inside(name: str) -> str:
        return re.sub(r"\d+", "#", name.rpartition("layers.")[2])

    known = {inside(source) for param in cut.params for source in _sources(whole, param)}
    lost = next((name for name in whole.unloaded if inside(name) in known), None)
    if lost is not None:
        raise Unsupported(
            f"{whole.checkpoint.path}: {asked}: {shown(lost)} belongs to experts in a part that the model's class does not "
            "load, such as heads for multi-token prediction, where none can be left out: leave it out"
        )


# ---- the tensors -----------------------------------------------------------------------------------------------------


def _sources(whole: ModelStructure, param: str) -> tuple[str, ...]:
    """The stored tensors of a parameter."""
    conversion = whole.names.conversion
    pieces = conversion.pieces.get(param)
    if pieces is not None:
        return tuple(p.stored for p in pieces)
    computed = conversion.computed.get(param)
    return (conversion.stored_name(param),) if computed is None else computed.sources


def _cut_checkpoint(whole: ModelStructure, cut: Cut, kept: Kept) -> Checkpoint:
    """The source without the experts that do not stay: those that are stored one by one get other numbers, and what is
    stored as one tensor is cut when it is read."""
    stored = dict(whole.checkpoint.sources or whole.checkpoint.tensors)
    result = dict(stored)
    for param, (module, dim) in cut.params.items():
        pieces = whole.names.conversion.pieces.get(param)
        if pieces is None:
            for name in _sources(whole, param):
                result[name] = _cut_tensor(whole, stored[name], cut.before, dim, kept[module])
            continue
        names = {(p.expert, p.rows): p.stored for p in pieces}
        for (expert, rows), name in names.items():
            if expert < cut.left:
                result[name] = replace(stored[names[kept[module][expert], rows]], name=name)
            else:
                result.pop(name)
    return replace(whole.checkpoint, config=cut.config, tensors=result, views={}, sources={}, _last={})


def _cut_tensor(whole: ModelStructure, info: TensorInfo, before: int, dim: int, kept: tuple[int, ...]) -> DecodedInfo:
    if info.shape[dim : dim + 1] != (before,):
        raise Unsupported(
            f"{whole.checkpoint.path}: --prune-experts: tensor {shown(info.name)} has shape {list(info.shape)}, expected "
            f"an entry for each of {before} experts: leave it out"
        )
    shape = (*info.shape[:dim], len(kept), *info.shape[dim + 1 :])
    return DecodedInfo(
        name=info.name,
        dtype=info.dtype,
        shape=shape,
        file=info.file,
        begin=0,
        end=info.nbytes * math.prod(shape) // max(1, math.prod(info.shape)),
        parts={"whole": info},
        decode=partial(_entries, dim=dim, kept=kept),
        encoding="a tensor with more experts",
        kept="experts are left out of it",
    )


def _entries(parts: Parts, dim: int, kept: tuple[int, ...]) -> Tensor:
    return parts["whole"].index_select(dim, torch.tensor(kept))


def cut_module(pruned: PrunedStructure, block: BlockStructure, whole: nn.Module, kept: tuple[int, ...]) -> nn.Module:
    """The block of the pruned model with the values of a loaded block of the whole one, for a look at what it does."""
    module = nn.Module.to(pruned.model.get_submodule(block.path), next(whole.parameters()).dtype).to_empty(device="cpu")
    values: dict[str, Tensor] = {**dict(whole.named_parameters()), **dict(whole.named_buffers())}
    for name, target in (*module.named_parameters(), *module.named_buffers()):
        value, cut = values[name], pruned.cut.params.get(f"{block.path}.{name}")
        target.data = (value if cut is None else value.index_select(cut[1], torch.tensor(kept))).detach().clone()
    return module
