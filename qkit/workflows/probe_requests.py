"""What a profile measures: the candidates that a model can have, its parts, and a quantization for each candidate."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from qkit.errors import UsageError
from qkit.families.blocks import LANGUAGE
from qkit.families.ends import EMBEDDINGS, HEAD
from qkit.families.structure import ModelStructure
from qkit.planning.recipe import AUTO, SOURCE, parse_method
from qkit.planning.request import Request
from qkit.planning.towers import SKIP
from qkit.sensitivity.candidates import Candidate, are_gguf, for_widths, parse_candidates
from qkit.sensitivity.units import applies, parts_of, profiled_units

ROWS = 32  # that losses are measured on; our choice


@dataclass(frozen=True)
class ProfileRequest:
    """The request of ``qkit profile``.

    base: model, method (a solver), group size and calibration of the probes; its scheme is not used.

    rows: calibration rows that losses are measured on (None: 32, or all if there are fewer); points: of the path integral.
    """

    base: Request
    candidates: str
    measures: tuple[str, ...] = ("weight", "output", "pqi", "kl")
    rows: int | None = None
    points: int = 8

    @property
    def method(self) -> str:
        """The method of the probes."""
        return self.base.method or "gptq"

    @property
    def measured_rows(self) -> int:
        """The number of rows. Raises UsageError for one that cannot be."""
        if self.base.samples < 1:
            raise UsageError(
                f"--samples {self.base.samples}: expected at least 1, since costs are measured on calibration samples"
            )
        if self.rows is not None and not 1 <= self.rows <= self.base.samples:
            raise UsageError(
                f"--rows {self.rows}: expected 1 to {self.base.samples}, the number of calibration samples (--samples)"
            )
        return min(ROWS, self.base.samples) if self.rows is None else self.rows


@dataclass(frozen=True)
class ProbeRequest:
    """A request as far as names and shapes go. settings: what a profile says of how it was made."""

    structure: ModelStructure
    candidates: tuple[Candidate, ...]
    parts: tuple[str, ...]
    settings: dict[str, Any]


def probe_request(request: ProfileRequest, structure: ModelStructure, has_images: bool) -> ProbeRequest:
    """The names and shapes of a profile. Raises UsageError for names that are none, or that do not go together."""
    base = request.base
    transforms, solver = parse_method(request.method)
    if transforms:
        raise UsageError(
            f"--method {base.method}: a profile compares formats of one set of weights: use a solver "
            f"without transforms ({solver})"
        )
    candidates = candidates_of(request, structure)
    if all(c.scheme is None for c in candidates):
        raise UsageError(f"--candidates {request.candidates}: no format that quantizes: add one, for instance int4")
    parts = parts_of(structure, has_images, asked_ends(base, structure, candidates))
    settings = {
        "method": solver,
        "group_size": base.group_size,
        "group_sizes": {c.name: _group(c, base.group_size) for c in candidates},
        "outliers": {c.name: c.outliers for c in candidates},
        "ranks": {c.name: c.rank for c in candidates},
        "samples": base.samples,
        "seqlen": base.seqlen,
        "rows": request.measured_rows,
        "points": request.points,
        **({} if parts == (LANGUAGE,) else {"parts": list(parts)}),
        **({"gguf": True} if are_gguf(candidates) else {}),
        "dtype": str(structure.dtype).removeprefix("torch."),
    }
    return ProbeRequest(structure, candidates, parts, settings)


def candidates_of(request: ProfileRequest, structure: ModelStructure) -> tuple[Candidate, ...]:
    """The candidates that the layers of the model can have."""
    candidates = parse_candidates(request.candidates, request.base.group_size)
    widths = {info.shape[-1] for info in structure.checkpoint.tensors.values() if len(info.shape) > 1}
    return for_widths(candidates, widths)


def asked_ends(base: Request, structure: ModelStructure, candidates: Sequence[Candidate]) -> tuple[str, ...]:
    """The ends of the model that are units too: those left to a budget, in GGUF all that no type is named for."""
    options = (EMBEDDINGS, HEAD)
    named = [option for option in options if getattr(base, option) not in (None, AUTO)]
    if not are_gguf(candidates):
        return tuple(option for option in options if getattr(base, option) == AUTO)
    return () if named and structure.tied else tuple(option for option in options if option not in named)


def probe_of(base: Request, candidate: Candidate, asked: ProbeRequest) -> Request | None:
    """The request of the probe of a candidate; None where no layer of a block can have it."""
    if candidate.scheme is None:
        return None
    name = candidate.scheme.name
    request = replace(
        base,
        scheme=name,
        method=asked.settings["method"],
        group_size=asked.settings["group_sizes"][candidate.name],
        outliers=candidate.outliers or None,
        rank=candidate.rank or None,
        embeddings=None,
        head=None,
        targets={t.name: name if t.name in asked.parts else SKIP for t in asked.structure.towers},
    )
    if not candidate.scheme.weights.gguf:
        return request
    every = profiled_units(asked.structure, asked.settings)
    units = [u for u in every if not u.is_end]
    others = [x.name for u in units if not applies(u, candidate) for x in u.linears]
    rules = ({"match": others, "skip": "another type is measured for it"},) if others else ()
    ends = {u.part: name.lower() for u in every if u.is_end and applies(u, candidate)}
    embeddings, head = (ends.get(part, SOURCE) for part in (EMBEDDINGS, HEAD))
    head = SOURCE if asked.structure.tied else head  # one matrix, which the embeddings name
    return None if len(others) == len(units) else replace(request, rules=rules, embeddings=embeddings, head=head)


def _group(candidate: Candidate, group_size: int | None) -> int | None:
    """The group size to ask for: only integer formats in groups have a free one."""
    return group_size if candidate.scheme is not None and candidate.scheme.weights.regroups else None
