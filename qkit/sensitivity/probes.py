"""The probes: the whole model quantized at one candidate, for every candidate, in a job folder of its own.

A probe is an ordinary run without an export: it resumes where it was stopped, and the weights that a decision is judged by
are those that the solver really gives, not a stand-in for them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from torch import Tensor

from qkit.engine.ends import STAGE, quantize_ends, rounded_table
from qkit.engine.export import job_identity
from qkit.engine.job import Job
from qkit.engine.run import run_blocks
from qkit.families.blocks import Linear
from qkit.families.structure import ModelStructure
from qkit.planning.plan import Plan, parts
from qkit.sensitivity.candidates import Candidate
from qkit.sensitivity.reference_model import Replacement
from qkit.sensitivity.units import Unit, end_format
from qkit.system.parallel import Workers
from qkit.system.progress import Progress
from qkit.tensor.formats import Format
from qkit.tensor.qtensor import dequantize

Activations = tuple[Format, Tensor | None]  # the format of a linear's input, and its static scale


def replacement(plan: Plan, job: Job, block: int, name: str) -> Replacement:
    """The replacement of a planned linear of a finished block, from a job."""
    p = plan.linears[name]
    q, static = job.quantized(block, name, p.weights)
    return Replacement(dequantize(q), p.activations, static)


def replacements(plan: Plan, structure: ModelStructure, job: Job) -> dict[str, Replacement]:
    """The replacements of all linears of a finished job, {linear: replacement}, in the order of the blocks."""
    every = enumerate(parts(plan, structure))
    linears = [(i, x.name) for i, b in every for x in b.linears if x.name in plan.linears]
    return {name: replacement(plan, job, block, name) for block, name in linears}


class Probes:
    """The results of the jobs of all candidates."""

    def __init__(self, jobs: dict[str, tuple[Plan, Job]], structure: ModelStructure) -> None:
        self._jobs, self._structure = jobs, structure

    @property
    def one(self) -> tuple[Plan, Job]:
        """The plan and the job of one of them."""
        return next(iter(self._jobs.values()))

    def replacements(self, unit: Unit, candidate: Candidate) -> dict[str, Replacement]:
        """{linear: what the candidate puts in its place}; nothing for a candidate that keeps the unit."""
        if candidate.scheme is None:
            return {}
        if unit.is_end:
            return {x.name: Replacement(table, None, None) for x, _, table in self._tables(unit, candidate)}
        plan, job = self._jobs[candidate.name]
        return {x.name: replacement(plan, job, unit.place, x.name) for x in unit.linears}

    def _tables(self, unit: Unit, candidate: Candidate) -> Iterator[tuple[Linear, Tensor, Tensor]]:
        """(matrix, its values, its values in the candidate's format) of an end, as the probe solved it, or rounded where the
        probe leaves it out; none where it has no such format."""
        for x in unit.linears:
            fmt = end_format(candidate, x.shape[1])
            if fmt is not None:
                table = self._structure.checkpoint.read_finite(f"{x.name}.weight")
                yield (
                    x,
                    table.float(),
                    self._solved(x, candidate) if self._solves(x, candidate) else rounded_table(fmt, table),
                )

    def _solves(self, end: Linear, candidate: Candidate) -> bool:
        return candidate.name in self._jobs and end.name in self._jobs[candidate.name][0].ends

    def _solved(self, end: Linear, candidate: Candidate) -> Tensor:
        plan, job = self._jobs[candidate.name]
        stage = job.stage(STAGE)
        assert stage is not None
        return dequantize(job.quantized(stage, end.name, plan.ends[end.name].weights)[0])

    def activations(self, unit: Unit, candidate: Candidate) -> dict[str, Activations]:
        """{linear: format of its input and its static scale}, for a candidate that quantizes inputs."""
        replaced = self.replacements(unit, candidate).items()
        return {name: (r.activations, r.static) for name, r in replaced if r.activations is not None}

    def output_error(self, unit: Unit, candidate: Candidate) -> float:
        """Relative squared output error, mean over the unit's linears, as the solver measured it; 0 for a unit that is kept."""
        if candidate.scheme is None:
            return 0.0
        if unit.is_end:
            error = sum(float((q - w).double().square().sum()) for _, w, q in self._tables(unit, candidate))
            total = sum(float(w.double().square().sum()) for _, w, _ in self._tables(unit, candidate))
            return error / max(total, 1e-30)
        entry = self._jobs[candidate.name][1].entries[unit.place]["linears"]
        return float(sum(entry[x.name]["error"] for x in unit.linears) / len(unit.linears))


@contextmanager
def probes(
    plans: dict[str, Plan], structure: ModelStructure, folder: Path, pool: Workers, progress: Progress
) -> Iterator[Probes]:
    """The open probes of every candidate; runs what is missing of them. plans: by candidate name."""
    with ExitStack() as stack:
        jobs: dict[str, tuple[Plan, Job]] = {}
        source_hash = {"sha256": structure.checkpoint.sha256()}
        for name, plan in plans.items():
            job = stack.enter_context(Job.open(folder / name.lower(), job_identity(plan, source_hash)))
            run_blocks(plan, structure, job, pool, _Named(progress, name))
            quantize_ends(plan, structure, job, pool, _Named(progress, name))
            jobs[name] = (plan, job)
        yield Probes(jobs, structure)


class _Named:
    """A listener that hears which candidate is at work."""

    def __init__(self, progress: Progress, name: str) -> None:
        self._progress, self._name = progress, name

    def start(self, what: str, total: int) -> None:
        self._progress.start(f"{self._name}: {what}", total)

    def step(self, amount: int = 1) -> None:
        self._progress.step(amount)
