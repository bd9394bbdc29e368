"""Limits on the number of linears that fall back to a simpler method."""

from __future__ import annotations

from qkit.engine.job import Job
from qkit.errors import NumericFailure
from qkit.planning.plan import Plan
from qkit.solvers.task import ZERO_INPUTS

MAX_SILENT = 0.5  # share of linears whose inputs may be all zero: a single one is a property of the model
MAX_FALLBACKS = 0.05  # share of linears that may fall back before the run counts as failed


def check_fallbacks(plan: Plan, job: Job) -> None:
    """Raises NumericFailure where more than MAX_FALLBACKS of all linears fell back to a simpler method, or more than MAX_SILENT
    have only zero inputs."""
    reasons = {name: record["fallback"] for name, record in job.records().items()}
    silent = [name for name, why in reasons.items() if why == ZERO_INPUTS]
    if len(silent) > MAX_SILENT * len(plan.linears):
        raise NumericFailure(
            f"{len(silent)} of {len(plan.linears)} linears saw nothing but zeros, the first is {silent[0]}; the parts are kept "
            f"in {job.path}: look at the weights of the layers before it, or use --method rtn"
        )
    fell = [(name, why) for name, why in reasons.items() if why and why != ZERO_INPUTS]
    if len(fell) > MAX_FALLBACKS * len(plan.linears):
        listed = "; ".join(f"{n} ({why})" for n, why in fell[:5])
        raise NumericFailure(
            f"{len(fell)} of {len(plan.linears)} linears fell back to plain rounding, more than {MAX_FALLBACKS:.0%}: {listed}; "
            f"the parts are kept in {job.path}: use more calibration text, or --method rtn"
        )
