"""The policy of a packed pipeline: observed, fitted and written to the record in its folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from qkit.diffusion.controller import Controller, RuleController, attach
from qkit.diffusion.fitting import PROMPTS, Observer, fit
from qkit.diffusion.influence import Influence, influence_of
from qkit.diffusion.pipeline import load_pipeline
from qkit.diffusion.policy import PolicyConfig
from qkit.diffusion.trajectory import Trajectory, sample
from qkit.families.structure import ModelStructure
from qkit.files.folder import DENOISER
from qkit.files.record import add_to_record
from qkit.planning.plan import Plan
from qkit.sensitivity.decoupled import PICKED, allocate
from qkit.system.progress import Progress

ENTRY = "diffusion"  # of qkit.json
_SEEDS = 100_000  # away from those of the rows


def decide_steps(plan: Plan, structure: ModelStructure, packed: Path, progress: Progress) -> None:
    """Observes the packed pipeline in ``packed`` and writes its policy into its qkit.json; does nothing if none is asked
    for.

    Raises BadCalibration as sampling does.
    """
    if plan.policy is None:
        return
    assert plan.calibration is not None and isinstance(plan.calibration.trajectory, Trajectory)
    trajectory, config = plan.calibration.trajectory, PolicyConfig(**plan.policy)
    prompts, call = trajectory.sampling.prompts, trajectory.sampling.call
    numbered = [(prompts[i % len(prompts)], _SEEDS + trajectory.seed + i) for i in range(PROMPTS + PICKED)]
    observed, held_out = numbered[:PROMPTS], numbered[PROMPTS:]

    def controlled(controller: Controller) -> Any:
        pipeline = load_pipeline(packed, trajectory.dtype, "cpu")
        pipeline.set_progress_bar_config(disable=True)
        assert structure.family.streams is not None
        attach(getattr(pipeline, DENOISER), controller, [b.path for b in structure.blocks], structure.family.streams)
        return pipeline

    observer = Observer()
    pipeline = controlled(observer)
    progress.start("observe errors and changes by step", PROMPTS)
    for prompt, seed in observed:
        observer.reset()
        sample(pipeline, prompt, call, seed)
        progress.step()
    chosen: dict[str, str] | None = None
    if config.kind == "decoupled":
        ruled, linears = RuleController(), list(dict.fromkeys(s.linear for s in observer.observations))
        chosen = allocate(controlled(ruled), ruled, linears, held_out, call, config.width, progress)
    weights: Influence | None = None
    if config.weigh:
        ruled = RuleController()
        progress.start(
            "weigh errors by step and block", 1 + max(s.step for s in observer.observations) + len(structure.blocks)
        )
        weights = influence_of(controlled(ruled), ruled, observer.observations, held_out, call, progress.step)
    fitted = fit(observer, config, chosen, weights)
    add_to_record(packed, ENTRY, {**fitted.policy.to_json(), "asked": plan.policy, "fit": fitted.to_json()})
