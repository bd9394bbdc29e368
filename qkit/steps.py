"""The policy of a packed pipeline: observed, fitted and written to the record in its folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from qkit.diffusion.controller import attach
from qkit.diffusion.fitting import PROMPTS, Observer, fit
from qkit.diffusion.pipeline import load_pipeline
from qkit.diffusion.policy import Asked
from qkit.diffusion.trajectory import Trajectory, sample
from qkit.families.outline import Outline
from qkit.folder import DENOISER, RECORD, weights_folder
from qkit.plan import Plan
from qkit.run import Progress
from qkit.safefile import write_atomic
from qkit.sensitivity.decoupled import PICKED, Fixed, allocate

ENTRY = "diffusion"  # of qkit.json
_SEEDS = 100_000  # away from those of the rows


def decide_steps(plan: Plan, outline: Outline, packed: Path, progress: Progress) -> None:
    """Observe the packed pipeline in ``packed`` and write its policy into its qkit.json; nothing if none is asked for.

    Raises BadCalibration as sampling does.
    """
    if plan.policy is None:
        return
    assert (
        plan.calibration is not None and isinstance(plan.calibration.trajectory, Trajectory) and outline.family.streams
    )
    trajectory = plan.calibration.trajectory
    prompts = trajectory.sampling.prompts
    pipeline = load_pipeline(packed, trajectory.dtype, "cpu")
    pipeline.set_progress_bar_config(disable=True)
    observer = Observer()
    attach(getattr(pipeline, DENOISER), observer, [b.path for b in outline.blocks], outline.family.streams)
    progress.start("observe errors and changes by step", PROMPTS)
    for number in range(PROMPTS):
        seed = _SEEDS + trajectory.seed + number
        observer.reset()
        sample(pipeline, prompts[number % len(prompts)], trajectory.sampling.call, seed)
        progress.step()
    asked, chosen = Asked(**plan.policy), None
    if asked.kind == "decoupled":
        fixed, again = Fixed(), load_pipeline(packed, trajectory.dtype, "cpu")
        again.set_progress_bar_config(disable=True)
        attach(getattr(again, DENOISER), fixed, [b.path for b in outline.blocks], outline.family.streams)
        linears = list(dict.fromkeys(s.linear for s in observer.seen))
        further = range(PROMPTS, PROMPTS + PICKED)
        samples = [(prompts[i % len(prompts)], _SEEDS + trajectory.seed + i) for i in further]
        chosen = allocate(again, fixed, linears, samples, trajectory.sampling.call, asked.width, progress)
    found = fit(observer, asked, chosen)
    file = weights_folder(packed) / RECORD
    record: dict[str, Any] = json.loads(file.read_bytes())
    record[ENTRY] = {**found.policy.to_json(), "asked": plan.policy, "fit": found.to_json()}
    write_atomic(file, (json.dumps(record, indent=2, sort_keys=True, allow_nan=False) + "\n").encode())
