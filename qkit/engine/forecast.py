"""Forecast of a run from shapes alone: bytes on disk, peak memory, and operations.

Memory is the peak of each phase on top of the process itself; the largest is the forecast. Time is given as operations for each
phase, since seconds depend on the machine.
"""

from __future__ import annotations

import math
import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from qkit.calibration.dataset import Calibration
from qkit.calibration.statistics import PENDING_BYTES, SAMPLE_TOKENS, piece_tokens
from qkit.engine.partial_output import partial_path
from qkit.engine.solving import ROUNDS, slice_rows, uses_inputs
from qkit.errors import IOFailure, Unsupported
from qkit.families.blocks import BlockStructure, LinearGroup
from qkit.families.structure import ModelStructure
from qkit.files.owned import files_below
from qkit.files.sources.opening import decoding_bytes
from qkit.nn.attention import LONGEST
from qkit.planning.linear_plan import LinearPlan
from qkit.planning.plan import Plan, parts, recorded_sequences, sequences
from qkit.rounding.block import PIECE_TOKENS
from qkit.solvers.table import SOLVERS
from qkit.system.machine import available_memory, process_bytes, resident_bytes
from qkit.system.words import megabytes
from qkit.tensor.lowrank import low_rank_bytes
from qkit.transforms.table import TRANSFORMS

_SCALES = 20  # scales of inputs that a transform tries for each layer, at about the most
UPDATE = 40  # operations of a step of learned rounding for each weight
_SEARCH = 11 * 8  # operations of a search of scales for each weight
LATER = 20 << 20  # libraries that a run loads after it was planned, measured
_BUSY_EXPERTS = 16  # groups of experts (two each) that a token's run holds inputs of, at the most in common models
ALLOCATOR = 1.1  # resident memory over live bytes, measured: freed blocks that the allocator keeps
# Beside it, free pieces below 16 MB that the heaps keep from block to block: of the largest phase a fifth, and no more than so
# much. Measured with rtn on Llama, Granite and Granite MoE, 2 to 39 MB a block.
_HEAP_SHARE, _HEAPS = 5, 64 << 20


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """Bytes, and operations by phase (a multiply-add counts as two).

    copied_bytes: of files that are copied to the output, in addition to ``packed_bytes``
    recorded_blocks: whose inputs are recorded in runs of the whole original model
    trial_job_bytes, trial_memory: what is needed beside where a trial shows that blocks cannot be run one after another; 0:
                     that is known
    """

    packed_bytes: int
    source_bytes: int
    job_bytes: int
    peak_memory: int
    memory: dict[str, int]
    operations: dict[str, float]
    copied_bytes: int = 0
    recorded_blocks: int = 0
    trial_job_bytes: int = 0
    trial_memory: int = 0

    def to_json(self) -> dict[str, Any]:
        """All figures, and the phases with their shares of the operations, largest first."""
        total = sum(self.operations.values()) or 1.0
        ranked = sorted(self.operations.items(), key=lambda kv: -kv[1])
        return {**asdict(self), "time_dominating": [{"phase": k, "share": round(v / total, 3)} for k, v in ranked if v]}


def _most(number: Any) -> int:
    """The largest of the numbers that a config gives: one, one for each level of a U-Net, or null."""
    return max((_most(n) for n in number), default=0) if isinstance(number, (list, tuple)) else int(number or 0)


