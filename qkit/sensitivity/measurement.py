"""What a profile measures: every unit of a model at every candidate, by some measures.

Results are kept in a file, so that a run that was stopped goes on.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from qkit.calibration.dataset import Calibration
from qkit.families.ends import EMBEDDINGS, HEAD
from qkit.families.structure import ModelStructure
from qkit.planning.plan import Plan
from qkit.sensitivity.candidates import Candidate
from qkit.sensitivity.chained_original import chained_original
from qkit.sensitivity.forecast import refuse_model_that_cannot_fit
from qkit.sensitivity.measures import MeasureContext, run_measure
from qkit.sensitivity.names import BLOCKWISE, MEASURED, check_measures
from qkit.sensitivity.original import Original, WholeOriginal
from qkit.sensitivity.probes import probes
from qkit.sensitivity.profile import CandidateCost, Profile, UnitProfile, profile_of_shapes
from qkit.sensitivity.result_cache import ResultCache
from qkit.sensitivity.units import applies, profiled_units, recorded_parts
from qkit.system.parallel import Workers
from qkit.system.progress import Progress


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """What is to be measured.

    plans:    of the probes, by candidate name: how their weights are quantized
    rows:     what losses are measured on
    points:   of the path integral
    settings: what the profile records of the request
    """

    structure: ModelStructure
    plans: dict[str, Plan]
    candidates: tuple[Candidate, ...]
    measures: tuple[str, ...]
    rows: Calibration
    points: int
    settings: dict[str, Any]

    @property
    def identity(self) -> dict[str, Any]:
        """The settings that every result depends on, by option, but for the candidate."""
        named = {f"--{name.replace('_', '-')}": self.settings[name] for name in _NAMED}
        ends = [part for part in recorded_parts(self.settings) if part in (EMBEDDINGS, HEAD)]
        return {
            "--model": self.structure.checkpoint.fingerprint()[:16],
            **named,
            **{f"--{end}": "auto" for end in ends},
            "--calib": f"rows {self.rows.digest[:16]}",
        }

    def make_profile(self, folder: Path, pool: Workers, progress: Progress) -> Profile:
        """The profile: probes every candidate, runs every measure, writes the file."""
        check_measures(self.measures)
        blank = profile_of_shapes(self.structure, self.candidates, self.measures, self.settings)
        with self.context(folder, folder / MEASURED, pool, progress) as context:
            costs = {name: run_measure(context, name) for name in self.measures}
            progress.start("every layer at one candidate", len(context.quantizing))
            uniform = {c.name: _whole(context, c) for c in context.quantizing}
            base_loss = context.original.base_loss
        units = tuple(_with_costs(u, costs) for u in blank.units)
        profile = replace(blank, base_loss=base_loss, units=units, whole=uniform)
        profile.save(folder)
        return profile

    @contextmanager
    def context(self, folder: Path, cache: Path, pool: Workers, progress: Progress) -> Iterator[MeasureContext]:
        """What measures work with. folder: has the probes; cache: a file of results.

        The original is in memory as a whole where a measure needs that, there are images, or its blocks cannot be run one
        after another.
        """
        structure, rows = self.structure, self.rows
        units = profiled_units(structure, self.settings)
        result_cache = ResultCache(cache, self.identity)
        with ExitStack() as stack:
            opened = stack.enter_context(probes(self.plans, structure, folder / "probes", pool, progress))
            original: Original | None = None
            if self.plans and set(self.measures) <= set(BLOCKWISE) and rows.kinds is None:
                original = stack.enter_context(chained_original(*opened.one, structure, units, rows, pool, progress))
            if original is None:
                refuse_model_that_cannot_fit(structure)
                original = WholeOriginal.load(structure, rows, folder, pool)
            yield MeasureContext(
                original=original,
                probes=opened,
                units=units,
                candidates=self.candidates,
                rows=rows,
                points=self.points,
                progress=progress,
                result_cache=result_cache,
                folder=folder,
            )


_NAMED = ("method", "samples", "seqlen", "points", "rows", "group_size")


def _with_costs(unit: UnitProfile, costs: Mapping[str, Mapping[tuple[str, str], float]]) -> UnitProfile:
    """costs: {measure: {(unit, candidate): cost}}; one that a measure says nothing of stays 0."""
    choices = {
        name: CandidateCost(c.bytes, {m: costs[m].get((unit.key, name), 0.0) for m in c.costs})
        for name, c in unit.choices.items()
    }
    return replace(unit, choices=choices)


def _whole(context: MeasureContext, candidate: Candidate) -> dict[str, float]:
    """The loss change and KL divergence with all units at a candidate."""
    key = f"whole {candidate.name}"
    result = context.result_cache.get(key)
    if result is None:
        loss, kl = context.changed([(u, candidate) for u in context.units if applies(u, candidate)])
        result = {"loss": loss - context.original.base_loss, "kl": kl}
        context.result_cache.put(key, result)
    context.progress.step()
    return dict(result)
