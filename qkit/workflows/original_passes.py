"""Passes of the original model whose results solvers, transforms and learned rounding say that they need."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from qkit.engine.block_step import LOSS_GRADIENTS
from qkit.engine.job import Job
from qkit.engine.learning import LOSS_WEIGHTS
from qkit.families.structure import ModelStructure
from qkit.planning.plan import Plan, parts
from qkit.runtime.loading import load_checkpoint
from qkit.sensitivity.hidden import weighing
from qkit.sensitivity.token_weights import token_weights
from qkit.system.parallel import Workers
from qkit.system.progress import Progress
from qkit.transforms.balance import MODALITY_WEIGHTS, gradients, ratios

Pass = Callable[[Plan, ModelStructure, Job, Workers, Progress], list[Any]]


def original_passes(
    plan: Plan, structure: ModelStructure, job: Job, pool: Workers, progress: Progress
) -> dict[str, list[Any]]:
    """{need: for each block of the language model what the pass gave}; None is made where the job has no block left."""
    if job.finished == len(parts(plan, structure)):
        return {}
    passes: dict[str, Pass] = {
        MODALITY_WEIGHTS: modality_weights,
        LOSS_WEIGHTS: weighing,
        LOSS_GRADIENTS: token_weights,
    }
    return {need: run(plan, structure, job, pool, progress) for need, run in passes.items() if need in plan.needs}


def modality_weights(
    plan: Plan, structure: ModelStructure, _job: Job, _pool: Workers, progress: Progress
) -> list[dict[str, float]]:
    """For each block and part (or linear) what errors at images weigh against errors at answers."""
    assert plan.calibration is not None
    progress.start("gradients at images and answers", plan.calibration.samples)
    model = load_checkpoint(structure.checkpoint, torch.float32)
    return ratios(gradients(model, structure, plan.calibration, progress.step, plan.ratios))
