"""The embeddings and the output head of a run, where they are quantized (``planning.ends``).

The blocks are calibrated on what the quantized embeddings give. Rounding them needs no data and gives the same codes every
time: it is done where rows enter the model, and once more in a stage of the job after the blocks, for the export.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qkit.engine.job import Job
from qkit.engine.parts import entry_of, pieces_of
from qkit.engine.solving import LinearResult, solve_matrix
from qkit.families.structure import ModelStructure
from qkit.planning.plan import Plan
from qkit.system.parallel import Workers
from qkit.system.progress import Progress
from qkit.tensor.formats import Format
from qkit.tensor.qtensor import dequantize, find_params, quantize
from qkit.transforms.rotate import rotate_outer

STAGE = "ends"  # of the journal
_ROWS = 4096  # that are in float32 at a time


def quantize_ends(plan: Plan, structure: ModelStructure, job: Job, pool: Workers, progress: Progress) -> None:
    """Quantize and commit the ends of the plan. Does nothing when that is done, or the plan has none."""
    if not plan.ends or job.stage(STAGE) is not None:
        return
    progress.start("embeddings and output head", len(plan.ends))
    originals = rotate_outer(structure, plan.seed) if "rotate" in plan.transforms else {}
    results: list[LinearResult] = []
    for p in plan.ends.values():
        weight = originals.get(f"{p.name}.weight")
        weight = structure.checkpoint.read_finite(f"{p.name}.weight") if weight is None else weight
        results.append(solve_matrix(p, weight, None, structure.dtype, pool))
        progress.step()
    job.commit(job.finished, pieces_of(results), {"stage": STAGE, **entry_of(results)}, None)


def rounded_table(fmt: Format, table: Tensor) -> Tensor:
    """The values, float32 [rows, width], that a table in the checkpoint's dtype has once it is rounded to a format: as a run
    rounds it, a few rows at a time."""
    result = torch.empty(table.shape, dtype=torch.float32)
    for start in range(0, len(table), _ROWS):
        rows = table[start : start + _ROWS].float()
        q = quantize(rows, find_params(rows, fmt, table.dtype, search=True), fmt)
        result[start : start + _ROWS] = dequantize(q)
    return result
