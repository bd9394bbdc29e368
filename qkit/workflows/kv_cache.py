"""The work behind --kv, --kv-memory and --max-length: from the request to the policy that goes into the checkpoint."""

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
from qkit.kvcache.cache import make_cache, with_budgets
from qkit.kvcache.policy import CachePolicy, CacheRequest, parse
from qkit.kvcache.scaling import search
from qkit.kvcache.sensitivity import divergences, sensitivities
from qkit.kvcache.shape import CacheShape
from qkit.planning.request import Request
from qkit.runtime.loading import load_checkpoint
from qkit.system.progress import Progress
from qkit.workflows.calibration_rows import calibration_of
from qkit.workflows.quantize import open_structure

ROWS = 16  # of calibration, for the sensitivity of a cache; our choice: the ranking of layers settles early
STRETCH = 4  # most: positions of rows are stretched up to the length asked for (PM-KVQ: 4 and 16 do alike)
SCALED = ("progressive", "rtn")  # kinds whose keys share a scale between channels


@dataclass(frozen=True, kw_only=True)
class CacheChoices:
    """The choices of a KV cache: policy without budgets, the model's heads, tokens, and bytes of a layer at each final
    width.

    costs: by layer, {width: nats a token}, where there is more than one width
    """

    policy: CachePolicy
    structure: ModelStructure
    heads: CacheShape
    length: int
    sizes: dict[int, int]
    costs: tuple[dict[int, float], ...] | None

    @property
    def least(self) -> int:
        """The bytes of a cache whose layers all end at their smallest widths."""
        return sum(self.sizes[w] for w in self.policy.widths_of(self.heads.layers))

    @property
    def most(self) -> int:
        """The bytes of a cache whose layers all end at their largest widths."""
        return self.heads.layers * max(self.sizes[w] for w in self.policy.widths) if self.chooses else self.least

    @property
    def chooses(self) -> bool:
        """Whether layers may end at different widths, which is decided by measuring."""
        return len(self.policy.widths) > 1

    @property
    def units(self) -> list[list[Choice]]:
        """The widths of each layer as choices for the knapsack."""
        return [
            [Choice(str(w), max(c[w], 0.0), {"bytes": self.sizes[w], "nanoseconds": 0}) for w in self.policy.widths]
            for c in self.costs or ()
        ]


@dataclass(frozen=True)
class CachePlan:
    """A KV cache that fits its budget.

    policy: with budgets; bytes: of the cache at its full length; plain_bytes: of keys and values in 16 bits; exponents: of
    the scales of keys (``qkit.transforms.keys``), by layer, head and rotary pair.
    """

    policy: CachePolicy
    bytes: int
    plain_bytes: int
    exponents: tuple[tuple[tuple[int, ...], ...], ...] | None = None


def plan_cache(request: Request, cache_request: CacheRequest, progress: Progress) -> CachePlan:
    """The cache within ``cache_request.memory``. Raises as ``cache_choices``."""
    choices = cache_choices(request, cache_request)
    finals = choices.policy.widths_of(choices.heads.layers)
    if choices.chooses and cache_request.memory is not None:
        choices = replace(choices, costs=_costs(request, choices, sensitivities, progress))
        picks = solve(choices.units, {"bytes": cache_request.memory}).picks
        finals = tuple(choices.policy.widths[i] for i in picks)
    return resolve_cache(request, choices, cache_request, finals, progress)


def cache_choices(request: Request, cache_request: CacheRequest, joint: bool = False) -> CacheChoices:
    """The choices of a cache, as far as config and headers tell. joint: whether its bytes are part of a budget of all.

    Raises UsageError for a policy that cannot be, Unsupported for attention that no policy serves and for too little
    memory.
    """
    if joint and cache_request.memory is not None:
        raise UsageError("--memory counts the KV cache too: leave --kv-memory out")
    choices = _read_choices(request, cache_request)
    if not joint:
        _refuse_too_little(cache_request.memory, choices.least, choices)
        if choices.chooses and cache_request.memory is None:
            raise UsageError(
                f"--kv {choices.policy.name} chooses between widths by memory: add --kv-memory (or --memory for "
                "all), or use one width"
            )
    return choices


def joint_choices(request: Request, cache_request: CacheRequest, progress: Progress) -> CacheChoices:
    """The choices of a cache that shares a budget with the weights: costs, where there is a choice, are KL divergences, in the
    unit of the weights' own. Raises as ``cache_choices``."""
    choices = cache_choices(request, cache_request, joint=True)
    return replace(choices, costs=_costs(request, choices, divergences, progress) if choices.chooses else None)


