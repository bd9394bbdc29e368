"""What a run will cost, from shapes alone: bytes on disk, peak memory, and where the time goes.

Memory is what is resident at the worst moment of each phase on top of the process itself; the largest is the forecast.
Time is given as operations per phase and their shares, since seconds depend on the machine.
"""

from __future__ import annotations

import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from qkit.blocks import BlockOutline
from qkit.capture import PIECE_TOKENS, SAMPLE_TOKENS
from qkit.errors import IOFailure, Unsupported
from qkit.families.outline import Outline
from qkit.machine import available_memory, process_bytes
from qkit.plan import Plan
from qkit.solvers.table import SOLVERS
from qkit.solving import SLICE_ROWS
from qkit.transforms.table import TRANSFORMS

ALLOCATOR = 1.1  # resident memory over live bytes, measured: freed blocks that the allocator keeps


@dataclass(frozen=True)
class Forecast:
    """Bytes, and operations (multiply-adds count twice) by phase."""

    packed_bytes: int
    source_bytes: int
    job_bytes: int
    peak_memory: int
    memory: dict[str, int]
    operations: dict[str, float]

    def to_json(self) -> dict[str, Any]:
        """All figures, and the phases with their shares of the operations, largest first."""
        total = sum(self.operations.values()) or 1.0
        ranked = sorted(self.operations.items(), key=lambda kv: -kv[1])
        return {**asdict(self), "time_dominating": [{"phase": k, "share": round(v / total, 3)} for k, v in ranked if v]}


def forecast(plan: Plan, outline: Outline, workers: int) -> Forecast:
    """The cost of a plan."""
    tensors = outline.checkpoint.tensors
    item = outline.dtype.itemsize
    c = plan.calibration
    tokens = 0 if c is None else c.samples * c.seqlen
    hidden = int(getattr(outline.model.config, "hidden_size", 0))
    outer = sum(tensors[s].nbytes for _, s in outline.outer)
    largest = max((tensors[s].nbytes for _, s in outline.outer), default=0)
    memory = {"read the outer tensors": (outer if c else 0) + largest}
    ops = {"forward passes": 0.0, "Hessians": 0.0, "factorizations": 0.0, "solving": 0.0, "packing and checking": 0.0}
    part_bytes = 0
    for block in outline.blocks:
        weights = sum(tensors[s].nbytes for _, s in block.stored)
        size = sum(x.shape[0] * x.shape[1] for x in block.linears)
        memory["one block"] = max(memory.get("one block", 0), _block_memory(plan, block, weights, item, workers))
        part_bytes += size + sum(x.shape[0] * x.shape[1] // 8 for x in block.linears)
        if c is not None:
            ops["forward passes"] += 2 * 2.0 * size * tokens
        for group in block.groups:
            p = plan.linears.get(group.linears[0].name)
            if p is None:
                continue
            out, columns = sum(x.shape[0] for x in group.linears), group.linears[0].shape[1]
            search = 11 * 8
            if SOLVERS[p.solver].needs_hessian:
                ops["Hessians"] += 1.0 * columns * columns * tokens
                ops["factorizations"] += 4 / 3 * columns**3 * 2
                ops["solving"] += 1.0 * out * columns * columns
            ops["solving"] += float(search * out * columns)
            ops["packing and checking"] += 20.0 * out * columns
    linear_bytes = max((p.shape[0] * p.shape[1] for p in plan.linears.values()), default=0)
    memory["export"] = max(largest * 2, int(linear_bytes * 2.5))
    memory["verify"] = max(largest * 2, linear_bytes * 12)
    row_bytes = tokens * hidden * item
    peak = process_bytes() + int(ALLOCATOR * max(memory.values()))
    return Forecast(plan.packed_bytes, plan.source_bytes, part_bytes + 2 * row_bytes, peak, memory, ops)


def _block_memory(plan: Plan, block: BlockOutline, weights: int, item: int, workers: int) -> int:
    """Worst moment of one block, on top of the process."""
    size = sum(x.shape[0] * x.shape[1] for x in block.linears)
    codes = size + size // 8  # codes and scales of finished linears
    largest = max(sum(x.shape[0] * x.shape[1] for x in g.linears) for g in block.groups)
    widest = max(x.shape[0] * x.shape[1] for x in block.linears)
    columns = max(x.shape[1] for x in block.linears)
    # The group at work: its float32 weights and codes; per worker the buffers of a slice, or a whole linear dequantized.
    solving = largest * 5 + workers * max(SLICE_ROWS * columns * 4 * 5, widest * 9)
    base = weights + codes
    changed = 4 * size if plan.transforms else 0
    if plan.calibration is None:
        return base + changed + solving
    widths = [g.linears[0].shape[1] for g in block.groups]
    needs = any(SOLVERS[p.solver].needs_hessian for x in block.linears if (p := plan.linears.get(x.name)))
    hessians = sum(w * w * 4 for w in widths) if needs else 0
    samples = sum(w * SAMPLE_TOKENS * item for w in widths)
    chunk = workers * PIECE_TOKENS * (sum(widths) * item + 2 * max(widths) * 4)
    piece = workers * PIECE_TOKENS * max(widths) * item * 8
    factors = sum(w * w * 4 * 3 for w in sorted(widths, reverse=True)[:workers]) if needs else 0
    search = any(TRANSFORMS[t].stage == "stats" for t in plan.transforms)
    outputs = largest // min(widths) * SAMPLE_TOKENS * 4 * 3 if search else 0
    return base + hessians + samples + changed + max(chunk + piece, factors + solving, outputs + solving)


def refuse_what_cannot_fit(found: Forecast, folder: Path) -> None:
    """Raises Unsupported for memory, IOFailure for disk, with needed and available bytes."""
    available = available_memory()
    if available is not None and found.peak_memory > available:
        raise Unsupported(
            f"the run needs about {_gb(found.peak_memory)} of memory and {_gb(available)} are available: use fewer "
            "--threads, shorter rows (--seqlen), or a larger machine"
        )
    there = next(p for p in (folder, *folder.resolve().parents) if p.exists())
    free = shutil.disk_usage(there).free
    needed = int(1.1 * (found.packed_bytes + found.job_bytes))
    if needed > free:
        raise IOFailure(
            f"{there}: the run needs about {_gb(needed)} of disk and {_gb(free)} are free: make room or use --out"
        )


def _gb(n: int) -> str:
    return f"{n / 1e9:.2f} GB"
