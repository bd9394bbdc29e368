"""The work behind ``qkit profile``: from a request to a profile, and how far its predictions were from the truth."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from qkit.calibration.batches import Extent, extent, text_extent
from qkit.calibration.dataset import Calibration
from qkit.errors import BadInput, UsageError
from qkit.families.blocks import LANGUAGE
from qkit.families.structure import ModelStructure
from qkit.files.embedded import embedded_text
from qkit.files.folder import list_names
from qkit.planning.plan import Plan
from qkit.planning.recipe import parse_method
from qkit.planning.request import Request
from qkit.planning.towers import SKIP
from qkit.sensitivity.candidates import Candidate, parse_candidates
from qkit.sensitivity.forecast import ProfileForecast, profile_forecast, refuse_what_cannot_fit
from qkit.sensitivity.measures import MeasureContext
from qkit.sensitivity.names import check_measures
from qkit.sensitivity.probes import probes
from qkit.sensitivity.profile import MEASURED, Profile, identity, make_bench, make_profile, profile_of_shapes
from qkit.sensitivity.result_cache import ResultCache
from qkit.sensitivity.units import parts_named, parts_of, units_of
from qkit.system.extras import needs
from qkit.system.machine import available_cores
from qkit.system.parallel import workers
from qkit.system.progress import Progress
from qkit.workflows.calibration_rows import calibration_of, pair_calibration, wants_pairs
from qkit.workflows.quantize import open_structure, prepare

ROWS = 32  # that losses are measured on; our choice


@dataclass(frozen=True)
class ProfileRequest:
    """base: model, method (a solver), group size and calibration of the probes; its scheme is not used.

    rows: calibration rows that losses are measured on (None: 32, or all if there are fewer); points: of the path integral.
    """

    base: Request
    candidates: str
    measures: tuple[str, ...] = ("weight", "output", "pqi", "kl")
    rows: int | None = None
    points: int = 8

    @property
    def measured_rows(self) -> int:
        """The number of rows. Raises UsageError for one that cannot be."""
        if self.base.samples < 1:
            raise UsageError(f"--samples {self.base.samples}: expected at least 1")
        if self.rows is not None and not 1 <= self.rows <= self.base.samples:
            raise UsageError(
                f"--rows {self.rows}: expected 1 to {self.base.samples}, the number of calibration rows (--samples)"
            )
        return min(ROWS, self.base.samples) if self.rows is None else self.rows


@dataclass(frozen=True)
class _Asked:
    """A request as far as names and shapes go. described: what a profile says of how it was made."""

    structure: ModelStructure
    candidates: tuple[Candidate, ...]
    parts: tuple[str, ...]
    described: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class _Prepared:
    structure: ModelStructure
    candidates: tuple[Candidate, ...]
    plans: dict[str, Plan]
    rows: Calibration
    described: dict[str, Any]
    operations: float  # of all probes


def profile(request: ProfileRequest, folder: Path, progress: Progress) -> Profile:
    """Make the profile in ``folder``, or go on with it. Raises UsageError for methods that rewrite the weights, Unsupported
    where memory is too small for it."""
    check_measures(request.measures)
    _refuse_foreign(folder)
    found = _prepare(request)
    if (folder / MEASURED).exists():
        ResultCache(
            folder / MEASURED, identity(found.structure, found.described, found.rows)
        )  # refuses another profile's folder
    with suppress(BadInput):  # there is none, or it is damaged and made again from what was measured
        old = Profile.load(folder)
        asked = {c.name for c in found.candidates}
        more = ["bf16" if n == "keep" else n for n in old.candidates if n not in asked]
        measures = tuple(dict.fromkeys((*request.measures, *old.measures)))
        request = replace(request, candidates=",".join([request.candidates, *more]), measures=measures)
        found = _prepare(request)
    refuse_what_cannot_fit(_forecast(request, found.structure, extent(found.rows), found.rows.kinds is not None))
    with workers(request.base.threads) as pool:
        return make_profile(
            found.structure,
            found.plans,
            found.candidates,
            request.measures,
            found.rows,
            request.points,
            found.described,
            folder,
            pool,
            progress,
        )


def _refuse_foreign(folder: Path) -> None:
    """Raises UsageError for a folder with something in it that is not a profile's: measurements are its first file."""
    if folder.is_dir() and list_names(folder) and not (folder / MEASURED).is_file():
        raise UsageError(
            f"{folder}: it is not empty and holds no {MEASURED}, so it is not a profile: choose another folder"
        )
    if os.path.lexists(folder) and not folder.is_dir():
        raise UsageError(f"{folder}: a profile is a folder, and this is a file or a link: choose another name")


