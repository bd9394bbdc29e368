"""The rules of engines for layers that they load as one: one format, one group size, and shapes that their kernels support.

These are rules of engines and not of the formats: qkit runs such layers one by one. A recipe with ``engine: any`` lifts
them, and the plan then says which engines will not load the result (``qkit.verification.engines``).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from qkit.errors import BadRecipe, Unsupported
from qkit.families.blocks import BlockStructure, Group, LinearGroup
from qkit.families.structure import ModelStructure
from qkit.planning.engine_rules import deployment
from qkit.planning.gguf import GGUF
from qkit.planning.kept import KEPT
from qkit.planning.stock_loader import stock_refusal
from qkit.tensor.formats import layout
from qkit.verification.engine_types import Selected
from qkit.verification.gguf_engines import gguf_rows
from qkit.verification.model_engines import EngineLine, EngineRow, LinearStorage, engine_lines, engine_rows

if TYPE_CHECKING:
    from qkit.planning.linear_plan import LinearPlan
    from qkit.planning.plan import Plan

ANY = "any"  # in a recipe: the result is for whatever engine loads it
_APART = (ANY, "transformers")  # engines that load every layer by itself, but for experts
LIFT = "or write 'engine: any' at the top of a recipe, for engines that load every layer by itself"
_FP8_GROUP = 128  # of integers of 4 bits with FP8 inputs: vLLM 0.32 refuses every other


def fused_linears(
    structure: ModelStructure, linears: Mapping[str, LinearPlan], engine: str
) -> tuple[tuple[str, ...], ...]:
    """Names of the linears that engines load as one and that have one format, group after group.

    Raises BadRecipe where rules give such linears two formats, or the experts of a layer, unless ``engine`` is ANY; and, in
    any case, where only some linears of the experts of a layer are quantized.
    """
    fused: list[tuple[str, ...]] = []
    for block in structure.every_block:
        for groups in block.units:
            names = [x.name for g in groups for x in g.linears]
            torn = len({_kind(linears.get(name)) for name in names}) > 1
            experts = groups[0].expert is not None
            if torn and (engine not in _APART or (experts and not all(name in linears for name in names))):
                raise BadRecipe(_torn_message(names, linears, experts, engine))
            named_groups = [tuple(x.name for x in g.linears) for g in groups if len(g.linears) > 1]
            fused += [
                names_of_group
                for names_of_group in named_groups
                if len({_kind(linears.get(name)) for name in names_of_group}) == 1
            ]
    for group in fused:
        _check_solved_together(group, [linears[name] for name in group if name in linears])
    return tuple(fused)


def _check_solved_together(names: tuple[str, ...], planned: list[LinearPlan]) -> None:
    """Raises BadRecipe for linears with a scale in common that rules give several solvers, or options of one."""
    shares = any(p.weights.scale == "e4m3" or p.weights.strategy == "tensor" for p in planned)
    if shares and any(_task(p) != _task(planned[0]) for p in planned):
        solvers = ", ".join(f"{p.name.rpartition('.')[2]} {p.solver}" for p in planned)
        raise BadRecipe(
            f"{names[0].rpartition('.')[0]}: the rules give {solvers}, or options that differ, but these layers share a "
            f"scale of {planned[0].scheme} and are solved together: write a rule that covers all of them"
        )


def check_shapes(structure: ModelStructure, linears: Mapping[str, LinearPlan], engine: str) -> None:
    """Raises Unsupported for formats that no kernel of vLLM supports in these shapes, unless ``engine`` is ANY."""
    if engine in _APART:
        return
    for p in linears.values():
        acts = p.activations
        if acts is not None and acts.kind == "fp8" and p.weights.kind == "int" and p.weights.group != _FP8_GROUP:
            grouping = f"groups of {p.weights.group}" if p.weights.group else "one scale per channel"
            raise Unsupported(
                f"{p.name}: scheme {p.scheme} would get {grouping} for its {p.shape[1]} input columns, and vLLM, whose "
                f"kernel it is for, loads groups of {_FP8_GROUP} alone: use w4a16 or fp8_dynamic for this layer, {LIFT}"
            )
    for block in structure.every_block:
        for group in block.groups:
            for x in group.linears[:-1]:  # the last part may end within a block
                planned = linears.get(x.name)
                rows = planned.weights.block[0] if planned is not None and planned.weights.block else 1
                if x.shape[0] % rows:
                    raise Unsupported(
                        f"{x.name}: its {x.shape[0]} output rows are not a multiple of {rows}, and vLLM loads it as one with "
                        f"{group.linears[-1].name.rpartition('.')[2]} in blocks of {rows} rows: use fp8_dynamic for these "
                        f"layers, {LIFT}"
                    )


def engine_rows_of(plan: Plan, structure: ModelStructure, selected: Selected | None = None) -> list[EngineRow]:
    """The engine table of the result of a plan. selected: what vLLM's own code said of it, where it was asked"""
    if plan.export == GGUF:
        return gguf_rows(p.weights.name for p in plan.packed.values())
    storage = {
        n: LinearStorage(p.weights, p.activations, layout(p.weights, p.activations), p.shape, p.uses)
        for n, p in plan.packed.items()
    }
    refusal = stock_refusal(plan, structure)
    on = replace(deployment(plan.recipe), selected=selected)
    cache = str(plan.kv["kind"]) if plan.kv is not None and plan.static_cache else ""
    return engine_rows(storage, plan.skipped, structure.checkpoint.config, plan.export, refusal or "", on, cache)


