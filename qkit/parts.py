"""What a job keeps of a block: the tensors of a part, and an entry of the journal."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from qkit import lowrank, sparse
from qkit.families.materialize import plain_tensors
from qkit.inputs import RESIDUAL, SCALE
from qkit.solving import Result
from qkit.transforms import BlockState


def part_tensors(results: list[Result], state: BlockState, originals: bool) -> dict[str, Tensor]:
    """Tensors of a part: '<linear>:<piece>' of what is quantized, and plain tensors by their names.

    originals: also the weights that a transform rewrote, as they were before they were quantized.
    """
    tensors = plain_tensors(state.outline.checkpoint, state.block, state.module)
    planned = {r.plan.name for r in results}
    for linear in state.block.linears:
        if linear.name not in planned:
            name = f"{linear.name}.weight"
            original = state.outline.checkpoint.read(name)
            changed = state.changed.get(linear.name)
            tensors[name] = original if changed is None else changed.to(original.dtype)
    group_of = {x.name: g.key for g in state.block.groups for x in g.linears}
    for r in results:
        q = r.qtensor
        changed = state.changed.get(r.plan.name) if originals else None
        pieces = {
            "codes": q.codes,
            "scale": q.params.scale,
            "zero": q.params.zero,
            "global_scale": q.params.global_scale,
            "input_scale": r.static,
            SCALE: state.scales.get(group_of[r.plan.name]),
            RESIDUAL: state.residual.get(group_of[r.plan.name]),
            "original": None if changed is None else changed.to(state.outline.dtype),
            **({} if q.sparse is None else sparse.write(q.sparse, q.shape)),
            **({} if q.low_rank is None else lowrank.write(q.low_rank)),
        }
        tensors.update({f"{r.plan.name}:{k}": v.contiguous() for k, v in pieces.items() if v is not None})
    return tensors


def entry_of(results: list[Result]) -> dict[str, Any]:
    """The records of all linears."""
    return {"linears": {r.plan.name: r.entry() for r in results}}