def forecast(request: ProfileRequest) -> ProfileForecast:
    """What ``profile`` will take, in seconds and without reading a weight. Raises what the request's names deserve."""
    base, count = request.base, request.measured_rows
    structure = open_structure(base.model, "a profile")
    rows, pictures = text_extent(count, base.seqlen), wants_pairs(base, structure)
    if pictures:
        rows = extent(pair_calibration(replace(base, samples=count), structure))
    return _forecast(request, structure, rows, pictures)


def _forecast(request: ProfileRequest, structure: ModelStructure, rows: Extent, pictures: bool) -> ProfileForecast:
    base = request.base
    candidates = parse_candidates(request.candidates, base.group_size)
    threads = base.threads or available_cores()
    parts = parts_of(structure, pictures)
    return profile_forecast(structure, candidates, request.measures, rows, request.points, threads, parts)


def of_shapes(request: ProfileRequest) -> Profile:
    """What ``profile`` will say, before anything is measured: all costs are 0. Raises what the request's names deserve."""
    base = request.base
    structure = open_structure(base.model, "a profile")
    found = _asked(request, structure, wants_pairs(base, structure))
    return profile_of_shapes(structure, found.candidates, request.measures, found.described)


def foreseen(request: ProfileRequest) -> tuple[ProfileForecast, float, float]:
    """(what ``profile`` will take, all of its operations, those of one run of its solver); reads no weight. Raises as
    ``profile`` does before it begins."""
    found = _prepare(request)
    passes = _forecast(request, found.structure, extent(found.rows), found.rows.kinds is not None)
    refuse_what_cannot_fit(passes)
    return passes, found.operations + passes.operations(found.structure), found.operations / len(found.plans)


def _asked(request: ProfileRequest, structure: ModelStructure, pictures: bool) -> _Asked:
    base = request.base
    transforms, solver = parse_method(base.method or "gptq")
    if transforms:
        raise UsageError(
            f"--method {base.method}: a profile compares formats of one set of weights: give a solver alone ({solver})"
        )
    candidates = parse_candidates(request.candidates, base.group_size)
    if all(c.scheme is None for c in candidates):
        raise UsageError(f"--candidates {request.candidates}: no format that quantizes: add one, for instance int4")
    parts = parts_of(structure, pictures)
    described = {
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
        "dtype": str(structure.dtype).removeprefix("torch."),
    }
    return _Asked(structure, candidates, parts, described)


def _prepare(request: ProfileRequest) -> _Prepared:
    base = request.base
    structure = open_structure(base.model, "a profile")
    _asked(request, structure, False)  # refuses names before rows are made
    rows = calibration_of(base, structure)
    found = _asked(request, structure, rows.kinds is not None)
    probes_ = {
        c.name: prepare(
            replace(
                base,
                scheme=c.scheme.name,
                method=found.described["method"],
                group_size=found.described["group_sizes"][c.name],
                outliers=c.outliers or None,
                rank=c.rank or None,
                targets={t.name: c.scheme.name if t.name in found.parts else SKIP for t in structure.towers},
            ),
            rows,
        )
        for c in found.candidates
        if c.scheme is not None
    }
    plans = {name: p.plan for name, p in probes_.items()}
    total = sum(sum(p.forecast.operations.values()) for p in probes_.values())
    return _Prepared(
        structure=structure,
        candidates=found.candidates,
        plans=plans,
        rows=rows.first(request.measured_rows),
        described=found.described,
        operations=total,
    )


def _group(candidate: Candidate, group_size: int | None) -> int | None:
    """The group size to ask for: only integer formats in groups take one."""
    s = candidate.scheme
    free = s is not None and s.weights.kind == "int" and s.weights.strategy == "group"
    return group_size if free else None


def _held_out(base: Request, structure: ModelStructure, given: Path | None) -> Calibration:
    """Rows of ``given``, else of the embedded evaluation text, or of drawn scenes where calibration has pictures."""
    if given is None and wants_pairs(base, structure):
        return pair_calibration(replace(base, calib=None), structure, held_out=True)
    return calibration_of(replace(base, calib=given or embedded_text("evaluation")), structure)


