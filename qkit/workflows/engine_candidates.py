"""The formats that a budget may choose from where an engine was asked for (--engine, --tp): those that it loads."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from qkit.errors import UsageError
from qkit.families.structure import ModelStructure
from qkit.planning.engine_rules import LLAMA_CPP, TITLES, loads_in
from qkit.planning.request import Request
from qkit.sensitivity.candidates import Candidate, parse_candidates
from qkit.sensitivity.profile import KEPT, Profile
from qkit.sensitivity.units import Unit, profiled_units, unit_bytes, unit_format
from qkit.tensor.formats import layout
from qkit.verification.model_engines import LinearStorage


def loadable_choices(profile: Profile, structure: ModelStructure, request: Request) -> Profile:
    """The profile without choices that the engine of the request does not load, with the bytes that they have on its GPUs.

    Raises UsageError where a unit has no choice left.
    """
    ranks = request.tp or 1
    if request.engine not in (*TITLES, LLAMA_CPP) and ranks == 1:
        return profile
    recipe = {"engine": request.engine or "default", "gpu": request.gpu, "tp": ranks}
    units = {unit.key: unit for unit in profiled_units(structure, profile.request)}
    candidates = {name: _candidate(name, profile) for name in profile.candidates if name != KEPT}
    config, kept = structure.checkpoint.config, []
    answers: dict[Any, bool] = {}
    for u in profile.units:
        unit, choices = units[u.key], {}
        for name, cost in u.choices.items():
            if name == KEPT or unit.is_end:
                choices[name] = cost
                continue
            candidate = candidates[name]
            key = (name, *((x.name.rpartition(".")[2], x.shape) for x in unit.linears))
            if key not in answers:
                answers[key] = _is_loaded(unit, candidate, recipe, config)
            size = unit_bytes(unit, candidate, structure, ranks)
            if answers[key] and size is not None:
                choices[name] = replace(cost, bytes=size)
        if not choices:
            raise UsageError(
                f"--engine {request.engine}: it loads {u.linears[0]} in none of {', '.join(u.choices)}: add bf16 to "
                "--candidates, or other formats"
            )
        kept.append(replace(u, choices=choices))
    return replace(profile, units=tuple(kept))


def _candidate(name: str, profile: Profile) -> Candidate:
    """A candidate by its name in a profile, with the group size that it was measured with."""
    return parse_candidates(name, profile.request.get("group_sizes", {}).get(name))[0]


def _is_loaded(unit: Unit, candidate: Candidate, recipe: dict[str, Any], config: dict[str, Any]) -> bool:
    scheme, engine = candidate.scheme, recipe["engine"]
    if scheme is None or engine not in (*TITLES, LLAMA_CPP):
        return True
    if scheme.weights.gguf or engine == LLAMA_CPP:
        return scheme.weights.gguf and engine == LLAMA_CPP
    if candidate.outliers or candidate.rank:
        return False  # they are stored under qkit's own method
    weights = unit_format(unit, candidate, recipe["tp"])
    if weights is None:
        return False
    packing = layout(weights, scheme.activations)
    parts = {x.name: LinearStorage(weights, scheme.activations, packing, x.shape) for x in unit.linears}
    return loads_in(recipe, parts, config)
