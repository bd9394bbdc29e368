"""Chooses the routed experts that stay (--prune-experts), in a pass of the original model before anything is quantized.

The rows pass through the blocks as the source has them, one block in memory at a time. What every expert contributes is
measured (``calibration.expert_scores``), and the lowest ones of each block are left out. Before a choice is used, the block
runs without them: whatever of the experts that stay a token had chosen, it has to choose again. The scores are stored in the
job, and a run that goes on reads them there.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from qkit.calibration.block_calls import Call, OneByOne
from qkit.calibration.block_runner import BlockRunner
from qkit.calibration.expert_scores import ExpertScores, chosen, routed
from qkit.calibration.statistics import Rows
from qkit.engine.entry import embed
from qkit.engine.job import Job
from qkit.errors import BadInput, Unsupported
from qkit.families.blocks import BlockStructure
from qkit.families.materialize import load_block, release
from qkit.families.pruned import Kept, PrunedStructure, check_left, cut_module, experts_of
from qkit.families.structure import ModelStructure
from qkit.files.owned import temp_path
from qkit.files.safefile import read_header, read_tensor, save_tensors
from qkit.planning.plan import Plan
from qkit.system.memory import ran_out
from qkit.system.parallel import Workers
from qkit.system.progress import Progress

SAME = 0.95  # share of choices that stay the same; rounding decides between experts that are nearly equal


def with_chosen_experts(
    plan: Plan, structure: ModelStructure, job: Job, pool: Workers, progress: Progress
) -> ModelStructure:
    """The structure with the experts that stay: by the scores of the job, or measured now. Itself where none are left out."""
    if not isinstance(structure, PrunedStructure):
        return structure
    file = job.path / "parts" / "experts.safetensors"
    if not file.exists():
        if job.finished:
            raise BadInput(f"{file}: missing: the job folder is damaged; delete {job.path} to start again")
        scores, tokens = _measure(plan, structure, job, pool, progress)
        save_tensors(file, {"scores": scores, "tokens": tokens})
    stored = {name: read_tensor(info) for name, info in read_header(file).items()}
    kept: Kept = {
        module: chosen(values, structure.cut.left)
        for module, values in zip(structure.cut.modules, stored["scores"], strict=True)
    }
    result = PrunedStructure(structure.whole, structure.cut, kept)
    result.scores = {
        module: (values.tolist(), tokens.tolist())
        for module, values, tokens in zip(structure.cut.modules, stored["scores"], stored["tokens"], strict=True)
    }
    return result


def pruning_memory(plan: Plan, structure: PrunedStructure) -> int:
    """Peak bytes: the largest block as the source has it, and once more without the experts that are left out."""
    item: int = getattr(torch, plan.run_dtype).itemsize
    largest = max(
        sum(p.numel() for p in structure.whole.model.get_submodule(b.path).parameters()) for b in structure.whole.blocks
    )
    return 2 * item * largest


def _measure(
    plan: Plan, structure: PrunedStructure, job: Job, pool: Workers, progress: Progress
) -> tuple[Tensor, Tensor]:
    """(scores, float64 [blocks with experts, experts], tokens, int64 of the same shape)."""
    assert plan.calibration is not None
    whole, scores, tokens = structure.whole, list[Tensor](), list[Tensor]()
    progress.start("embed the calibration rows", plan.calibration.samples)
    path = temp_path(job.path / "rows", "experts 0")
    rows, calls = embed(replace(plan, device="cpu"), whole, job, whole.sequences[-1], path, progress.step)
    with_experts = [b.index for b, _, _ in experts_of(whole)]
    for block in whole.blocks[: with_experts[-1] + 1]:
        progress.start(f"experts, block {block.index + 1}/{len(whole.blocks)}", len(list(rows.pieces())))
        if block.index not in calls:
            if block.experts:
                raise Unsupported(
                    f"{whole.checkpoint.path}: --prune-experts: {block.path} does not run on the calibration samples, so "
                    "the scores of its experts are not known: leave it out"
                )
            continue
        module = load_block(whole, block, getattr(torch, plan.run_dtype))
        out = temp_path(job.path / "rows", f"experts {block.index + 1}")
        found, leaving = _pass(module, block, rows, calls[block.index], pool, progress, out)
        if found is not None:
            scores.append(found[0])
            tokens.append(found[1])
            _check_choice(structure, block, module, rows, calls[block.index], chosen(found[0], structure.cut.left))
        release(module)
        rows.path.unlink()
        rows = leaving
    rows.path.unlink()
    return torch.stack(scores), torch.stack(tokens)


def _pass(
    module: nn.Module,
    block: BlockStructure,
    rows: Rows,
    call: Call | OneByOne,
    pool: Workers,
    progress: Progress,
    out: Any,
) -> tuple[tuple[Tensor, Tensor] | None, Rows]:
    """(scores and tokens of the experts of a block, None where it has none; the rows that leave it)."""
    if not block.experts:
        return None, BlockRunner(module, block, rows, call, pool).leave(out, progress.step)[0]
    fused = module.get_submodule(block.experts[0].module)
    counter = ExpertScores(fused, block.experts[0], rows)
    counting: Any = counter.counting(call)
    runner = BlockRunner(module, block, rows, counting, pool)
    handle = fused.register_forward_pre_hook(counter.hook, with_kwargs=True)
    try:
        leaving, _ = runner.leave(out, progress.step)
    finally:
        handle.remove()
    return counter.finish(), leaving


def _check_choice(
    structure: PrunedStructure,
    block: BlockStructure,
    whole: nn.Module,
    rows: Rows,
    call: Call | OneByOne,
    kept: tuple[int, ...],
) -> None:
    """Raises Unsupported where tokens do not choose again what they had chosen of the experts that stay."""
    span = next(rows.pieces())
    before = _choices(whole, block, rows, call, span)
    check_left(str(structure.checkpoint.path), len(kept), before.shape[-1])
    pruned = cut_module(structure, block, whole, kept)
    fault = (
        f"{structure.checkpoint.path}: --prune-experts: without {structure.cut.before - structure.cut.left} of its experts "
        f"{block.path} {{}}: it chooses in groups, by a table, or by rules of its own: use another share, or leave it out"
    )
    try:
        after = _choices(pruned, block, rows, call, span)
    except (RuntimeError, ValueError, LookupError) as e:
        if ran_out(e):
            raise
        raise Unsupported(fault.format("does not run")) from e
    finally:
        release(pruned)
    if int(after.max()) >= len(kept):
        raise Unsupported(fault.format("chooses experts that are not there"))
    again = (before[:, :, None] == torch.tensor(kept)[after][:, None, :]).any(-1)
    share = float(again[torch.isin(before, torch.tensor(kept))].double().mean())
    if share < SAME:
        raise Unsupported(fault.format(f"keeps {share:.0%} of the choices of tokens that it could keep"))


def _choices(
    module: nn.Module, block: BlockStructure, rows: Rows, call: Call | OneByOne, span: tuple[int, int]
) -> Tensor:
    """The experts that the tokens of some rows are sent to, int64 [tokens, k]."""
    seen: list[Tensor] = []
    fused = module.get_submodule(block.experts[0].module)
    handle = fused.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(routed(args, kwargs)[1]), with_kwargs=True
    )
    try:
        with torch.inference_mode():
            call(module, rows.read(*span), slice(*span))
    finally:
        handle.remove()
    return torch.cat(seen)
