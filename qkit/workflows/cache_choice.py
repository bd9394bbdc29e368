"""The choice of vLLM's KV cache for a result, by what each costs: ``qkit serve-command OUT --measure``.

The packed file is run over windows of a text twice: with keys and values as they are, and as a cache of vLLM holds them. The
cost of a cache is the KL divergence between the two, over the second half of each window: tokens that look back on half the
context up to all of it. Where a cache costs more than the limit, the layers that cost most alone keep 16 bits, as few as it
takes. The smallest cache within the limit is chosen, and written into the record and the card of the result.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qkit.errors import Unsupported, UsageError
from qkit.evaluation.metrics import bootstrap_ci, check_window, divergence, split_windows
from qkit.evaluation.text import first_tokens
from qkit.files.checkpoint import Checkpoint
from qkit.kvcache.argument import with_cache
from qkit.kvcache.engine_caches import ENGINE_CACHES, PLAIN, EngineCache, held_layers, refusal
from qkit.kvcache.read_back import Held, ReadBackCache
from qkit.kvcache.shape import CacheShape
from qkit.system.progress import Progress
from qkit.tensor.compressed_tensors import cache_kind
from qkit.workflows.own_arithmetic import load_model, load_texts_tokenizer

LIMIT = 0.01  # nats a token; our choice: about what perplexity loses of a percent
WINDOWS = 4
UNSCALED = "fp8, scale 1"  # what a file without scales would have
_PIECE = 64  # tokens whose divergences are computed together
RANKED_ON = (1, 512)  # windows, and tokens of each, on which single layers are measured: their order settles early


@dataclass(frozen=True, kw_only=True)
class CacheCost:
    """A cache of vLLM and what it costs.

    dtype: of --kv-cache-dtype; skip: layers that stay in 16 bits; kl: nats a token, with its interval over windows (None where
    there is one window); bytes: of one sequence of the context; refused: why vLLM does not serve the file with it
    layer_kl: what each layer costs alone, where that was measured
    """

    dtype: str
    skip: tuple[int, ...] = ()
    kl: float | None = None
    low: float | None = None
    high: float | None = None
    bytes: int = 0
    runs: str = ""
    refused: str = ""
    layer_kl: tuple[float, ...] = ()


@dataclass(frozen=True, kw_only=True)
class CacheMeasurement:
    """The measured caches of a result, in the order of ENGINE_CACHES, and the chosen one.

    context, windows: how many tokens, and windows of so many; limit: of the divergence; text: sha256 of the tokens; scales: the
    kind of scales in the file; candidates: what could be chosen
    """

    context: int
    windows: int
    limit: float
    text: str
    scales: str | None
    plain_bytes: int
    candidates: tuple[str, ...]
    caches: tuple[CacheCost, ...]
    chosen: CacheCost

    def to_json(self) -> dict[str, Any]:
        """All fields as a JSON-able dictionary."""
        return asdict(self)


def candidates_of(asked: Sequence[str] | None) -> tuple[str, ...]:
    """The caches that may be chosen: those that are asked for, or those that all GPUs from sm80 on have. Raises UsageError."""
    unknown = [name for name in asked or () if name not in ENGINE_CACHES]
    if unknown:
        raise UsageError(f"--kv-dtypes: {unknown[0]!r} is none of {', '.join(ENGINE_CACHES)}: use some of these")
    return tuple(asked or (c.name for c in ENGINE_CACHES.values() if c.everywhere))


def longest_of(out: Path) -> int | None:
    """The positions of the model in a folder, where its config says them."""
    config = Checkpoint.open(out, quantized=True).config
    inner = config.get("text_config")
    longest = (inner if isinstance(inner, Mapping) else config).get("max_position_embeddings")
    return longest if isinstance(longest, int) else None


def measure_caches(
    out: Path,
    text: Path | str,
    context: int,
    progress: Progress,
    windows: int = WINDOWS,
    limit: float = LIMIT,
    asked: Sequence[str] | None = None,
) -> CacheMeasurement:
    """What each cache of vLLM costs the packed model in ``out`` at so many tokens, and the smallest one within the limit.

    Raises Unsupported for a model without a cache of keys and values, UsageError for a context that is too long, BadInput for
    a text that is too short, and what loading raises.
    """
    candidates = candidates_of(asked)
    kind = cache_kind(Checkpoint.open(out, quantized=True).config.get("quantization_config"))
    if kind == "nvfp":
        raise Unsupported(f"{out}: vLLM does not load a file with NVFP4 scales of a KV cache: use --kv fp8")
    model = load_model(out, torch.float32)
    check_window(model, context)
    tokens = first_tokens(load_texts_tokenizer(out), text, windows * context)
    meter = _Meter(model, split_windows(tokens, context, windows), kind, progress)
    costs = meter.all_caches()
    chosen = _smallest(meter, costs, candidates, limit)
    return CacheMeasurement(
        context=context,
        windows=len(meter.rows),
        limit=limit,
        text=sha256(meter.rows.numpy().tobytes()).hexdigest(),
        scales=kind,
        plain_bytes=costs[PLAIN].bytes,
        candidates=candidates,
        caches=tuple(costs.values()),
        chosen=chosen,
    )


def _smallest(meter: _Meter, costs: dict[str, CacheCost], candidates: Sequence[str], limit: float) -> CacheCost:
    """The smallest cache within the limit; ``costs`` gets what was tried with skipped layers in place of all layers."""
    usable = [costs[name] for name in candidates if not costs[name].refused]
    best = min((c for c in usable if c.kl is not None and c.kl <= limit), key=_order, default=costs[PLAIN])
    for cost in sorted(usable, key=_order):
        if cost.bytes >= best.bytes or cost.kl is None or cost.kl <= limit:
            continue
        tried = _skipping(meter, cost, best.bytes, limit)
        costs[cost.dtype] = tried
        if tried.skip and _order(tried) < _order(best):
            best = tried
    return best


def _order(cost: CacheCost) -> tuple[int, float]:
    return cost.bytes, cost.kl or 0.0


def _skipping(meter: _Meter, cost: CacheCost, below: int, limit: float) -> CacheCost:
    """The cache with as few of its worst layers in 16 bits as keep the limit, where that takes fewer bytes than ``below``;
    else ``cost``, with what each layer costs alone."""
    cache = ENGINE_CACHES[cost.dtype]
    cost = replace(cost, layer_kl=meter.layers(cache))
    worst = sorted(range(len(cost.layer_kl)), key=lambda i: -cost.layer_kl[i])
    most = max((k for k in range(len(worst)) if meter.bytes_of(cache, worst[:k]) < below), default=0)
    found, low, high = cost, 1, most
    while low <= high:
        middle = (low + high) // 2
        tried = meter.with_plain(cost, tuple(sorted(worst[:middle])))
        if tried.kl is not None and tried.kl <= limit:
            found, high = tried, middle - 1
        else:
            low = middle + 1
    return found


class _Meter:
    """A model and windows of a text, on which caches are measured."""

    def __init__(self, model: Any, rows: Tensor, kind: str | None, progress: Progress) -> None:
        self.model, self.rows, self.kind, self.progress = model, rows, kind, progress
        self.heads = CacheShape.of(model, windows=True)

    def bytes_of(self, cache: EngineCache, skip: Sequence[int] = ()) -> int:
        """Bytes of one sequence as long as a window."""
        plain, dim = ENGINE_CACHES[PLAIN], self.heads.head_dim
        tokens = self.heads.tokens_of(self.rows.shape[1])
        by_layer = [n * (plain if i in skip else cache).bytes_of(dim) for i, n in enumerate(tokens)]
        return round(2 * self.heads.heads * sum(by_layer))

    def all_caches(self) -> dict[str, CacheCost]:
        """What each cache costs on all windows, in all layers; that of 16 bits costs nothing."""
        dim = self.heads.head_dim
        costs = {
            c.name: CacheCost(
                dtype=c.name, bytes=self.bytes_of(c), runs=c.runs, refused=refusal(c.name, self.kind, dim)
            )
            for c in ENGINE_CACHES.values()
        }
        skipped = {n for n, cost in costs.items() if cost.refused and (n != "fp8_e5m2" or self.kind == "fp-head")}
        names = [n for n in costs if n != PLAIN and n not in skipped]
        variants = [self._held(n) for n in names]
        if self.kind is not None:
            names, variants = [*names, UNSCALED], [*variants, held_layers(self.model, "fp8", None, self.heads.layers)]
            costs[UNSCALED] = replace(costs["fp8"], dtype=UNSCALED, refused="vLLM takes the scales of the file")
        found = self._divergences(variants, self.rows, "caches of vLLM")
        measured = {n: _with_figures(costs[n], x) for n, x in zip(names, found, strict=True)}
        return costs | measured | {PLAIN: replace(costs[PLAIN], kl=0.0)}

    def with_plain(self, cost: CacheCost, skip: tuple[int, ...]) -> CacheCost:
        """The cache with these layers in 16 bits."""
        cache = ENGINE_CACHES[cost.dtype]
        title = f"{cache.name} with {len(skip)} layers in 16 bits"
        (found,) = self._divergences([self._held(cache.name, skip)], self.rows, title)
        return _with_figures(replace(cost, skip=skip, bytes=self.bytes_of(cache, skip)), found)

    def layers(self, cache: EngineCache) -> tuple[float, ...]:
        """What the cache costs in each layer alone, on the first windows."""
        every = range(self.heads.layers)
        alone = [self._held(cache.name, tuple(j for j in every if j != i)) for i in every]
        windows, tokens = RANKED_ON
        found = self._divergences(alone, self.rows[:windows, :tokens], f"{cache.name} in single layers")
        return tuple(float(x.mean()) for x in found)

    def _held(self, name: str, skip: Sequence[int] = ()) -> list[Held]:
        return held_layers(self.model, name, self.kind, self.heads.layers, frozenset(skip))

    @torch.inference_mode()
    def _divergences(self, variants: Sequence[list[Held]], rows: Tensor, title: str) -> list[Tensor]:
        """KL divergences of the windows, float64 [windows], of each variant."""
        self.progress.start(title, len(rows) * len(variants))
        found: list[list[Tensor]] = [[] for _ in variants]
        for ids in rows:
            reference = self._log_probabilities(ids, self._held(PLAIN))
            for kept, layers in zip(found, variants, strict=True):
                other = self._log_probabilities(ids, layers)
                pieces = zip(reference.split(_PIECE), other.split(_PIECE), strict=True)
                kept.append(torch.cat([divergence(p, q) for p, q in pieces]).mean().cpu())
                self.progress.step()
        return [torch.stack(kept).double() for kept in found]

    def _log_probabilities(self, ids: Tensor, layers: list[Held]) -> Tensor:
        """Of the second half of a window, float32 [tokens, vocabulary]."""
        kept = len(ids) - len(ids) // 2
        through = with_cache(self.model, ReadBackCache(layers))
        ids = ids[None].to(self.model.device)
        logits = self.model(input_ids=ids, **through, use_cache=True, logits_to_keep=kept).logits
        return torch.log_softmax(logits[0, -kept:].float(), dim=-1)


def _with_figures(cost: CacheCost, by_window: Tensor) -> CacheCost:
    interval, several = bootstrap_ci(by_window), len(by_window) > 1
    low, high = interval.ends if several else (None, None)
    return replace(cost, kl=interval.mean, low=low, high=high)


def card_section(found: CacheMeasurement) -> str:
    """What the card of a result says of its KV cache, in Markdown."""
    chosen = found.chosen
    skip = f", layers {', '.join(map(str, chosen.skip))} in 16 bits" if chosen.skip else ""
    among = "" if found.candidates == candidates_of(None) else f" among {', '.join(found.candidates)}"
    windows = f"{found.windows} window{'s' if found.windows > 1 else ''}"
    head = (
        f"Measured at {found.context:,} tokens, in {windows}, against the same file with a cache in 16 bits "
        f"({found.plain_bytes / 1e6:.2f} MB). Smallest cache of vLLM{among} within {found.limit:g} nats a token: "
        f"`{chosen.dtype}`{skip}."
    )
    rows = ["| --kv-cache-dtype | layers in 16 bits | MB | KL divergence, nats a token | vLLM |", "|" + " --- |" * 5]
    for cost in found.caches:
        if cost.kl is None:
            continue
        span = "" if cost.low is None else f" [{cost.low:.2g}, {cost.high:.2g}]"
        layers = ", ".join(map(str, cost.skip)) or "none"
        where = f"no: {cost.refused}" if cost.refused else cost.runs
        rows.append(f"| `{cost.dtype}` | {layers} | {cost.bytes / 1e6:.2f} | {cost.kl:.2g}{span} | {where} |")
    return "\n".join(["## KV cache", "", head, "", *rows])
