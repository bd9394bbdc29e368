"""From what a user asks of the KV cache (--kv, --kv-memory, --max-length) to the policy that goes into the checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from qkit.allocation.knapsack import Choice, solve
from qkit.calibration.dataset import Calibration
from qkit.errors import Unsupported, UsageError
from qkit.families.structure import ModelStructure
from qkit.kvcache.cache import Heads, make_cache, with_budgets
from qkit.kvcache.policy import CachePolicy, CacheRequest, parse
from qkit.kvcache.scaling import search
from qkit.kvcache.sensitivity import divergences, sensitivities
from qkit.planning.request import Request
from qkit.runtime.loading import load
from qkit.system.progress import Progress
from qkit.workflows.calibration_rows import calibration_of
from qkit.workflows.quantize import open_structure

ROWS = 16  # of calibration, for the sensitivity of a cache; our choice: the ranking of layers settles early
STRETCH = 4  # most: positions of rows are stretched up to the length asked for (PM-KVQ: 4 and 16 do alike)
SCALED = ("progressive", "rtn")  # kinds whose keys share a scale between channels


@dataclass(frozen=True, kw_only=True)
class CacheChoices:
    """What can be chosen: policy without budgets, the model's heads, tokens, and bytes of a layer at each width it can end at.

    costs: by layer, {width: nats a token}, where there is more than one width
    """

    policy: CachePolicy
    structure: ModelStructure
    heads: Heads
    length: int
    sizes: dict[int, int]
    costs: tuple[dict[int, float], ...] | None

    @property
    def least(self) -> int:
        """Bytes of a cache whose layers all end at their least widths."""
        return sum(self.sizes[w] for w in self.policy.widths_of(self.heads.layers))

    @property
    def most(self) -> int:
        """Bytes of a cache whose layers all end at their largest widths."""
        return self.heads.layers * max(self.sizes[w] for w in self.policy.widths) if self.chooses else self.least

    @property
    def chooses(self) -> bool:
        """Whether layers may end at different widths, which is decided by measuring."""
        return len(self.policy.widths) > 1

    @property
    def units(self) -> list[list[Choice]]:
        """For the knapsack: each layer's widths."""
        return [
            [Choice(str(w), max(c[w], 0.0), {"bytes": self.sizes[w], "nanoseconds": 0}) for w in self.policy.widths]
            for c in self.costs or ()
        ]


@dataclass(frozen=True)
class CachePlan:
    """policy: with budgets; bytes: of the cache at its full length; plain_bytes: of keys and values in 16 bits; exponents: of
    the scales of keys (``qkit.transforms.keys``), by layer, head and rotary pair."""

    policy: CachePolicy
    bytes: int
    plain_bytes: int
    exponents: tuple[tuple[tuple[int, ...], ...], ...] | None = None


def plan_cache(request: Request, wanted: CacheRequest, progress: Progress) -> CachePlan:
    """The cache within ``wanted.memory``. Raises as ``opened``."""
    open_ = opened(request, wanted)
    finals = open_.policy.widths_of(open_.heads.layers)
    if open_.chooses and wanted.memory is not None:
        open_ = replace(open_, costs=_costs(request, open_, sensitivities, progress))
        picks = solve(open_.units, {"bytes": wanted.memory}).picks
        finals = tuple(open_.policy.widths[i] for i in picks)
    return resolve_cache(request, open_, wanted, finals, progress)


def opened(request: Request, wanted: CacheRequest, joint: bool = False) -> CacheChoices:
    """The request looked at as far as config and headers allow. joint: whether its bytes are part of a budget of all.

    Raises UsageError for a policy that cannot be, Unsupported for attention that no policy serves and for too little memory.
    """
    if joint and wanted.memory is not None:
        raise UsageError("--memory counts the KV cache too: leave --kv-memory out")
    open_ = _opened(request, wanted)
    if not joint:
        _refuse_too_little(wanted.memory, open_.least, open_)
        if open_.chooses and wanted.memory is None:
            raise UsageError(
                f"--kv {open_.policy.name} chooses between widths by memory: add --kv-memory (or --memory for all), or use "
                "one width"
            )
    return open_


def joint_choices(request: Request, wanted: CacheRequest, progress: Progress) -> CacheChoices:
    """What the cache offers a budget that it shares with the weights: costs, where there is a choice, are KL divergences, in
    the unit of the weights' own. Raises as ``opened``."""
    open_ = opened(request, wanted, joint=True)
    return replace(open_, costs=_costs(request, open_, divergences, progress) if open_.chooses else None)


