"""What a run quantizes outside the blocks: embeddings and output head (``planning.ends``), and matrices that the model's class
does not load (``planning.unloaded``), which are rounded.

They are a stage of the job after the blocks. Blocks are calibrated on the original embeddings, so their codes are those of a
run without the options. A head is solved with its real inputs where the recipe's solver looks at inputs: the rows that leave
the last quantized block, behind the final norm. A tied matrix is solved the same way, with a share of the identity in its
Hessian, since a lookup weighs all columns alike.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from qkit.calibration.statistics import SAMPLE_TOKENS, Accumulator, Rows, Stats, StatsRequest, piece_of, run_pending
from qkit.engine.job import Job
from qkit.engine.parts import entry_of, pieces_of
from qkit.engine.solving import LinearResult, solve_matrix
from qkit.families.blocks import BlockStructure
from qkit.families.ends import EMBEDDINGS, final_norm
from qkit.families.structure import ModelStructure
from qkit.planning.linear_plan import LinearPlan
from qkit.planning.plan import Plan
from qkit.solvers.table import SOLVERS
from qkit.system.parallel import Workers
from qkit.system.progress import Progress
from qkit.tensor.formats import Format
from qkit.tensor.qtensor import dequantize, find_params, quantize
from qkit.transforms.rotate import rotate_outer

STAGE = "ends"  # of the journal
LOOKUP = 0.1  # share of the identity, in mean diagonals of the Hessian of the head's inputs
_ROWS = 4096  # that are in float32 at a time


def reads_rows(plan: Plan, structure: ModelStructure, block: BlockStructure) -> bool:
    """Whether the rows that leave a block, the last one, are inputs of a head that is solved with them."""
    return block.path == structure.blocks[-1].path and any(SOLVERS[p.solver].needs_hessian for p in plan.ends.values())


def quantize_ends(plan: Plan, structure: ModelStructure, job: Job, pool: Workers, progress: Progress) -> None:
    """Quantize and commit the ends of the plan. Does nothing when that is done, or the plan has none."""
    if not plan.ends or job.stage(STAGE) is not None:
        return
    progress.start("what is outside the blocks", len(plan.ends))
    originals = rotate_outer(structure, plan.seed) if "rotate" in plan.transforms else {}
    results: list[LinearResult] = []
    for p in plan.ends.values():
        weight = originals.get(f"{p.name}.weight")
        weight = structure.checkpoint.read_finite(f"{p.name}.weight") if weight is None else weight
        stats = _inputs(p, plan, structure, job, pool, originals) if SOLVERS[p.solver].needs_hessian else None
        results.append(solve_matrix(p, weight, stats, structure.dtype, pool))
        progress.step()
    job.commit(job.finished, pieces_of(results), {"stage": STAGE, **entry_of(results)}, None)


def rounded_table(fmt: Format, table: Tensor) -> Tensor:
    """The values, float32 [rows, width], of a table in the checkpoint's dtype that is rounded to a format without data, a few
    rows at a time."""
    result = torch.empty(table.shape, dtype=torch.float32)
    for start in range(0, len(table), _ROWS):
        rows = table[start : start + _ROWS].float()
        q = quantize(rows, find_params(rows, fmt, table.dtype, search=True), fmt)
        result[start : start + _ROWS] = dequantize(q)
    return result


def _inputs(
    p: LinearPlan, plan: Plan, structure: ModelStructure, job: Job, pool: Workers, originals: dict[str, Tensor]
) -> Stats | None:
    """Statistics of the inputs of the head; None where no row is left. originals: tensors that a transform rewrote."""
    record, calibration = job.rows_entering(job.finished), plan.calibration
    assert record is not None and calibration is not None
    count, length = calibration.tokens.shape
    dtype = getattr(torch, plan.run_dtype)
    rows = Rows(
        path=job.rows_path(job.finished),
        count=count,
        tokens=length,
        hidden=p.shape[1],
        dtype=dtype,
        good=[bool(g) for g in record["good"]],
        kinds=calibration.row_kinds,
    )
    norm, sums = _norm(structure, dtype, originals), Accumulator(p.shape[1], StatsRequest(True, False), dtype)
    with torch.inference_mode():
        for span in rows.pieces():
            x: Tensor = norm(rows.read(*span)).flatten(0, -2)
            valid = rows.valid(*span)
            x = x if valid is None else x[valid]
            sums.add(piece_of(x, max(1, rows.total // SAMPLE_TOKENS), ranges=False))
            run_pending([sums], pool, everything=False)
        run_pending([sums], pool, everything=True)
    stats = sums.finish()
    norm.to("meta")
    return (_for_lookups(stats) if EMBEDDINGS in p.uses else stats) if stats.tokens else None


def _for_lookups(stats: Stats) -> Stats:
    """The statistics with a share of the identity, for a matrix whose rows are looked up, too."""
    assert stats.hessian is not None
    share = LOOKUP * float(stats.mean_square.mean())
    hessian = stats.hessian + share * torch.eye(len(stats.hessian))
    return replace(stats, hessian=hessian, mean_square=stats.mean_square + share)


def _norm(structure: ModelStructure, dtype: torch.dtype, originals: dict[str, Tensor]) -> nn.Module:
    """The final norm with its weights; ``to('meta')`` gives them back."""
    path = final_norm(structure)
    assert path is not None
    module = structure.model.get_submodule(path).to(dtype).to_empty(device="cpu")
    for name, parameter in module.named_parameters():
        stored = structure.stored_name(f"{path}.{name}")
        value = originals.get(stored)
        parameter.data.copy_(structure.checkpoint.read_finite(stored) if value is None else value)
    return module.requires_grad_(False)
