"""The record of a block in a job: the tensors of its part, and its entry in the journal."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from qkit.engine.solving import LinearResult
from qkit.errors import Unsupported
from qkit.families.materialize import plain_tensors
from qkit.families.structure import ModelStructure
from qkit.files.checkpoint import Checkpoint
from qkit.files.folder import DENOISER
from qkit.planning.plan import Plan, recorded_sequences
from qkit.tensor import lowrank, sparse
from qkit.tensor.input_transform import RESIDUAL, SCALE
from qkit.tensor.qtensor import QTensor
from qkit.transforms.state import BlockState

ROW_NOTICE, RECORDED = "calibration", "recorded"  # in an entry of the journal


def part_tensors(
    results: list[LinearResult], state: BlockState, originals: bool, kept: Collection[str] = ()
) -> dict[str, Tensor]:
    """{name: tensor} of a part: '<linear>:<piece>' for quantized linears, and the checkpoint's name for plain tensors.

    originals: add the weights that a transform rewrote, as they were before quantization.
    kept: linears that the export takes from the source. Raises Unsupported where one was rewritten.
    """
    tensors = plain_tensors(state.structure.checkpoint, state.block, state.module)
    planned = {r.plan.name for r in results}
    for linear in state.block.linears:
        if linear.name in kept and linear.name in state.changed:
            raise Unsupported(
                f"{linear.name}: --keep-source keeps it as it is, and another option rewrote its weight: leave one "
                "of the two out"
            )
        if linear.name not in planned and linear.name not in kept:
            name = f"{linear.name}.weight"
            original = state.structure.checkpoint.read(name)
            changed = state.changed.get(linear.name)
            tensors[name] = original if changed is None else changed.to(original.device, original.dtype)
    group_of = {x.name: g.key for g in state.block.groups for x in g.linears}
    for r in results:
        q = r.qtensor
        changed = state.changed.get(r.plan.name) if originals else None
        tensors_of_linear = {
            "codes": q.codes,
            **params_of(q),
            "input_scale": r.static,
            SCALE: state.scales.get(group_of[r.plan.name]),
            RESIDUAL: state.residual.get(group_of[r.plan.name]),
            "original": None if changed is None else changed.to(state.structure.dtype),
            **({} if q.sparse is None else sparse.write(q.sparse, q.shape)),
            **({} if q.low_rank is None else lowrank.write(q.low_rank)),
        }
        tensors.update(
            {f"{r.plan.name}:{k}": v.contiguous().cpu() for k, v in tensors_of_linear.items() if v is not None}
        )
    return as_stored(tensors, state.structure.checkpoint)


def params_of(q: QTensor) -> dict[str, Tensor | None]:
    """The parameters of a quantized weight by name."""
    return {f.name: getattr(q.params, f.name) for f in fields(q.params)}


def as_stored(tensors: dict[str, Tensor], checkpoint: Checkpoint) -> dict[str, Tensor]:
    """The tensors with stored ones in the place of their views, where all views of these are there and as they were."""
    result = dict(tensors)
    for sources, names in checkpoint.view_groups.items():
        if names[0] in tensors and all(n in tensors and torch.equal(tensors[n], checkpoint.read(n)) for n in names):
            for name in names:
                del result[name]
            result.update({source: checkpoint.read_source(source) for source in sources})
    return result


def pieces_of(results: list[LinearResult]) -> dict[str, Tensor]:
    """{'<name>:<piece>': tensor} of quantized matrices that have codes and scales alone."""
    pieces = {
        f"{r.plan.name}:{name}": tensor
        for r in results
        for name, tensor in {"codes": r.qtensor.codes, **params_of(r.qtensor)}.items()
        if tensor is not None
    }
    return {name: tensor.contiguous().cpu() for name, tensor in pieces.items()}


def entry_of(results: list[LinearResult]) -> dict[str, Any]:
    """The journal entry with the records of all linears."""
    return {"linears": {r.plan.name: r.entry() for r in results}}


def row_notice(finite_inside: list[bool], finite_after: list[bool], over_limit: set[int]) -> dict[str, Any]:
    """Journal fields about the rows of a block; empty if all rows are good.

    The counts are: all rows, rows left out for non-finite values, and rows with finite values beyond the checkpoint's dtype.

    finite_inside, finite_after: which rows are finite at the inputs of the block's linears, and after the block
    """
    bad = [a and b for a, b in zip(finite_inside, finite_after, strict=True)].count(False)
    counts = {"rows": len(finite_after), "not_finite": bad, "beyond_dtype": len(over_limit)}
    return {ROW_NOTICE: counts} if bad or over_limit else {}


def recorded_notes(plan: Plan, structure: ModelStructure) -> list[str]:
    """Sentences for the user, before a run, about blocks whose inputs will be recorded (``engine.recorded``)."""
    return [
        f"the {len(s.blocks)} blocks of the {s.name} part cannot be run one after another: their inputs are recorded in "
        "runs of the whole original model, without the errors of the blocks before them"
        for s in recorded_sequences(plan, structure)
        if s.name != DENOISER  # of a diffusion model this is so by nature
    ]


def row_notices(journal: Iterable[dict[str, Any]], dtype: str) -> list[str]:
    """Sentences for the user about rows that were left out, that overflow, or that are of the original model.

    journal: its entries; dtype: of the checkpoint
    """
    entries = list(journal)
    counts = [entry[ROW_NOTICE] for entry in entries if ROW_NOTICE in entry]
    bad, over_limit = (max((t[name] for t in counts), default=0) for name in ("not_finite", "beyond_dtype"))
    count = counts[0]["rows"] if counts else 0
    sentences = []
    recorded = sum(bool(entry.get(RECORDED)) for entry in entries)
    if recorded:
        sentences.append(
            f"{recorded} blocks cannot be run one after another: they were calibrated on inputs of the original model, without "
            "the errors of the blocks before them"
        )
    if bad:
        sentences.append(f"{bad} of {count} calibration rows were left out: their activations are not finite")
    if over_limit:
        sentences.append(
            f"{over_limit} of {count} calibration rows have activations that {dtype} cannot hold: they were measured in "
            f"float32, and a model in {dtype} overflows there: run the result in bfloat16, or quantize a bfloat16 checkpoint"
        )
    return sentences
