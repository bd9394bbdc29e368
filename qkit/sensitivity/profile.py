"""The profile of a model: the cost of every unit in every candidate, in nats and in bytes. It is made once and read by
later commands."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qkit.errors import BadInput, UsageError
from qkit.families.structure import ModelStructure
from qkit.files.folder import load_json
from qkit.files.safefile import write_atomic
from qkit.files.schema import ProfileFile, validate
from qkit.planning.sizes import plain_bytes
from qkit.sensitivity.candidates import Candidate
from qkit.sensitivity.decomposition import decomposition_file, load_decomposition
from qkit.sensitivity.names import PROFILE
from qkit.sensitivity.units import profiled_units, unit_bytes

VERSION = 3
FILE = PROFILE
KEPT = "keep"  # the candidate that leaves weights as they are
LIMIT = 1 << 28


@dataclass(frozen=True)
class CandidateCost:
    """The cost of one candidate for a unit. bytes: as stored; costs: by measure, in its unit (0 for a unit that is kept)."""

    bytes: int
    costs: dict[str, float]


@dataclass(frozen=True)
class UnitProfile:
    """One unit of a profile. linears: checkpoint names; weights: how many; choices: by candidate name, only those that can
    be applied."""

    key: str
    linears: tuple[str, ...]
    weights: int
    choices: dict[str, CandidateCost]


@dataclass(frozen=True, kw_only=True)
class Profile:
    """The measured costs of a model's units, with the model and the request that they are of.

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
        """Writes profile.json."""
        data = {"version": VERSION, **asdict(self)}
        write_atomic(folder / FILE, (json.dumps(data, indent=1, sort_keys=True) + "\n").encode())

    @staticmethod
    def load(folder: Path) -> Profile:
        """The profile in a folder. Raises BadInput for a folder without a profile of this version."""
        file = folder / FILE
        if not file.is_file():
            raise BadInput(
                f"{file}: no such profile: make it with 'qkit profile --model .. --candidates .. --out {folder}'"
            )
        data = load_json(file, "profile", LIMIT)
        if not isinstance(data, dict) or data.pop("version", None) != VERSION:
            raise BadInput(f"{file}: not a profile of this version of qkit: make it again")
        validate(ProfileFile, data, f"{file}: damaged", "make it again", BadInput)
        units = tuple(
            UnitProfile(
                u["key"],
                tuple(u["linears"]),
                u["weights"],
                {
                    k: CandidateCost(c["bytes"], {m: float(x) for m, x in c["costs"].items()})
                    for k, c in u["choices"].items()
                },
            )
            for u in data.pop("units")
        )
        data = {**data, "candidates": tuple(data["candidates"]), "measures": tuple(data["measures"])}
        profile = Profile(units=units, **data)
        if fault := profile._fault():
            raise BadInput(f"{file}: damaged: {fault}: make it again")
        return profile

    def _fault(self) -> str | None:
        """What names something that is not there."""
        candidates = set(self.candidates)
        sizes = self.request["group_sizes"].keys(), self.request["outliers"].keys()
        for unit in self.units:
            if unknown := unit.choices.keys() - candidates:
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
        """The contributions of rows, columns and single weights to ``pqi`` costs of a candidate.

        {"<candidate>:<linear>:<part>": tensor}; parts and dtypes are those of ``decomposition.py``. Raises BadInput where
        there is none, or one of another profile.
        """
        profile, tensors = Profile.load(folder), load_decomposition(folder, candidate)
        for unit in (u for u in profile.units if candidate in u.choices):
            cost = unit.choices[candidate].costs.get("pqi")
            rows = [tensors.get(f"{candidate}:{n}:rows", torch.full((1,), torch.nan)) for n in unit.linears]
            total = sum(float(r.sum(dtype=torch.float64)) for r in rows)
            size = sum(float(r.abs().sum(dtype=torch.float64)) for r in rows)
            if cost is None or not abs(total - cost) <= 1e-4 * size:
                raise BadInput(
                    f"{decomposition_file(folder, candidate)}: not the decomposition of {FILE} beside it ({unit.key}): delete "
                    "it and run 'qkit profile' of this folder again with --measures pqi"
                )
        return tensors


def profile_of_shapes(
    structure: ModelStructure, candidates: tuple[Candidate, ...], measures: tuple[str, ...], request: dict[str, Any]
) -> Profile:
    """The profile as shapes alone tell it: units and the bytes of their choices. Every cost is 0."""
    profiles = []
    for unit in profiled_units(structure, request):
        sizes = {c.name: size for c in candidates if (size := unit_bytes(unit, c, structure)) is not None}
        if not sizes:
            raise UsageError(
                f"--{unit.part} auto: expected int2 to int8 or bf16 among the candidates, found "
                f"{', '.join(c.name for c in candidates)}: add one of them"
            )
        choices = {name: CandidateCost(size, dict.fromkeys(measures, 0.0)) for name, size in sizes.items()}
        profiles.append(UnitProfile(unit.key, tuple(x.name for x in unit.linears), unit.weights, choices))
    inside = {f"{n}.weight" for u in profiles for n in u.linears}
    fixed = sum(
        plain_bytes(t) if request.get("gguf") else t.nbytes
        for n, t in structure.checkpoint.tensors.items()
        if n not in inside and n not in structure.tied
    )
    names = tuple(c.name for c in candidates)
    return Profile(
        fingerprint=structure.checkpoint.fingerprint(),
        request=request,
        candidates=names,
        measures=measures,
        base_loss=0.0,
        fixed_bytes=fixed,
        units=tuple(profiles),
        whole={},
    )
