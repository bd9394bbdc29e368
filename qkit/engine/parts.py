"""What a job keeps of a block: the tensors of a part, and an entry of the journal."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from qkit.engine.solving import LinearResult
from qkit.families.materialize import plain_tensors
from qkit.tensor import lowrank, sparse
from qkit.tensor.input_transform import RESIDUAL, SCALE
from qkit.transforms.state import BlockState

NOTICED = "calibration"  # in an entry of the journal


def part_tensors(results: list[LinearResult], state: BlockState, originals: bool) -> dict[str, Tensor]:
    """Tensors of a part: '<linear>:<piece>' of what is quantized, and plain tensors by their names.

    originals: also the weights that a transform rewrote, as they were before they were quantized.
    """
    tensors = plain_tensors(state.structure.checkpoint, state.block, state.module)
    planned = {r.plan.name for r in results}
    for linear in state.block.linears:
        if linear.name not in planned:
            name = f"{linear.name}.weight"
            original = state.structure.checkpoint.read(name)
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
            "original": None if changed is None else changed.to(state.structure.dtype),
            **({} if q.sparse is None else sparse.write(q.sparse, q.shape)),
            **({} if q.low_rank is None else lowrank.write(q.low_rank)),
        }
        tensors.update({f"{r.plan.name}:{k}": v.contiguous() for k, v in pieces.items() if v is not None})
    return tensors


def entry_of(results: list[LinearResult]) -> dict[str, Any]:
    """The records of all linears."""
    return {"linears": {r.plan.name: r.entry() for r in results}}


def noticed(inside: list[bool], after: list[bool], beyond: set[int]) -> dict[str, Any]:
    """What the journal says of the rows of a block, where something is to be said: how many there are, how many of them are
    left out for values that are not finite, and how many have finite ones beyond what the checkpoint's dtype holds.

    inside, after: which rows are good at the inputs of the block's linears, and behind the block
    """
    bad = [a and b for a, b in zip(inside, after, strict=True)].count(False)
    told = {"rows": len(after), "not_finite": bad, "beyond_dtype": len(beyond)}
    return {NOTICED: told} if bad or beyond else {}


def notices(journal: Iterable[dict[str, Any]], dtype: str) -> list[str]:
    """The same of all blocks for a person, a sentence each. journal: its entries; dtype: of the checkpoint."""
    told = [entry[NOTICED] for entry in journal if NOTICED in entry]
    bad, beyond = (max((t[name] for t in told), default=0) for name in ("not_finite", "beyond_dtype"))
    count = told[0]["rows"] if told else 0
    said = []
    if bad:
        said.append(f"{bad} of {count} calibration rows were left out: their activations are not finite")
    if beyond:
        said.append(
            f"{beyond} of {count} calibration rows have activations that {dtype} cannot hold: they were measured in float32, "
            f"and a model in {dtype} overflows there: run the result in bfloat16, or quantize a bfloat16 checkpoint"
        )
    return said
