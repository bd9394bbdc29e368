"""A profile: what every unit costs in every candidate, in nats and in bytes. Made once, read by every later command."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qkit import loading
from qkit.calibration import Calibration
from qkit.catalog import PROFILE, check_measures
from qkit.errors import BadInput
from qkit.families.outline import Outline
from qkit.folder import load_json
from qkit.parallel import Workers
from qkit.plan import Plan
from qkit.run import Progress
from qkit.safefile import write_atomic
from qkit.schema import ProfileFile, checked
from qkit.sensitivity.candidates import Candidate
from qkit.sensitivity.decomposition import decomposition_file, load_decomposition
from qkit.sensitivity.ledger import Ledger
from qkit.sensitivity.measures import Bench, measured
from qkit.sensitivity.probes import Probes, probes
from qkit.sensitivity.subject import Subject
from qkit.sensitivity.units import Unit, parts_named, unit_bytes, units_of

VERSION = 3
FILE = PROFILE
MEASURED = "measured.jsonl"
KEPT = "keep"  # the candidate that leaves weights as they are
LIMIT = 1 << 28


@dataclass(frozen=True)
class Choice:
    """bytes of the unit as stored; costs by measure, in the measure's unit (0 for a unit that is kept)."""

    bytes: int
    costs: dict[str, float]


@dataclass(frozen=True)
class UnitProfile:
    """linears: checkpoint names; weights: how many; choices: by candidate name, only those that can be applied."""

    key: str
    linears: tuple[str, ...]
    weights: int
    choices: dict[str, Choice]


@dataclass(frozen=True)
class Profile:
    """What was measured, of which model, and how.

    fingerprint: of the checkpoint; fixed_bytes: of all tensors that no unit holds
    whole:       by candidate, the measured loss change and KL divergence with all units at it
    request:     method, group sizes, calibration: what the probes were made with
    """

    fingerprint: str
    request: dict[str, Any]
    candidates: tuple[str, ...]
    measures: tuple[str, ...]
    base_loss: float
    fixed_bytes: int
    units: tuple[UnitProfile, ...]
    whole: dict[str, dict[str, float]]

    def save(self, folder: Path) -> None:
        """Write profile.json."""
        data = {"version": VERSION, **asdict(self)}
        write_atomic(folder / FILE, (json.dumps(data, indent=1, sort_keys=True) + "\n").encode())

    @staticmethod
    def load(folder: Path) -> Profile:
        """Raises BadInput for a folder without a profile of this version."""
        file = folder / FILE
        if not file.is_file():
            raise BadInput(
                f"{file}: no such profile: make it with 'qkit profile --model .. --candidates .. --out {folder}'"
            )
        data = load_json(file, "profile", LIMIT)
        if not isinstance(data, dict) or data.pop("version", None) != VERSION:
            raise BadInput(f"{file}: not a profile of this version of qkit: make it again")
        checked(ProfileFile, data, f"{file}: damaged", "make it again", BadInput)
        units = tuple(
            UnitProfile(
                u["key"],
                tuple(u["linears"]),
                u["weights"],
                {k: Choice(c["bytes"], {m: float(x) for m, x in c["costs"].items()}) for k, c in u["choices"].items()},
            )
            for u in data.pop("units")
        )
        data = {**data, "candidates": tuple(data["candidates"]), "measures": tuple(data["measures"])}
        made = Profile(units=units, **data)
        if fault := made._fault():
            raise BadInput(f"{file}: damaged: {fault}: make it again")
        return made

    def _fault(self) -> str | None:
        """What names something that is not there."""
        known = set(self.candidates)
        sizes = self.request["group_sizes"].keys(), self.request["outliers"].keys()
        for unit in self.units:
            if unknown := unit.choices.keys() - known:
                return f"{unit.key} has a choice {min(unknown)} that is no candidate"
            lacking = next((n for n, c in unit.choices.items() if not c.costs.keys() >= set(self.measures)), None)
            if lacking is not None:
                return f"{unit.key}, {lacking}: not every measure has a cost"
        if len({u.key for u in self.units}) < len(self.units):
            return "two units have one key"
        lost = next((n for n in self.candidates if n != KEPT and not all(n in names for names in sizes)), None)
        return None if lost is None else f"nothing says how {lost} was made"

    @staticmethod
    def decomposition(folder: Path, candidate: str) -> dict[str, Tensor]:
        """What rows, columns and single weights add to ``pqi`` costs, where that measure was taken of this candidate.

        {"<candidate>:<linear>:<part>": tensor}; parts and dtypes are those of ``decomposition.py``. Raises BadInput where
        there is none, or one of another profile.
        """
        made, found = Profile.load(folder), load_decomposition(folder, candidate)
        for unit in made.units:
            cost = unit.choices[candidate].costs.get("pqi") if candidate in unit.choices else None
            rows = [found.get(f"{candidate}:{n}:rows", torch.full((1,), torch.nan)) for n in unit.linears]
            total = sum(float(r.sum(dtype=torch.float64)) for r in rows)
            size = sum(float(r.abs().sum(dtype=torch.float64)) for r in rows)
            if cost is None or not abs(total - cost) <= 1e-4 * size:
                raise BadInput(
                    f"{decomposition_file(folder, candidate)}: not the decomposition of {FILE} beside it ({unit.key}): delete "
                    "it and run 'qkit profile' of this folder again with --measures pqi"
                )
        return found


