"""The place of a profile's unit: its block and its kind, read from its names."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass

from qkit.sensitivity.profile import Profile, UnitProfile


@dataclass(frozen=True)
class Place:
    """The place of a unit. block: the path of its block, for instance model.layers.3, empty where names have no number;
    kind: the linears in it, for instance q,k,v."""

    block: str
    kind: str


def places(profile: Profile) -> dict[str, Place]:
    """The place of each unit, {unit key: place}. Kinds are leaf names; with their parents where two units of a block have
    the same leaves."""
    leaves = {u.key: Place(_block(u), _leaves(u)) for u in profile.units}
    repeated = {p.kind for p, count in Counter(leaves.values()).items() if count > 1}
    with_parents = {u.key: Place(_block(u), _paths(u)) for u in profile.units}
    unit_places = {k: with_parents[k] if p.kind in repeated else p for k, p in leaves.items()}
    ambiguous = {p for p, count in Counter(unit_places.values()).items() if count > 1}
    return {k: Place(p.block, k) if p in ambiguous else p for k, p in unit_places.items()}


def block_labels(profile: Profile) -> dict[str, str]:
    """The label of each block, in running order: its number, with the list's name where the model has several lists."""
    blocks = list(dict.fromkeys(_block(u) for u in profile.units))
    lists = {b.rpartition(".")[0] for b in blocks if b}
    if len(lists) < 2:
        return {b: b.rpartition(".")[2] or "-" for b in blocks}
    return {b: ".".join(b.split(".")[-2:]) or "-" for b in blocks}


def _block(unit: UnitProfile) -> str:
    match = re.match(r"(.*?\.)?\d+(?=\.)", unit.linears[0])  # the first number: experts are numbered within a block
    return match[0] if match else ""


def _leaf_names(unit: UnitProfile) -> list[tuple[str, str]]:
    """(parents inside the block, leaf) of every linear; _proj is in most names and tells nothing."""
    block = _block(unit)
    parts = []
    for name in unit.linears:
        parent, _, leaf = name.removeprefix(f"{block}.").rpartition(".")
        parts.append((parent, leaf.removesuffix("_proj")))
    return parts


def _leaves(unit: UnitProfile) -> str:
    return ",".join(dict.fromkeys(leaf for _, leaf in _leaf_names(unit)))


def _paths(unit: UnitProfile) -> str:
    parent = _leaf_names(unit)[0][0]
    return f"{parent}.{_leaves(unit)}" if parent else _leaves(unit)