def _read_choices(request: Request, cache_request: CacheRequest) -> CacheChoices:
    policy = parse(cache_request.kv)
    if policy.is_static and cache_request.memory is not None:
        raise UsageError(f"--kv-memory: {policy.name} has one width, so a budget has nothing to choose: leave it out")
    structure = open_structure(request.model, "--kv", adapter=request.adapter)
    config: Any = structure.model.config
    heads = CacheShape.of(config, windows=policy.is_static)
    length = cache_request.length or getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)
    if length is None:
        raise UsageError("--kv: the model has no limit of tokens in its config: add --max-length")
    sizes = {w: heads.bytes_at(policy, w, length) for w in {*policy.widths, *policy.widths_of(heads.layers)}}
    with_budgets(policy, config, length)  # refuses what cannot be, before anything is measured
    if cache_request.scale_keys:
        _refuse_unscalable(policy, structure)
    return CacheChoices(policy=policy, structure=structure, heads=heads, length=length, sizes=sizes, costs=None)


def resolve_cache(
    request: Request, choices: CacheChoices, cache_request: CacheRequest, finals: tuple[int, ...], progress: Progress
) -> CachePlan:
    """The cache with these final widths, by layer, and with scales of keys where they are asked for."""
    cache = cache_of_widths(choices, finals)
    return replace(cache, exponents=_exponents(request, choices, progress)) if cache_request.scale_keys else cache


def cache_of_widths(choices: CacheChoices, finals: tuple[int, ...]) -> CachePlan:
    """The cache with these final widths, by layer, before scales of keys are searched."""
    config: Any = choices.structure.model.config
    policy, heads = choices.policy, choices.heads
    if policy.kind == "progressive":
        policy = with_budgets(replace(policy, finals=finals), config, choices.length)
    make_cache(config, policy)
    tokens = heads.tokens_of(choices.length)
    used = sum(heads.bytes_at(policy, w, n) for w, n in zip(finals, tokens, strict=True))
    return CachePlan(policy, used, 2 * heads.heads * heads.head_dim * 2 * sum(tokens))


def _refuse_too_little(memory: int | None, needed: int, choices: CacheChoices) -> None:
    if memory is not None and needed > memory:
        raise Unsupported(
            f"--kv-memory {memory / 1e6:.2f}MB: a cache {choices.policy.name} of {choices.length} tokens takes "
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
            f"--kv-scale-keys: queries and keys of the family {structure.kind_name} are not declared as linears of their own "
            "with rotary embedding: leave the option out"
        )
    part = (getattr(config, "rope_parameters", None) or {}).get("partial_rotary_factor", 1.0)
    if part != 1.0:
        raise Unsupported(
            f"--kv-scale-keys: this model rotates {part:g} of a head's channels, and only whole heads are supported: leave the "
            "option out"
        )


Measure = Callable[..., Tensor]


def _costs(
    request: Request, choices: CacheChoices, measure: Measure, progress: Progress
) -> tuple[dict[int, float], ...]:
    """{width: cost} of every layer, on the first calibration rows, in float32."""
    policy = choices.policy
    model, rows, stretch = _measured_on(request, choices)
    progress.start("sensitivity of the KV cache", rows.samples)
    layer_costs = measure(model, rows, policy.widths, policy.group, stretch, progress=lambda: progress.step())
    return tuple({w: float(c) for w, c in zip(policy.widths, layer, strict=True)} for layer in layer_costs)


def _exponents(request: Request, choices: CacheChoices, progress: Progress) -> tuple[tuple[tuple[int, ...], ...], ...]:
    """Of the scales of keys, for the least of the policy's widths."""
    keys, policy = choices.structure.family.keys, choices.policy
    assert keys is not None
    model, rows, stretch = _measured_on(request, choices)
    attentions = [model.get_submodule(f"{b.path}.{keys.attention}") for b in choices.structure.blocks]
    shared = hasattr(attentions[0], keys.key_norm)
    progress.start("scales of keys", rows.samples)
    exponents = search(
        model, attentions, rows, policy.widths[-1], policy.group, stretch, shared, lambda: progress.step()
    )
    return tuple(tuple(tuple(head) for head in layer.tolist()) for layer in exponents)


def _measured_on(request: Request, choices: CacheChoices) -> tuple[Any, Calibration, int]:
    """(model in float32, rows, stretch of the positions of those of a text)"""
    rows = measurement_rows(request, choices)
    model = load_checkpoint(choices.structure.checkpoint, torch.float32)
    return model, rows, max(1, min(STRETCH, choices.length // rows.seqlen))


def measurement_rows(request: Request, choices: CacheChoices) -> Calibration:
    """The calibration rows that a cache is measured on. Raises UsageError for a request that has only synthetic ones."""
    if request.samples < 1:
        raise UsageError(
            f"--samples {request.samples}: --kv {choices.policy.name} is measured on calibration samples: use at least 1"
        )
    return calibration_of(request, choices.structure).first(ROWS)
