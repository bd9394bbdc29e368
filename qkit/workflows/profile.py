"""The work behind ``qkit profile``: from a request to a profile, and the distance of its predictions from the truth."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from qkit.calibration.batches import Extent, extent, text_extent
from qkit.calibration.dataset import Calibration
from qkit.engine.duration import profile_seconds
from qkit.errors import BadInput, UsageError
from qkit.families.ends import EMBEDDINGS, HEAD
from qkit.families.structure import ModelStructure
from qkit.files.embedded import embedded_text
from qkit.planning.recipe import AUTO, SOURCE
from qkit.planning.request import Request
from qkit.sensitivity.candidates import Candidate
from qkit.sensitivity.forecast import ProfileForecast, profile_forecast, refuse_what_cannot_fit
from qkit.sensitivity.measurement import Measurement
from qkit.sensitivity.measures import MeasureContext
from qkit.sensitivity.names import FISHER, KL, MEASURED, check_measures
from qkit.sensitivity.profile import Profile, profile_of_shapes
from qkit.sensitivity.result_cache import ResultCache
from qkit.sensitivity.units import applies, parts_of, recorded_parts
from qkit.system.extras import needs
from qkit.system.machine import available_cores
from qkit.system.parallel import workers
from qkit.system.progress import Progress
from qkit.workflows.calibration_rows import calibration_of, requested_image_text, wants_image_text
from qkit.workflows.places import check_profile_folder
from qkit.workflows.probe_requests import ProfileRequest as ProfileRequest
from qkit.workflows.probe_requests import asked_ends, candidates_of, probe_of, probe_request
from qkit.workflows.quantize import PreparedRequest, open_structure, prepare

# Of the passes with one unit replaced at a time, up to which a budget measures KL divergence by itself: about an hour of two
# cores. A count and no time, so that the same command gives the same file on every machine. Our choice.
KL_OPERATIONS = 3e14


@dataclass(frozen=True, kw_only=True)
class _PreparedProbes:
    structure: ModelStructure
    candidates: tuple[Candidate, ...]
    probes: dict[str, PreparedRequest]
    rows: Calibration
    settings: dict[str, Any]

    def measurement(self, measures: tuple[str, ...], points: int = 1) -> Measurement:
        """What these measures measure."""
        return Measurement(
            structure=self.structure,
            plans={name: probe.plan for name, probe in self.probes.items()},
            candidates=self.candidates,
            measures=measures,
            rows=self.rows,
            points=points,
            settings=self.settings,
        )


def profile(request: ProfileRequest, folder: Path, progress: Progress) -> Profile:
    """The profile in ``folder``, made or continued. Raises UsageError for methods that rewrite the weights, Unsupported where
    memory is too small for it."""
    check_measures(request.measures)
    check_profile_folder(folder)
    prepared = _prepare(request)
    if (folder / MEASURED).exists():  # refuses another profile's folder
        ResultCache(folder / MEASURED, prepared.measurement(request.measures).identity)
    with suppress(BadInput):  # there is none, or it is damaged and made again from what was measured
        old = Profile.load(folder)
        names = {c.name for c in prepared.candidates}
        earlier = ["bf16" if n == "keep" else n for n in old.candidates if n not in names]
        measures = tuple(dict.fromkeys((*request.measures, *old.measures)))
        request = replace(request, candidates=",".join([request.candidates, *earlier]), measures=measures)
        prepared = _prepare(request)
    refuse_what_cannot_fit(
        _forecast(request, prepared.structure, extent(prepared.rows), prepared.rows.kinds is not None)
    )
    with workers(request.base.threads) as pool:
        return prepared.measurement(request.measures, request.points).make_profile(folder, pool, progress)


def forecast(request: ProfileRequest) -> ProfileForecast:
    """The forecast of ``profile``, in seconds and without reading a weight. Raises what the request's names deserve."""
    base, count = request.base, request.measured_rows
    structure = open_structure(base.model, "a profile", adapter=base.adapter)
    rows, has_images = text_extent(count, base.seqlen), wants_image_text(base, structure)
    if has_images:
        rows = extent(requested_image_text(replace(base, samples=count), structure))
    return _forecast(request, structure, rows, has_images)