def engine_lines_of(plan: Plan, structure: ModelStructure) -> list[EngineLine]:
    """One line for every engine: whether it will load the result of a plan."""
    return engine_lines(engine_rows_of(plan, structure))


def split_apart(block: BlockStructure, linears: Mapping[str, LinearPlan]) -> BlockStructure:
    """The block with one group for each format, solver and set of its options, where a group has linears of several: they are
    solved one after the other.

    Nothing can be folded into what such linears read: a scale for one of them would be another's too.
    """
    groups: list[LinearGroup] = []
    for group in block.groups:
        tasks = list(dict.fromkeys(_task(linears.get(x.name)) for x in group.linears))
        if len(tasks) == 1:
            groups.append(group)
            continue
        for task in tasks:
            members = tuple(x for x in group.linears if _task(linears.get(x.name)) == task)
            hook = group.hook if group.expert is not None else members[0].param.removesuffix(".weight")
            groups.append(replace(group, linears=members, declared=Group(()), hook=hook))
    return replace(block, groups=tuple(groups))


def _kind(p: LinearPlan | None) -> object:
    return None if p is None else (p.weights, p.activations)


def _task(p: LinearPlan | None) -> object:
    return None if p is None else (_kind(p), p.solver, tuple(sorted(p.options.items())))


def _torn_message(names: list[str], linears: Mapping[str, LinearPlan], experts: bool, engine: str) -> str:
    """Which layer, what its parts were given, and what to do, in a sentence."""
    by_leaf: dict[str, dict[str, None]] = {}
    for name in names:
        by_leaf.setdefault(name.rpartition(".")[2], {})[_describe(linears.get(name))] = None
    schemes = ", ".join(f"{leaf} {' and '.join(kinds)}" for leaf, kinds in by_leaf.items())
    layer = names[0].rpartition(".experts.")[0] + ".experts" if experts else names[0].rpartition(".")[0]
    if experts and engine == ANY:
        return (
            f"{layer}: the rules give {schemes}, and no engine loads experts of which some are skipped: write a rule that "
            "covers all of them"
        )
    keeps = any(name in linears and linears[name].solver == KEPT for name in names)
    advice = "let --keep-source (keep: true in a recipe) cover" if keeps else "write a rule that covers"
    reason = "engines run all experts of a layer as one product" if experts else "engines load these layers as one"
    return (
        f"{layer}: the rules give {schemes}, but {reason} and need one scheme and one group size: {advice} "
        f"all of them, {LIFT}"
    )


def _describe(p: LinearPlan | None) -> str:
    if p is None:
        return "skipped"
    return p.scheme if p.weights.group is None else f"{p.scheme} (group {p.weights.group})"