def identity(outline: Outline, request: dict[str, Any], rows: Calibration) -> dict[str, Any]:
    """What every measurement depends on, but for the candidate that it is of: by option. rows: that losses are measured on."""
    options = {
        f"--{name.replace('_', '-')}": request[name] for name in ("method", "samples", "seqlen", "points", "rows")
    }
    group = {"--group-size": request["group_size"]}
    return {"--model": outline.checkpoint.fingerprint()[:16], **options, **group, "--calib": f"rows {rows.digest[:16]}"}


def profile_of_shapes(
    outline: Outline, candidates: tuple[Candidate, ...], measures: tuple[str, ...], request: dict[str, Any]
) -> Profile:
    """What is known of a profile before anything is measured: its units and the bytes of their choices. Every cost is 0."""
    profiles = []
    for unit in units_of(outline, parts_named(request)):
        sizes = {c.name: size for c in candidates if (size := unit_bytes(unit, c, outline)) is not None}
        choices = {name: Choice(size, dict.fromkeys(measures, 0.0)) for name, size in sizes.items()}
        profiles.append(UnitProfile(unit.key, tuple(x.name for x in unit.linears), unit.weights, choices))
    inside = {f"{n}.weight" for u in profiles for n in u.linears}
    fixed = sum(t.nbytes for n, t in outline.checkpoint.tensors.items() if n not in inside and n not in outline.tied)
    names = tuple(c.name for c in candidates)
    return Profile(outline.checkpoint.fingerprint(), request, names, measures, 0.0, fixed, tuple(profiles), {})


def _with_costs(unit: UnitProfile, costs: Mapping[str, Mapping[tuple[str, str], float]]) -> UnitProfile:
    """costs: {measure: {(unit, candidate): cost}}; one that a measure says nothing of stays 0."""
    choices = {
        name: Choice(c.bytes, {m: costs[m].get((unit.key, name), 0.0) for m in c.costs})
        for name, c in unit.choices.items()
    }
    return replace(unit, choices=choices)


def make_profile(
    outline: Outline,
    plans: dict[str, Plan],
    candidates: tuple[Candidate, ...],
    measures: tuple[str, ...],
    rows: Calibration,
    points: int,
    request: dict[str, Any],
    folder: Path,
    pool: Workers,
    progress: Progress,
) -> Profile:
    """Probe every candidate, take every measure, write and return the profile.

    plans: of the probes, by candidate name; rows: what losses are measured on.
    """
    check_measures(measures)
    units = units_of(outline, parts_named(request))
    ledger = Ledger(folder / MEASURED, identity(outline, request, rows))
    with probes(plans, outline, folder / "probes", pool, progress) as found:
        bench = make_bench(outline, found, units, candidates, rows, points, ledger, folder, pool, progress)
        costs = {name: measured(bench, name) for name in measures}
        whole = {c.name: _whole(bench, c) for c in bench.quantizing}
    blank = profile_of_shapes(outline, candidates, measures, request)
    profile = replace(
        blank, base_loss=bench.base_loss, units=tuple(_with_costs(u, costs) for u in blank.units), whole=whole
    )
    profile.save(folder)
    return profile


def make_bench(
    outline: Outline,
    found: Probes,
    units: tuple[Unit, ...],
    candidates: tuple[Candidate, ...],
    rows: Calibration,
    points: int,
    ledger: Ledger,
    folder: Path,
    pool: Workers,
    progress: Progress,
) -> Bench:
    """The original in memory, and its loss and log probabilities on ``rows``. folder: of the profile."""
    model = loading.load(outline.checkpoint.path, dtype=torch.float32)
    subject = Subject(model, outline, pool)
    reference = subject.log_probs(rows, folder)
    loss, _ = subject.compare(rows, reference)
    return Bench(subject, found, units, candidates, rows, points, progress, loss, reference, ledger, folder)


def _whole(bench: Bench, candidate: Candidate) -> dict[str, float]:
    key = f"whole {candidate.name}"
    known = bench.ledger.get(key)
    if known is None:
        with bench.subject.replaced(bench.whole(candidate)):
            loss, kl = bench.subject.compare(bench.rows, bench.reference)
        known = {"loss": loss - bench.base_loss, "kl": kl}
        bench.ledger.put(key, known)
    return dict(known)