def budget_profile(base: Request, candidates: str) -> ProfileRequest:
    """What a budget measures when nobody says: KL divergence and what comes with it, or where that takes too long the Fisher
    measure of plain rounding alone, which is as good with it as with gptq (reports/gguf) and takes minutes. It does not see
    quantized inputs: candidates that have them are measured by KL divergence always."""
    full = ProfileRequest(base, candidates)
    structure = open_structure(base.model, "a profile", adapter=base.adapter)
    rounds_inputs = any(c.scheme is not None and c.scheme.activations for c in candidates_of(full, structure))
    kl_operations = forecast(replace(full, measures=(KL,))).operations(structure)
    quick = replace(full, base=replace(base, method="rtn"), measures=(FISHER,))
    return full if rounds_inputs or kl_operations <= KL_OPERATIONS else quick


def _forecast(request: ProfileRequest, structure: ModelStructure, rows: Extent, has_images: bool) -> ProfileForecast:
    base = request.base
    candidates = candidates_of(request, structure)
    threads = base.threads or available_cores()
    parts = parts_of(structure, has_images, asked_ends(base, structure, candidates))
    return profile_forecast(structure, candidates, request.measures, rows, request.points, threads, parts)


def profile_from_shapes(request: ProfileRequest) -> Profile:
    """The profile before anything is measured: all costs are 0. Raises what the request's names deserve."""
    base = request.base
    structure = open_structure(base.model, "a profile", adapter=base.adapter)
    probes_asked = probe_request(request, structure, wants_image_text(base, structure))
    return profile_of_shapes(structure, probes_asked.candidates, request.measures, probes_asked.settings)


@dataclass(frozen=True, kw_only=True)
class ProfileCost:
    """What a profile costs. operations: of all of it, and of one run of its solver; seconds: estimated for this machine"""

    passes: ProfileForecast
    operations: float
    run_operations: float
    seconds: float


def profile_cost(request: ProfileRequest) -> ProfileCost:
    """The cost of ``profile``; reads no weight, and times a few products. Raises as ``profile`` does before it begins."""
    prepared = _prepare(request)
    passes = _forecast(request, prepared.structure, extent(prepared.rows), prepared.rows.kinds is not None)
    refuse_what_cannot_fit(passes)
    probes = [(probe.plan, probe.forecast) for probe in prepared.probes.values()]
    solving = sum(sum(forecast.operations.values()) for _, forecast in probes)
    passing = passes.operations(prepared.structure)
    return ProfileCost(
        passes=passes,
        operations=solving + passing,
        run_operations=solving / len(probes),
        seconds=profile_seconds(probes, passing, request.base.threads or available_cores()),
    )


def _prepare(request: ProfileRequest) -> _PreparedProbes:
    base = request.base
    structure = open_structure(base.model, "a profile", adapter=base.adapter)
    probe_request(request, structure, False)  # refuses names before rows are made
    rows = calibration_of(base, structure)
    asked = probe_request(request, structure, rows.kinds is not None)
    requests = {c.name: probe_of(base, c, asked) for c in asked.candidates}
    probes_ = {name: prepare(probe, rows) for name, probe in requests.items() if probe is not None}
    return _PreparedProbes(
        structure=structure,
        candidates=asked.candidates,
        probes=probes_,
        rows=rows.first(request.measured_rows),
        settings=asked.settings,
    )


def _held_out(base: Request, structure: ModelStructure, text: Path | None) -> Calibration:
    """Rows of ``text``, else of the embedded evaluation text, or of drawn scenes where calibration has images."""
    if text is None and wants_image_text(base, structure):
        return requested_image_text(replace(base, calib=None), structure, held_out=True)
    return calibration_of(replace(base, calib=text or embedded_text("evaluation")), structure)