def audit(
    request: ProfileRequest,
    folder: Path,
    made: Profile,
    held_out: Path | None,
    progress: Progress,
    plans: int = 6,
    seed: int = 0,
) -> dict[str, Any]:
    """How far each measure's prediction is from the true loss change on held-out text or pairs (None: embedded or drawn ones).

    Of single units: every unit at every candidate. Of whole plans: each candidate everywhere, and ``plans`` random mixtures.
    Gives, by measure, the rank correlation with the truth and, for measures in nats, the median of predicted / true.
    """
    found = _prepare(request)
    try:
        rows = _held_out(replace(request.base, samples=request.measured_rows), found.structure, held_out)
    except (BadInput, UsageError) as e:
        raise type(e)(f"--audit: {e}") from e
    units = units_of(found.structure, parts_named(found.described))
    random_ = random.Random(seed)
    with (
        workers(request.base.threads) as pool,
        probes(found.plans, found.structure, folder / "probes", pool, progress) as probed,
    ):
        result_cache = ResultCache(
            folder / f"audit-{rows.digest[:8]}.jsonl", identity(found.structure, found.described, rows)
        )
        bench = make_bench(
            found.structure, probed, units, found.candidates, rows, request.points, result_cache, folder, pool, progress
        )
        names = [c.name for c in found.candidates if c.scheme is not None]
        single = [{u.key: name} for u in units for name in names]
        uniform = [{u.key: name for u in units} for name in names]
        mixed = [{u.key: random_.choice(names) for u in units} for _ in range(plans)]
        progress.start("audit", len(single) + len(uniform) + len(mixed))
        true = []
        for picks in (*single, *uniform, *mixed):
            true.append(measured_plan(bench, picks)[0])
            progress.step()
    result: dict[str, Any] = {"text": rows.source, "rows": rows.samples, "measures": {}}
    for measure in made.measures:
        predicted = [_predicted(made, picks, measure) for picks in (*single, *uniform, *mixed)]
        cut = len(single)
        result["measures"][measure] = {
            "single": _agreement(predicted[:cut], true[:cut]),
            "plans": _agreement(predicted[cut:], true[cut:]),
        }
    result["plans"] = [
        {"name": name, "true": t, **{m: _predicted(made, picks, m) for m in made.measures}}
        for name, picks, t in zip(
            [*(f"all {n}" for n in names), *(f"mixture {i + 1}" for i in range(plans))],
            [*uniform, *mixed],
            true[len(single) :],
            strict=True,
        )
    ]
    return result


def _predicted(made: Profile, picks: dict[str, str], measure: str) -> float:
    return sum(u.choices[picks[u.key]].costs[measure] for u in made.units if u.key in picks)


def _agreement(predicted: Sequence[float], true: Sequence[float]) -> dict[str, float]:
    """rank: Spearman's correlation; ratio: median of predicted / true where the truth is clear of zero."""
    with needs("the audit of a profile", "allocation"):
        from scipy.stats import spearmanr

    largest = max(abs(t) for t in true)
    ratios = sorted(p / t for p, t in zip(predicted, true, strict=True) if abs(t) > 0.01 * largest)
    same = len(set(predicted)) < 2 or len(set(true)) < 2
    return {
        "rank": 0.0 if same else float(spearmanr(predicted, true).statistic),
        "ratio": float(torch.tensor(ratios).median()) if ratios else float("nan"),
    }


@contextmanager
def measured_plans(
    base: Request, made: Profile, folder: Path, progress: Progress
) -> Iterator[Callable[[dict[str, str]], float]]:
    """A function that gives a plan's KL divergence from the original on the profile's rows, from the weights of the probes."""
    names = ",".join("bf16" if n == "keep" else n for n in made.candidates)
    r = made.request
    lacking = next((k for k in ("group_size", "samples", "seqlen", "rows", "points") if k not in r), None)
    if lacking is not None:
        raise BadInput(f"{folder}: the profile does not say with which {lacking} it was made: make it again")
    base = replace(base, group_size=r["group_size"], method=r["method"], samples=r["samples"], seqlen=r["seqlen"])
    found = _prepare(ProfileRequest(base, names, made.measures, r["rows"], r["points"]))
    with (
        workers(base.threads) as pool,
        probes(found.plans, found.structure, folder / "probes", pool, progress) as probed,
    ):
        units = units_of(found.structure, parts_named(found.described))
        result_cache = ResultCache(folder / "plans.jsonl", identity(found.structure, found.described, found.rows))
        bench = make_bench(
            found.structure, probed, units, found.candidates, found.rows, 1, result_cache, folder, pool, progress
        )
        yield lambda picks: measured_plan(bench, picks)[1]


def measured_plan(bench: MeasureContext, picks: dict[str, str]) -> tuple[float, float]:
    """Measured (loss change, KL divergence) with these units at these candidates."""
    key = "plan " + " ".join(f"{k}={v}" for k, v in sorted(picks.items()))
    known = bench.result_cache.get(key)
    if known is None:
        by_name = {c.name: c for c in bench.candidates}
        chosen = [(u, by_name[picks[u.key]]) for u in bench.units if u.key in picks]
        moved = {n: r for u, c in chosen for n, r in bench.probes.replacements(u, c).items()}
        with bench.subject.replaced(moved):
            known = bench.subject.compare(bench.rows, bench.reference)
        bench.result_cache.put(key, known)
    return float(known[0]) - bench.base_loss, float(known[1])
