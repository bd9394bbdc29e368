"""ReQuant: the number of outliers of each layer, by the post-quantization integral of the base method.

Hu et al., arXiv 2503.01901, section 4, figure 1 and algorithm 1:
 1. quantize with the base method; the mean sensitivity of an element of layer l is m_l = mean_j |gbar_j (w~_j - w_j)|;
 2. ratios r_l = c m_l^t with sum r_l n_l = r_o sum n_l; for each t the r_l n_l largest weights are taken out, the rest is
    quantized anew, and the t of the least loss is kept;
 3. significant weights are then detached step by step (``sensitivity.repair``), in the run that follows.

The listing is not in the paper's text. Our choices: t in 0, 0.5, 1, 2 (0 is the same ratio everywhere); no layer takes out
more than 10 % of its weights; what is compared is the KL divergence from the original on calibration rows. Every trial is a
job that resumes; that of the chosen t becomes the job of the run, so nothing is solved twice.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from qkit.calibration.dataset import Calibration
from qkit.engine.export import job_identity, source_hashes
from qkit.engine.job import Job
from qkit.engine.original_model import original_model
from qkit.engine.run import run_blocks
from qkit.errors import UsageError
from qkit.files.job_folder import remove_job
from qkit.planning.plan import Plan
from qkit.planning.request import REQUANT, REQUANT_OUTLIERS, REQUANT_SIGNIFICANT, Request
from qkit.runtime import loading
from qkit.sensitivity.pqi import mean_gradients, weight_shares
from qkit.sensitivity.probes import replacements
from qkit.sensitivity.reference_model import ReferenceModel
from qkit.sensitivity.repair import POINTS
from qkit.sensitivity.result_cache import ResultCache
from qkit.system.parallel import Workers, workers
from qkit.system.progress import Progress
from qkit.workflows.original_passes import original_passes
from qkit.workflows.quantize import PreparedRequest, prepare

EXPONENTS = (0.0, 0.5, 1.0, 2.0)
MOST = 10.0  # percent of a layer
ROWS = 32  # calibration rows that trials are compared on: means over a layer or the model have little noise


@dataclass(frozen=True)
class OutlierSearch:
    """The result of a search. request: with the ratios of the chosen exponent, ready to run; divergence: {exponent: KL,
    nats a token}."""

    request: Request
    exponent: float
    divergence: dict[float, float]


@dataclass(frozen=True)
class StartedSearch:
    """A search as far as it goes without measuring. base: the request of the method by itself, without outliers; first: its
    plan; percent: of outliers, of all weights."""

    base: Request
    first: PreparedRequest
    percent: float

    @property
    def exponents(self) -> tuple[float, ...]:
        """The exponents that are tried."""
        return EXPONENTS if self.percent else EXPONENTS[:1]

    @property
    def even(self) -> Request:
        """The request with the same share of outliers in every layer: of the same size as what is found, or nearly."""
        return replace(self.base, outliers=self.percent)


def start_search(request: Request) -> StartedSearch:
    """The start of a search, for a request whose method holds 'requant'; measures nothing. Raises UsageError for what
    cannot be searched."""
    if isinstance(request.outliers, dict):
        raise UsageError(f"method {REQUANT} finds the share of outliers of every layer: use one percentage")
    parts = [p for p in (request.method or "").lower().split("+") if p != REQUANT]
    percent = REQUANT_OUTLIERS if request.outliers is None else request.outliers
    significant = REQUANT_SIGNIFICANT if request.significant is None else request.significant
    if not 0 <= percent <= MOST:
        raise UsageError(f"--outliers {percent:g}: method {REQUANT} expects a percentage from 0 to {MOST:g}")
    base = replace(request, method="+".join(parts) or "rtn", outliers=0.0, significant=significant)
    first = prepare(base)
    if first.plan.transforms and not significant:
        raise UsageError(
            f"method {request.method} without significant weights: a job keeps the weights that {first.plan.transforms[0]} "
            "made for those alone: use --significant above 0, or a solver without transforms"
        )
    if not percent and not significant:
        raise UsageError(f"method {REQUANT} with neither outliers nor significant weights: leave '{REQUANT}' out")
    comparison_rows(first.plan)
    return StartedSearch(base, first, percent)


def search_outliers(request: Request, folder: Path, work: Path, progress: Progress) -> OutlierSearch:
    """The best ratios for a request whose method holds 'requant'.

    folder: of the trials and their results; work: the job folder of the run to come, which the chosen trial becomes.
    Raises UsageError for ratios per layer, which are what is searched here.
    """
    search = start_search(request)
    base, first, percent = search.base, search.first, search.percent
    with Job.open(
        folder / "base", _identity_of_job(first)
    ):  # trials of another request are refused before their results are lost
        result_cache = ResultCache(folder / "measured.jsonl", _identity(first.plan, percent))
    with workers(request.threads) as pool:
        trials = _Trials(folder, pool, progress, result_cache)
        sensitivity = trials.known("sensitivity", lambda: trials.sensitivity(first))
        sizes = {name: p.shape[0] * p.shape[1] for name, p in first.plan.linears.items()}
        trial_results: dict[float, tuple[Request, float]] = {}
        for t in search.exponents:
            trial_request = replace(base, outliers=ratios(sensitivity, sizes, percent, t))
            kl = trials.known(f"exponent {t:g}", lambda r=trial_request, t=t: trials.divergence(prepare(r), f"t{t:g}"))  # type: ignore[misc]
            trial_results[t] = (trial_request, float(kl))
    best = min(trial_results, key=lambda t: trial_results[t][1])
    chosen = folder / f"t{best:g}"
    if chosen.is_dir() and not work.exists():
        work.parent.mkdir(parents=True, exist_ok=True)
        shutil.move(chosen, work)
    for name in ("base", *(f"t{t:g}" for t in EXPONENTS)):
        remove_job(folder / name)
    return OutlierSearch(trial_results[best][0], best, {t: kl for t, (_, kl) in trial_results.items()})


def ratios(sensitivity: dict[str, float], sizes: dict[str, int], percent: float, t: float) -> dict[str, float]:
    """The percent of outliers of each layer, {layer: percent}: proportional to sensitivity^t, ``percent`` of all weights
    together, at most MOST."""
    shares = {n: 1.0 if t == 0 else max(m, 0.0) ** t for n, m in sensitivity.items()}
    fixed: dict[str, float] = {}
    remaining = percent * sum(sizes.values())
    while True:
        total = math.fsum(s * sizes[n] for n, s in shares.items() if n not in fixed)  # in whatever order they come
        scaled = {n: remaining * s / total if total else 0.0 for n, s in shares.items() if n not in fixed}
        too_large = [n for n, r in scaled.items() if r > MOST]
        if not too_large:
            return {n: fixed.get(n, scaled.get(n, 0.0)) for n in sensitivity}
        for n in too_large:
            fixed[n] = MOST
            remaining -= MOST * sizes[n]


def _identity_of_job(prepared: PreparedRequest) -> dict[str, Any]:
    """As of the run to come, whose job a trial may become."""
    structure = prepared.structure
    return job_identity(prepared.plan, source_hashes(prepared.plan, structure, structure.checkpoint.path))


@dataclass(frozen=True)
class _Trials:
    """Runs of the solver whose weights are looked at, and what was found, so that a stopped search goes on."""

    folder: Path
    pool: Workers
    progress: Progress
    result_cache: ResultCache

    def known(self, key: str, find: Callable[[], Any]) -> Any:
        """The value of ``key`` in the result cache, else what ``find`` gives, which is stored there."""
        value = self.result_cache.get(key)
        if value is None:
            value = find()
            self.result_cache.put(key, value)
        return value

    def sensitivity(self, prepared: PreparedRequest) -> dict[str, float]:
        """The mean sensitivity of each layer, {layer: mean |gbar_j (w~_j - w_j)|}, of the base method."""
        plan, structure, rows = prepared.plan, prepared.structure, comparison_rows(prepared.plan)
        with Job.open(self.folder / "base", _identity_of_job(prepared)) as job:
            passes = original_passes(plan, structure, job, self.pool, self.progress)
            run_blocks(plan, structure, job, self.pool, self.progress, passes)
            quantized = ReferenceModel(original_model(plan, structure, job), structure, self.pool)
            targets = {n: r.weight for n, r in replacements(plan, structure, job).items()}
        self.progress.start("sensitivity of all weights", POINTS)
        gbar = mean_gradients(quantized, targets, rows, POINTS, step=self.progress.step)
        shares = ((n, weight_shares(quantized.weight(n), w, gbar[n])) for n, w in targets.items())
        return {n: float(s.abs_().mean(dtype=torch.float64)) for n, s in shares}

    def divergence(self, prepared: PreparedRequest, name: str) -> float:
        """KL divergence from the original model on calibration rows of the trial's weights."""
        plan, structure, rows = prepared.plan, prepared.structure, comparison_rows(prepared.plan)
        with Job.open(self.folder / name, _identity_of_job(prepared)) as job:
            passes = original_passes(plan, structure, job, self.pool, self.progress)
            run_blocks(plan, structure, job, self.pool, self.progress, passes)
            model, weights = original_model(plan, structure, job), replacements(plan, structure, job)
        self.progress.start(f"trial {name}", 1)
        original = ReferenceModel(loading.load_checkpoint(structure.checkpoint, torch.float32), structure, self.pool)
        reference = original.log_probs(rows, self.folder)
        del original
        quantized = ReferenceModel(model, structure, self.pool)
        with quantized.replaced(weights):
            kl = quantized.compare(rows, reference)[1]
        self.progress.step()
        return kl


def comparison_rows(plan: Plan) -> Calibration:
    """The rows that sensitivity and trials are measured on. Raises UsageError where there are none before the run."""
    if plan.calibration is None:  # rounding without significant weights runs no rows by itself
        raise UsageError(f"method {REQUANT} with rtn needs significant weights: use --significant above 0")
    if not plan.calibration.samples:
        raise UsageError(f"method {REQUANT} is measured on calibration samples: use at least 1 (--samples)")
    return plan.calibration.first(ROWS)


def _identity(plan: Plan, percent: float) -> dict[str, Any]:
    """What the search depends on."""
    return {"--outliers": percent, "plan": plan.hash, "exponents": list(EXPONENTS), "points": POINTS, "rows": ROWS}
