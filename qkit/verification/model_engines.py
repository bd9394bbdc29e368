"""The engines that load a whole model: the answers of ``engine_fits`` for all combinations of formats in it, put together.

``verify`` asks it of what it read back, ``plan`` of what it is about to make.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

from qkit.verification.cache_engines import with_cache
from qkit.verification.engine_types import PLATFORMS, EngineFit, ModelFacts, Selected
from qkit.verification.engines import diffusion_fit, engine_fits, holds_siglip
from qkit.verification.fused_layers import expert_groups, fused_groups
from qkit.verification.layout_engines import LAYOUTS, layout_fits
from qkit.verification.loaded_layers import Split, loaded_layers
from qkit.verification.vllm_table import NumberFormat

_NO_COMMON = "no one kind of GPU loads all of its formats"
# Begins the reason of layers that no loader of the model's class looks at (``--unloaded``): they decide nothing for it.
_NOT_LOADED = "the model's class does not load it"


@dataclass(frozen=True)
class LinearStorage:
    """The storage of one linear [out, in]. packing: the name of its layout in compressed-tensors; uses: of a matrix outside
    the blocks, "embeddings", "head" or both"""

    weights: NumberFormat
    activations: NumberFormat | None
    packing: str
    shape: tuple[int, int]
    uses: tuple[str, ...] = ()

    @property
    def kind(self) -> tuple[NumberFormat, NumberFormat | None, str]:
        """The combination of formats and layout that groups linears into one row."""
        return self.weights, self.activations, self.packing


@dataclass(frozen=True, kw_only=True)
class Deployment:
    """What a file is to run on. platforms: kinds of GPU, or "cpu"; ranks: GPUs that share the model; selected: what vLLM's own
    code said about it, where it was asked"""

    platforms: tuple[str, ...] = PLATFORMS
    ranks: int = 1
    selected: Selected | None = None


ANYWHERE = Deployment()


@dataclass(frozen=True, kw_only=True)
class EngineRow(EngineFit):
    """One row of the engine table: how one engine loads the linears of one combination, which are so many."""

    weights: str
    activations: str
    packing: str
    linears: int


@dataclass(frozen=True)
class EngineLine:
    """The answer of one engine for the whole model. classes: the classes that load its linears; notes: limits, or why it
    does not load; known: how the answer is known; platforms: the kinds of GPU that load all of it"""

    engine: str
    loads: bool
    classes: tuple[str, ...]
    notes: tuple[str, ...]
    known: str
    platforms: tuple[str, ...] = ()

    def __str__(self) -> str:
        verb = "loads" if self.loads else "does not load"
        notes = f": {'; '.join(self.notes)}" if self.notes else ""
        return f"the result {verb} in {self.engine}{notes} [{self.known}]"


def engine_rows(
    parts: Mapping[str, LinearStorage],
    skipped: Mapping[str, str],
    config: Mapping[str, Any],
    method: str,
    refusal: str = "",
    on: Deployment = ANYWHERE,
    cache: str = "",
) -> list[EngineRow]:
    """One row for every combination of formats and every engine.

    parts: the quantized linears by checkpoint name; skipped: the others, with reasons; config: config.json
    method: its quant_method
    refusal: why stock transformers does not load it, where the writer knew; on: what it is to run on; cache: the kind of the
    static scales of a KV cache
    """
    split = Split.of(config, on.ranks)
    names: dict[tuple[tuple[NumberFormat, NumberFormat | None, str], tuple[str, ...]], list[str]] = {}
    for name, part in parts.items():
        names.setdefault((part.kind, part.uses), []).append(name)
    about = _about(parts, skipped, config)
    model_facts = replace(about, refusal=refusal, platforms=on.platforms, ranks=on.ranks, unshared=split.problem)
    rows = []
    for ((weights, activations, packing), uses), members in names.items():
        layers = loaded_layers({name: parts[name] for name in members}, split)
        facts = replace(model_facts, experts=bool(expert_groups(members)), uses=uses, layers=layers)
        fits = diffusion_fit(config) or (
            layout_fits(weights, activations, packing, method, facts, on.selected)
            if method in LAYOUTS
            else with_cache(engine_fits(weights, activations, packing, method, facts, on.selected), cache, on.platforms)
        )
        inputs = str(activations) if activations else "as they are"
        rows += [
            EngineRow(
                weights=str(weights),
                activations=inputs,
                packing=packing,
                linears=len(members),
                **vars(fit),
            )
            for fit in fits
        ]
    return rows


def engine_lines(rows: Sequence[EngineRow]) -> list[EngineLine]:
    """One line for every engine; each limit once, with the weights that it is about where others are free of it."""
    lines = []
    for engine in dict.fromkeys(row.engine for row in rows):
        entries = [row for row in rows if row.engine == engine]
        shown_rows = [row for row in entries if row.loads_as is None] or entries
        by_note: dict[str, list[str]] = {}
        for row in shown_rows:
            for limit in row.limits:
                by_note.setdefault(limit, []).append(row.weights)
        notes = [
            n if len(of) == len(entries) or of[0] in n else f"{n} ({', '.join(dict.fromkeys(of))})"
            for n, of in by_note.items()
        ]
        classes = tuple(dict.fromkeys(row.loads_as for row in entries if row.loads_as))
        loads = shown_rows is entries or all(row.loads_as for row in entries)
        limited = [row.platforms for row in entries if row.kernels]
        platforms = tuple(p for p in (limited[0] if limited else ()) if all(p in of for of in limited))
        if loads and limited and not platforms:
            loads, notes = False, [_NO_COMMON, *notes]
        how = " and ".join(dict.fromkeys(row.known for row in entries if row.known))
        lines.append(EngineLine(engine, loads, classes, tuple(notes), how, platforms))
    return lines


def _about(parts: Mapping[str, LinearStorage], skipped: Mapping[str, str], config: Mapping[str, Any]) -> ModelFacts:
    """What of the whole model decides."""
    names = [*parts, *skipped]
    loaded = [*parts, *(n for n, why in skipped.items() if not why.startswith(_NOT_LOADED))]
    fused, experts = fused_groups(names), expert_groups(names)
    mixed_group = next((g for g in fused if len(_kinds(parts, g)) > 1), None)
    uneven = next((u for g in fused for u in pairwise(g) if _ends_within(parts.get(u[0]))), None)
    inner = config.get("text_config")
    text = inner if isinstance(inner, Mapping) else config
    kinds = config.get("architectures")
    kind = str(kinds[0]) if isinstance(kinds, list) and kinds else ""
    return ModelFacts(
        model_type=str(text.get("model_type")),
        kind=kind,
        images="vision_config" in config,
        dtype=_dtype(text),
        siglip=holds_siglip(config, parts),
        torn=f"{', '.join(_leaf(n) for n in mixed_group)} of {mixed_group[0].rpartition('.')[0]}"
        if mixed_group
        else "",
        uneven=f"{uneven[0]} as one with {_leaf(uneven[1])}" if uneven else "",
        torn_experts=next((layer for layer, g in experts.items() if len(_kinds(parts, g)) > 1), ""),
        several_experts=len(_kinds(parts, [n for g in expert_groups(loaded).values() for n in g])) > 1,
    )


def _dtype(config: Mapping[str, Any]) -> str:
    """What vLLM computes in: it takes float32 models in 16 bits."""
    named = str(config.get("dtype") or config.get("torch_dtype") or "")
    return "float16" if named.endswith("float16") and not named.endswith("bfloat16") else "bfloat16"


def _kinds(parts: Mapping[str, LinearStorage], names: Iterable[str]) -> set[object]:
    return {parts[n].kind if n in parts else None for n in names}


def _ends_within(part: LinearStorage | None) -> bool:
    """Whether its last rows share a block with the first of what is loaded behind it."""
    block = None if part is None else part.weights.block
    return part is not None and block is not None and part.shape[0] % block[0] > 0


def _leaf(name: str) -> str:
    return name.rpartition(".")[2]