def forecast(
    plan: Plan, structure: ModelStructure, workers: int, later_memory: dict[str, int] | None = None
) -> Forecast:
    """The forecast of a plan. later_memory: {phase: peak bytes} of phases that follow the blocks, on top of the process."""
    tensors = structure.checkpoint.tensors
    decoding = decoding_bytes(tensors)
    item = getattr(torch, plan.run_dtype).itemsize  # of a weight while its block is at work
    calibration = plan.calibration
    tokens = 0 if calibration is None else calibration.count * calibration.seqlen
    runs_originals = plan.needs_rows and (plan.learns or plan.compensates)  # the original model's rows go along
    needs_inputs = uses_inputs(plan.linears.values(), plan.learns)
    passes = (
        (1 + needs_inputs) * plan.needs_rows + plan.static_cache + runs_originals
    )  # of all rows, as many as these of a block
    hidden = int(getattr(structure.text_config, "hidden_size", 0))
    heads = _most(getattr(structure.text_config, "num_attention_heads", 0))
    outer = sum(tensors[s].nbytes for _, s in structure.outer)
    largest = max((tensors[s].nbytes for _, s in structure.outer), default=0)
    memory = {"read the outer tensors": (outer if calibration else 0) + largest + decoding}
    recorded = recorded_sequences(plan, structure)
    if recorded and (structure.family.streams is not None or whole_fits(structure, item)):
        memory["record the inputs of all blocks"] = structure.parameters * item  # of the whole model
    phases = (
        "forward passes",
        "Hessians",
        "factorizations",
        "scales of inputs",
        "solving",
        "learned rounding",
        "updates of learned rounding",
        "packing and checking",
    )
    searches = sum(TRANSFORMS[t].stage == "stats" for t in plan.transforms)
    ops = dict.fromkeys(phases, 0.0)
    part_bytes = 0
    for block in parts(plan, structure):
        weights = sum(math.prod(tensors[s].shape) for _, s in block.stored) * item
        size = sum(x.shape[0] * x.shape[1] for x in block.linears)
        memory["one block"] = max(memory.get("one block", 0), _block_memory(plan, block, weights, heads, item, workers))
        part_bytes += size + sum(x.shape[0] * x.shape[1] // 8 for x in block.linears)
        part_bytes += sum(low_rank_bytes(p.shape, p.rank) for x in block.linears if (p := plan.linears.get(x.name)))
        ops["forward passes"] += passes * 2.0 * size * tokens
        if plan.learns and calibration is not None:
            steps, step_tokens = _descent(plan, block, calibration)
            ops["learned rounding"] += 6.0 * size * steps * step_tokens
            ops["updates of learned rounding"] += float(UPDATE * size * steps)
        for group in block.groups:
            p = plan.linears.get(group.linears[0].name)
            if p is None:
                continue
            out, columns = sum(x.shape[0] for x in group.linears), group.linears[0].shape[1]
            if SOLVERS[p.solver].needs_hessian:
                drift = bool(p.options.get("compensate", 0))
                drift_cost = drift * (1 if p.drift_dtype(plan.run_dtype) == "bfloat16" else 2)
                ops["Hessians"] += (1.0 + drift_cost) * columns * columns * tokens
                ops["factorizations"] += (1 + 7 * drift) * columns**3 / 3
            ops["solving"] += solving_operations(p, out, columns)
            ops["scales of inputs"] += searches * _SCALES * 2.0 * SAMPLE_TOKENS * out * columns
            if p.rank:  # every round solves again, and decomposes the error of every linear, weighted by the Hessian
                resolve_cost = columns * SOLVERS[p.solver].needs_hessian + _SEARCH
                ops["solving"] += float(ROUNDS * resolve_cost * out * columns)
                decomposition_costs = (
                    2.0 * math.prod(x.shape) * sum(x.shape) + 9.0 * min(x.shape) ** 3 for x in group.linears
                )
                ops["solving"] += (ROUNDS + 2) * sum(decomposition_costs)
            ops["packing and checking"] += 20.0 * out * columns
    linear_bytes = max((p.shape[0] * p.shape[1] for p in plan.packed.values()), default=0)
    memory["one block"] += decoding
    memory["export"] = max(largest * 2, int(linear_bytes * 2.5)) + decoding
    if plan.ends:
        memory["what is outside the blocks"] = max(_end_memory(p, structure, workers) for p in plan.ends.values())
        part_bytes += sum(p.shape[0] * p.shape[1] * 9 // 8 for p in plan.ends.values())
    memory["verify"] = max(largest * 2, linear_bytes * 12)
    memory.update(later_memory or {})
    row_bytes = tokens * hidden * item
    largest_phase = max(memory.values())
    kept = min(largest_phase // _HEAP_SHARE, _HEAPS)
    peak = max(process_bytes(), resident_bytes() + LATER + int(ALLOCATOR * largest_phase) + kept)
    tried = _tried(plan, structure)
    return Forecast(
        packed_bytes=plan.packed_bytes,
        source_bytes=plan.source_bytes,
        job_bytes=part_bytes + (2 + sum(len(s.blocks) for s in recorded)) * row_bytes,
        peak_memory=peak,
        memory=memory,
        operations=ops,
        copied_bytes=_copied(plan, structure),
        recorded_blocks=sum(len(s.blocks) for s in recorded),
        trial_job_bytes=tried * row_bytes,
        trial_memory=structure.parameters * item if tried else 0,
    )


def solving_operations(p: LinearPlan, rows: int, columns: int) -> float:
    """Operations of a solver on a weight [rows, columns]."""
    passes = 1.0 + 4 * p.options.get("sweeps", 0) if SOLVERS[p.solver].needs_hessian else 0.0
    return passes * rows * columns * columns + float(_SEARCH * rows * columns)


def _tried(plan: Plan, structure: ModelStructure) -> int:
    """How many blocks are taken to run one after another, which a trial of one sample decides when they are quantized."""
    if not plan.needs_rows or not structure.is_discovered:
        return 0
    last = sequences(plan, structure)[-1]
    return 0 if structure.is_recorded(last) else len(last.blocks)


def whole_fits(structure: ModelStructure, item: int) -> bool:
    """Whether a model with ``item`` bytes a weight fits into memory."""
    available = available_memory()
    needed = resident_bytes() + LATER + int(ALLOCATOR * structure.parameters * item)
    return available is None or needed <= available


def _end_memory(p: LinearPlan, structure: ModelStructure, workers: int) -> int:
    """Peak bytes of solving the embeddings or the head: the matrix, its codes in slices and joined, the Hessian and its
    factor, and what each worker holds of a slice."""
    (rows, columns), item = p.shape, structure.dtype.itemsize
    hessian = 4 * 4 * columns**2 if SOLVERS[p.solver].needs_hessian else 0
    return rows * columns * (item + 3) + hessian + workers * min(slice_rows(rows, columns), rows) * columns * 24


def _copied(plan: Plan, structure: ModelStructure) -> int:
    """Bytes of the files that are copied, with those of the other parts of a pipeline."""
    folder = structure.checkpoint.path
    files = [folder / name for name in plan.side_files] + [folder.parent / name for name in plan.pipeline or ()]
    return sum(file.stat().st_size for file in files if file.exists())


def _block_memory(plan: Plan, block: BlockStructure, weights: int, heads: int, item: int, workers: int) -> int:
    """Peak bytes of one block, on top of the process. weights: its bytes while it is loaded; heads: of its attention."""
    size = sum(x.shape[0] * x.shape[1] for x in block.linears)
    base = weights + size + size // 8  # and codes and scales of finished linears
    base += 4 * size if plan.transforms else 0  # changed weights are kept in float32
    sweeps = any(p.options.get("sweeps") for x in block.linears if (p := plan.linears.get(x.name)))
    solving = max(_solving(g, item, workers, sweeps) + _branching(plan, g, workers) for g in block.groups)
    experts = [g for g in block.groups if g.expert is not None]
    hidden = block.groups[0].linears[0].shape[1]
    # A worker's run holds its rows on their way through the block: the inputs and outputs of its linears, at most.
    busy = [*(g for g in block.groups if g.expert is None), *experts[:_BUSY_EXPERTS]]
    piece_bytes = piece_tokens(hidden) * (sum(g.linears[0].shape[1] for g in busy) + 4 * hidden) * item
    if not plan.needs_rows:
        return base + max(solving, (workers + 1) * piece_bytes if plan.static_cache else 0)
    planned = [p for x in block.linears if (p := plan.linears.get(x.name))]
    hessian = any(SOLVERS[p.solver].needs_hessian or p.rank for p in planned)
    search = any(TRANSFORMS[t].stage == "stats" for t in plan.transforms)
    stages = [*([g] for g in block.groups if g.expert is None), *([experts] if experts else [])]
    stats = [sum(_stats(g, item, hessian) * (1 + plan.compensates) for g in stage) for stage in stages]
    running = (workers + 1) * piece_bytes * (1 + plan.compensates) + (PENDING_BYTES if hessian else 0)
    # Factorizing takes the Hessian twice more, solving once, for as many groups at a time as there are workers; sweeps take
    # it once more each time.
    squares = sorted((g.linears[0].shape[1] ** 2 * 4 for stage in stages for g in stage), reverse=True)
    factor = sum(squares[: workers if experts else 1]) if hessian else 0
    moments = [s + max(running, (2 + sweeps) * factor, (1 + sweeps) * factor + solving) for s in stats]
    if search:
        out = max(sum(x.shape[0] for x in g.linears) for g in block.groups)
        outputs = SAMPLE_TOKENS * out * 4 * 3 + 4 * 3 * max(x.shape[0] * x.shape[1] for x in block.linears)
        moments.append(sum(_stats(g, item, False) for g in block.groups) + max(running, outputs))
    if plan.learns:
        moments.append(_learning(plan, block, busy, heads, item, workers))
    return base + max(moments)


def _descent(plan: Plan, block: BlockStructure, rows: Calibration) -> tuple[int, int]:
    """Steps of learned rounding of a block, and tokens of each. A step has a forward and a backward pass (twice the cost), and
    updates every weight."""
    planned = next((p for x in block.linears if (p := plan.linears.get(x.name)) is not None), None)
    if planned is None:
        return 0, 0
    return planned.options["steps"], min(planned.options["batch"], rows.count) * rows.seqlen


def _learning(plan: Plan, block: BlockStructure, busy: list[LinearGroup], heads: int, item: int, workers: int) -> int:
    """Peak bytes of learned rounding.

    These are: for every weight the original, the offset, its first and its best value (float32), and gradients of every piece;
    for each worker the buffers of one linear's gradient, and the activations and scores of a piece for the backward pass.
    """
    assert plan.calibration is not None
    sizes, length = [x.shape[0] * x.shape[1] for x in block.linears], plan.calibration.seqlen
    hidden = block.groups[0].linears[0].shape[1]
    widths = sum(g.linears[0].shape[1] + sum(x.shape[0] for x in g.linears) for g in busy) + 8 * hidden
    scores = 4 * heads * length if length <= LONGEST else 0
    activations = (max(PIECE_TOKENS, length) if length else piece_tokens(hidden)) * (2 * widths + scores) * item
    batch = next((p.options["batch"] for x in block.linears if (p := plan.linears.get(x.name))), 0)
    piece_count = -(-batch // max(1, PIECE_TOKENS // max(1, length)))
    return sum(sizes) * (16 + (piece_count + 1) * item) + workers * (32 * max(sizes) + activations)


def _stats(group: LinearGroup, item: int, hessian: bool) -> int:
    """Bytes of the statistics of a group: the sample and the Hessian."""
    width = group.linears[0].shape[1]
    return 2 * SAMPLE_TOKENS * width * item + (4 * width * width if hessian else 0)


def _solving(group: LinearGroup, item: int, workers: int, sweeps: bool) -> int:
    """Peak bytes of solving a group.

    These are: the group's float32 weights (unless the block is in float32 itself), its codes in slices and joined; for each
    worker a slice in float32, its errors, buffers of its dequantization, and sample outputs; with sweeps also the original
    slice, and the scale of every weight twice.
    """
    rows = [x.shape[0] for x in group.linears]
    columns = group.linears[0].shape[1]
    values = sum(rows) * columns
    slice_values = min(slice_rows(sum(rows), columns), sum(rows)) * columns
    return values * (2 + (4 if item < 4 else 0)) + min(workers, -(-values // slice_values)) * slice_values * (
        20 + 12 * sweeps
    )


def _branching(plan: Plan, group: LinearGroup, workers: int) -> int:
    """Peak bytes of low-rank branches of a group.

    These are: its weights and codes once more; for each worker an error in float64 twice, its product with the Hessian, and an
    eigendecomposition.
    """
    shapes = [x.shape for x in group.linears if (p := plan.linears.get(x.name)) is not None and p.rank]
    if not shapes:
        return 0
    worker_bytes = max(
        24 * out * columns + 32 * min(out, columns) ** 2 + 16 * columns**2 * (out > columns) for out, columns in shapes
    )
    return 5 * sum(map(math.prod, shapes)) + min(workers, len(shapes)) * worker_bytes


def refuse_what_cannot_fit(cost: Forecast, folder: Path, work: Path | None = None) -> None:
    """Raises Unsupported for memory, IOFailure for disk, with needed and available bytes.

    folder: where the result goes; work: the job folder, if there is to be one
    """
    available = available_memory()
    if available is not None and cost.peak_memory > available:
        raise Unsupported(
            f"the run needs about {megabytes(cost.peak_memory)} of memory and {megabytes(available)} are available: use fewer "
            "--threads, shorter rows (--seqlen), or a larger machine"
        )
    # Files of an earlier run of the same command are used again, or removed first.
    if work is None:
        needs = {folder: 1.1 * (cost.packed_bytes + cost.copied_bytes + cost.job_bytes)}
    else:
        needs = {
            folder: 1.1 * (cost.packed_bytes + cost.copied_bytes) - _bytes_below(partial_path(folder)),
            work: 1.1 * cost.job_bytes - _bytes_below(work),
        }
    by_disk: dict[int, tuple[Path, float]] = {}
    for target, need in needs.items():
        existing = next(p for p in (target, *target.resolve().parents) if p.exists())
        disk = existing.stat().st_dev
        by_disk[disk] = (existing, max(0.0, need) + by_disk.get(disk, (existing, 0.0))[1])
    for existing, needed in by_disk.values():
        free = shutil.disk_usage(existing).free
        if needed > free:
            raise IOFailure(
                f"{existing}: the run needs about {megabytes(needed)} more of disk and {megabytes(free)} are free: free "
                "some space, or use another --out or --work"
            )


def _bytes_below(folder: Path) -> int:
    """Bytes of the files below a folder; 0 where there is none."""
    return sum(os.lstat(folder / name).st_size for name in files_below(folder)) if folder.is_dir() else 0
