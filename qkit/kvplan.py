"""From what a user asks of the KV cache (--kv, --kv-memory, --max-length) to the policy that goes into the checkpoint."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from qkit.allocation.knapsack import Choice, solve
from qkit.errors import UsageError
from qkit.families.outline import Outline
from qkit.kvcache.cache import Heads, make_cache, with_budgets
from qkit.kvcache.policy import Policy, parse
from qkit.kvcache.sensitivity import sensitivities
from qkit.loading import load
from qkit.pipeline import Request, open_outline, text_rows
from qkit.run import Progress

ROWS = 16  # of the calibration text, for the sensitivity of a cache; our choice: the ranking of layers settles early
STRETCH = 4  # most: positions of rows are stretched up to the length asked for (PM-KVQ: 4 and 16 do alike)


@dataclass(frozen=True)
class CachePlan:
    """policy: with budgets; costs: sensitivity of each layer, {width: nats}, where it was measured; bytes: of the cache at its
    full length; plain_bytes: of keys and values in 16 bits."""

    policy: Policy
    costs: tuple[dict[int, float], ...] | None
    bytes: int
    plain_bytes: int


def plan_cache(request: Request, kv: str, memory: int | None, length: int | None, progress: Progress) -> CachePlan:
    """Choose the final width of every layer's cache.

    memory: bytes for the cache of one sequence of ``length`` tokens (None: the model's longest). Raises UsageError for a
    policy or a memory that cannot be, Unsupported for attention that no policy serves.
    """
    policy = parse(kv)
    outline = open_outline(request.model)
    config: Any = outline.model.config
    heads = Heads.of(config)
    length = length or getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)
    if length is None:
        raise UsageError("--kv: the model does not say how many tokens it takes at most; give --max-length")
    sizes = {w: heads.bytes_at(policy, w, length) for w in policy.widths}
    plain = heads.layers * 2 * heads.heads * heads.head_dim * 2 * length
    costs = None
    if policy.kind == "progressive":
        with_budgets(policy, config, length)  # refuses what cannot be, before anything is measured
        _refuse_too_little(memory, heads.layers * sizes[policy.widths[-1]], policy, length)
        finals = (policy.widths[-1],) * heads.layers
        if len(policy.widths) > 1:
            if memory is None:
                raise UsageError(f"--kv {policy.name} chooses between widths by memory: give --kv-memory, or one width")
            costs = _costs(request, outline, policy, length, progress)
            units = [[Choice(str(w), c[w], {"bytes": sizes[w]}) for w in policy.widths] for c in costs]
            picks = solve(units, {"bytes": memory}).picks
            finals = tuple(policy.widths[i] for i in picks)
        policy = with_budgets(replace(policy, finals=finals), config, length)
    used = sum(policy.budgets) if policy.budgets else heads.layers * sizes[policy.widths[0]]
    _refuse_too_little(memory, used, policy, length)
    make_cache(config, policy)
    return CachePlan(policy, costs, used, plain)


def _refuse_too_little(memory: int | None, needed: int, policy: Policy, length: int) -> None:
    if memory is not None and needed > memory:
        raise UsageError(
            f"--kv-memory {memory / 1e6:.2f}MB: a cache {policy.name} of {length} tokens takes {needed / 1e6:.2f}MB at "
            "its least width: give more memory, a smaller --max-length or fewer bits"
        )


def _costs(
    request: Request, outline: Outline, policy: Policy, length: int, progress: Progress
) -> tuple[dict[int, float], ...]:
    """{width: cost} of every layer, on the first rows of the calibration text, in float32."""
    rows = text_rows(request, outline).tokens[:ROWS]
    model = load(outline.checkpoint.path, dtype=torch.float32)
    progress.start("sensitivity of the KV cache", len(rows))
    stretch = max(1, min(STRETCH, length // rows.shape[1]))
    found = sensitivities(model, rows, policy.widths, policy.group, stretch, progress=lambda: progress.step())
    return tuple({w: float(c) for w, c in zip(policy.widths, layer, strict=True)} for layer in found)