def audit(
    request: ProfileRequest,
    folder: Path,
    audited: Profile,
    held_out: Path | None,
    progress: Progress,
    plans: int = 6,
    seed: int = 0,
) -> dict[str, Any]:
    """The distance of each measure's prediction from the true loss change on held-out text or image-text data (None: embedded
    or drawn ones).

    Of single units: every unit at every candidate. Of whole plans: each candidate everywhere, and ``plans`` random
    mixtures. Gives, by measure, the rank correlation with the truth and, for measures in nats, the median of predicted /
    true.
    """
    prepared = _prepare(request)
    try:
        rows = _held_out(replace(request.base, samples=request.measured_rows), prepared.structure, held_out)
    except (BadInput, UsageError) as e:
        raise type(e)(f"--audit: {e}") from e
    random_ = random.Random(seed)
    cache = folder / f"audit-{rows.digest[:8]}.jsonl"
    prepared = replace(prepared, rows=rows)
    with (
        workers(request.base.threads) as pool,
        prepared.measurement(audited.measures).context(folder, cache, pool, progress) as context,
    ):
        units = context.units
        quantizing = [c for c in prepared.candidates if c.scheme is not None]
        names = [c.name for c in quantizing]
        choices = {u.key: [c.name for c in quantizing if applies(u, c)] for u in units}
        single = [{key: name} for key, known in choices.items() for name in known]
        uniform = [{key: name for key, known in choices.items() if name in known} for name in names]
        mixed = [{key: random_.choice(known) for key, known in choices.items()} for _ in range(plans)]
        progress.start("audit", len(single) + len(uniform) + len(mixed))
        true = []
        for picks in (*single, *uniform, *mixed):
            true.append(measure_plan(context, picks)[0])
            progress.step()
    result: dict[str, Any] = {"text": rows.source, "rows": rows.samples, "measures": {}}
    for measure in audited.measures:
        predicted = [_predict(audited, picks, measure) for picks in (*single, *uniform, *mixed)]
        cut = len(single)
        result["measures"][measure] = {
            "single": _agreement(predicted[:cut], true[:cut]),
            "plans": _agreement(predicted[cut:], true[cut:]),
        }
    result["plans"] = [
        {"name": name, "true": t, **{m: _predict(audited, picks, m) for m in audited.measures}}
        for name, picks, t in zip(
            [*(f"all {n}" for n in names), *(f"mixture {i + 1}" for i in range(plans))],
            [*uniform, *mixed],
            true[len(single) :],
            strict=True,
        )
    ]
    return result


def _predict(audited: Profile, picks: dict[str, str], measure: str) -> float:
    return sum(u.choices[picks[u.key]].costs[measure] for u in audited.units if u.key in picks)


def _agreement(predicted: Sequence[float], true: Sequence[float]) -> dict[str, float]:
    """rank: Spearman's correlation; ratio: median of predicted / true where the truth is clear of zero."""
    with needs("the audit of a profile", "allocation"):
        from scipy.stats import spearmanr

    largest = max(abs(t) for t in true)
    ratios = sorted(p / t for p, t in zip(predicted, true, strict=True) if abs(t) > 0.01 * largest)
    constant = len(set(predicted)) < 2 or len(set(true)) < 2
    return {
        "rank": 0.0 if constant else float(spearmanr(predicted, true).statistic),
        "ratio": float(torch.tensor(ratios).median()) if ratios else float("nan"),
    }


@contextmanager
def plan_measurement(
    base: Request, known_profile: Profile, folder: Path, progress: Progress
) -> Iterator[Callable[[dict[str, str]], float]]:
    """The context of a function that gives a plan's KL divergence from the original on the profile's rows, from the weights
    of the probes."""
    names = ",".join("bf16" if n == "keep" else n for n in known_profile.candidates)
    r = known_profile.request
    lacking = next((k for k in ("group_size", "samples", "seqlen", "rows", "points") if k not in r), None)
    if lacking is not None:
        raise BadInput(f"{folder}: the profile does not record its {lacking}: measure it again")
    fixed = SOURCE if r.get("gguf") else None
    embeddings, head = (AUTO if end in recorded_parts(r) else fixed for end in (EMBEDDINGS, HEAD))
    base = replace(base, embeddings=embeddings, head=head)
    base = replace(base, group_size=r["group_size"], method=r["method"], samples=r["samples"], seqlen=r["seqlen"])
    prepared = _prepare(ProfileRequest(base, names, known_profile.measures, r["rows"], r["points"]))
    cache = folder / "plans.jsonl"
    with (
        workers(base.threads) as pool,
        prepared.measurement(known_profile.measures).context(folder, cache, pool, progress) as context,
    ):
        yield lambda picks: measure_plan(context, picks)[1]


def measure_plan(context: MeasureContext, picks: dict[str, str]) -> tuple[float, float]:
    """The measured loss change and KL divergence with these units at these candidates."""
    key = "plan " + " ".join(f"{k}={v}" for k, v in sorted(picks.items()))
    measurement = context.result_cache.get(key)
    if measurement is None:
        by_name = {c.name: c for c in context.candidates}
        measurement = context.changed([(u, by_name[picks[u.key]]) for u in context.units if u.key in picks])
        context.result_cache.put(key, measurement)
    return float(measurement[0]) - context.original.base_loss, float(measurement[1])