def _opened(request: Request, wanted: CacheRequest) -> CacheChoices:
    policy = parse(wanted.kv)
    if policy.kind == "fp" and wanted.memory is not None:
        raise UsageError("--kv-memory: fp8 has one width, so a budget has nothing to choose: leave it out")
    structure = open_structure(request.model, "--kv")
    config: Any = structure.model.config
    heads = Heads.of(config)
    length = wanted.length or getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)
    if length is None:
        raise UsageError("--kv: the model has no limit of tokens in its config: add --max-length")
    sizes = {w: heads.bytes_at(policy, w, length) for w in {*policy.widths, *policy.widths_of(heads.layers)}}
    with_budgets(policy, config, length)  # refuses what cannot be, before anything is measured
    if wanted.scale_keys:
        _refuse_unscalable(policy, structure)
    return CacheChoices(policy=policy, structure=structure, heads=heads, length=length, sizes=sizes, costs=None)


def resolve_cache(
    request: Request, open_: CacheChoices, wanted: CacheRequest, finals: tuple[int, ...], progress: Progress
) -> CachePlan:
    """The plan with these final widths, by layer."""
    found = with_widths(open_, finals)
    return replace(found, exponents=_exponents(request, open_, progress)) if wanted.scale_keys else found


def with_widths(open_: CacheChoices, finals: tuple[int, ...]) -> CachePlan:
    """The same, before scales of keys are searched."""
    config: Any = open_.structure.model.config
    policy, heads = open_.policy, open_.heads
    if policy.kind == "progressive":
        policy = with_budgets(replace(policy, finals=finals), config, open_.length)
    make_cache(config, policy)
    used = sum(open_.sizes[w] for w in finals)
    return CachePlan(policy, used, heads.layers * 2 * heads.heads * heads.head_dim * 2 * open_.length)


def _refuse_too_little(memory: int | None, needed: int, open_: CacheChoices) -> None:
    if memory is not None and needed > memory:
        raise Unsupported(
            f"--kv-memory {memory / 1e6:.2f}MB: a cache {open_.policy.name} of {open_.length} tokens takes "
            f"{needed / 1e6:.2f}MB at its smallest width: use more memory, a smaller --max-length or fewer bits"
        )


def _refuse_unscalable(policy: CachePolicy, structure: ModelStructure) -> None:
    config: Any = structure.model.config
    if policy.kind not in SCALED:
        raise UsageError(
            f"--kv-scale-keys: keys of {policy.name} do not share a scale between channels: leave the option out, or use "
            "pm-kvq or int"
        )
    if structure.family.keys is None:
        raise Unsupported(
            f"--kv-scale-keys: queries and keys of the family {structure.family.name} are not declared as linears of their own "
            "with rotary embedding: leave the option out"
        )
    part = (getattr(config, "rope_parameters", None) or {}).get("partial_rotary_factor", 1.0)
    if part != 1.0:
        raise Unsupported(
            f"--kv-scale-keys: this model rotates {part:g} of a head's channels, and only whole heads are supported: leave the "
            "option out"
        )


Measure = Callable[..., Tensor]


def _costs(request: Request, open_: CacheChoices, measure: Measure, progress: Progress) -> tuple[dict[int, float], ...]:
    """{width: cost} of every layer, on the first calibration rows, in float32."""
    policy = open_.policy
    model, rows, stretch = _measured_on(request, open_)
    progress.start("sensitivity of the KV cache", rows.samples)
    found = measure(model, rows, policy.widths, policy.group, stretch, progress=lambda: progress.step())
    return tuple({w: float(c) for w, c in zip(policy.widths, layer, strict=True)} for layer in found)


def _exponents(request: Request, open_: CacheChoices, progress: Progress) -> tuple[tuple[tuple[int, ...], ...], ...]:
    """Of the scales of keys, for the least of the policy's widths."""
    keys, policy = open_.structure.family.keys, open_.policy
    assert keys is not None
    model, rows, stretch = _measured_on(request, open_)
    attentions = [model.get_submodule(f"{b.path}.{keys.attention}") for b in open_.structure.blocks]
    shared = hasattr(attentions[0], keys.key_norm)
    progress.start("scales of keys", rows.samples)
    found = search(model, attentions, rows, policy.widths[-1], policy.group, stretch, shared, lambda: progress.step())
    return tuple(tuple(tuple(head) for head in layer.tolist()) for layer in found)


def _measured_on(request: Request, open_: CacheChoices) -> tuple[Any, Calibration, int]:
    """(model in float32, rows, stretch of the positions of those of a text)"""
    rows = measured_rows(request, open_)
    model = load(open_.structure.checkpoint.path, dtype=torch.float32)
    return model, rows, max(1, min(STRETCH, open_.length // rows.seqlen))


def measured_rows(request: Request, open_: CacheChoices) -> Calibration:
    """What a cache is measured on."""
    return calibration_of(request, open_.structure).first(ROWS)
