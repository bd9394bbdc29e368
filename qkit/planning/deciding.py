"""The decision for one linear: its formats, with a group size that its width and the engine allow."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from qkit.errors import Unsupported
from qkit.families.blocks import BlockSequence, Linear
from qkit.planning.linear_plan import LinearPlan
from qkit.planning.recipe import Recipe, Rule, parse_method
from qkit.tensor.formats import Format, Scheme, fit_group
from qkit.tensor.input_transform import hadamard_block
from qkit.tensor.sparse import outlier_count
from qkit.transforms.residual import residual_channels
from qkit.verification.loaded_layers import ENDS_BRANCH

_FP8_INPUTS = 128  # the group of integers of 4 bits with FP8 inputs: vLLM loads no other


def with_units(sequence: BlockSequence) -> Iterator[tuple[Linear, tuple[Linear, ...]]]:
    """Every linear, in file order, with those that have to share its format and group size."""
    for block in sequence.blocks:
        for groups in block.units:
            unit = tuple(x for g in groups for x in g.linears)
            yield from ((x, unit) for g in groups for x in g.linears)


def kept_whole(unit: Sequence[Linear], recipe: Recipe, rule: Rule | None) -> str | None:
    """Why linears that share a format stay in 16 bits for the engine that was asked for; None where they do not.

    Only formats with groups of a fixed size have no other group, or one scale per channel, for a width that they do not divide.
    """
    if recipe.engine not in ("vllm", "transformers") or recipe.strict:
        return None
    scheme, _, _ = recipe.resolve(rule)
    fixed = _fixed_group(scheme)
    misfit = next((x for x in unit for g in fixed if split_width(x, recipe.tp) % g), None)
    if misfit is None:
        return None
    wide = f"{misfit.name.rpartition('.')[2]} has {misfit.shape[1]} input columns"
    ranks = f" for {recipe.tp} ranks" if recipe.tp > 1 else ""
    return f"{wide}{ranks}, which {scheme.name} cannot cut into groups of {max(fixed)}: it stays in 16 bits"


def _fixed_group(scheme: Scheme) -> set[int]:
    """The groups that a scheme has and that nothing can replace."""
    groups = {f.group for f in (scheme.weights, scheme.activations) if f is not None and f.group and f.scale != "model"}
    if scheme.activations is not None and scheme.activations.group:
        groups.add(scheme.activations.group)
    if scheme.weights.kind == "int" and scheme.activations is not None and scheme.activations.kind == "fp8":
        groups.add(_FP8_INPUTS)
    return {g for g in groups if g is not None}


def split_width(linear: Linear, ranks: int) -> int:
    """The input columns that groups have to divide: those of one rank where an engine splits them."""
    columns = linear.shape[1]
    splits = linear.name.rpartition(".")[2] in ENDS_BRANCH and not columns % ranks
    return columns // ranks if splits else columns


def _fitted(scheme: Scheme, linear: Linear, unit: Sequence[Linear], recipe: Recipe, rule: Rule | None) -> Format:
    """The weight format. A group that was asked for stays where it divides the width, whatever the engine makes of it."""
    try:
        weights = fit_group(scheme.weights, linear.shape[1], strict=recipe.strict)
    except Unsupported as e:
        raise Unsupported(f"{linear.name}: {e}") from e
    if weights.scale != "model":
        return weights
    given = recipe.group_size is not None or (rule is not None and rule.group_size is not None)
    ranks = 1 if given else recipe.tp
    return fit_group(scheme.weights, *sorted({split_width(x, ranks) for x in unit}))


def decide(linear: Linear, unit: Sequence[Linear], recipe: Recipe, rule: Rule | None) -> LinearPlan:
    """unit: all linears that share its group size"""
    scheme, solver, options = recipe.resolve(rule)
    weights = _fitted(scheme, linear, unit, recipe, rule)
    if scheme.activations is not None:
        group = scheme.activations.group
        if group is not None and linear.shape[1] % group:
            raise Unsupported(
                f"{linear.name}: scheme {scheme.name} quantizes activations in groups of {group}, which do not divide "
                f"its {linear.shape[1]} input columns: choose another scheme, or skip the layer with a rule"
            )
    notes, transforms = [], parse_method(recipe.method)[0]
    if weights.gguf and weights != scheme.weights:
        notes.append(f"{weights.name}: {linear.shape[1]} columns are not a multiple of {scheme.weights.columns}")
    elif weights.group != scheme.weights.group:
        notes.append(_regrouped(weights, scheme.weights, linear, unit, recipe.tp))
    if rule is not None and isinstance(rule.match, str):  # one that names its layers says nothing more
        notes.append(f"rule {rule.match!r}")
    return LinearPlan(
        name=linear.name,
        shape=linear.shape,
        scheme=weights.name.upper() if weights.gguf else scheme.name,
        weights=weights,
        activations=scheme.activations,
        solver=solver,
        options=options,
        outliers=outlier_count(recipe.outliers_of(linear.name), linear.shape),
        rank=recipe.rank_of(linear.name),
        rotation=hadamard_block(linear.shape[1]) if "hadamard" in transforms else 0,
        residual=residual_channels(scheme.activations, linear.shape[1], options["share"])
        if "residual" in transforms
        else 0,
        note="; ".join(notes),
    )


def _regrouped(weights: Format, asked: Format, linear: Linear, unit: Sequence[Linear], ranks: int) -> str:
    """Why a linear has another group than was asked for."""
    grouping = f"group size {weights.group}" if weights.group else "one scale per channel"
    unit_width = asked.group or 1
    odd = next((x for x in unit if x.shape[1] % unit_width), None)
    if odd is None:
        split = next(x for x in unit if split_width(x, ranks) % unit_width)
        return (
            f"{grouping}: {split.shape[1]} columns are {split_width(split, ranks)} on each of {ranks} ranks, not a multiple of "
            f"{asked.group}"
        )
    owner = "" if odd.shape[1] == linear.shape[1] else " of another projection of the experts"
    return f"{grouping}: {odd.shape[1]} columns{owner} are not a multiple of {asked.group}"
