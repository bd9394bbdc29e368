"""Learned rounding of the whole model, once its blocks are done.

Blocks are learned one by one, each against its own outputs, so none accounts for the sum of all errors at the logits. Here the
codes of all linears are learned together. The loss is the KL divergence from the original model's next-token probabilities. It
is an end-to-end stage as in EfficientQAT (arXiv 2407.11062, section 3.3, which learns scales on the loss of a text).

Our choices: only offsets are learned (scales gained nothing), and steps follow the size of gradients, not their sign. So about
one weight in a hundred changes its code: those near the edge between two codes with the largest gradients. Held-out rows decide
which step is kept, so the result is never worse there than before. Memory holds two copies of the model, and the offsets.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qkit.engine.entry import quantizing_hook
from qkit.engine.job import WHOLE, Job
from qkit.engine.original_model import original_model
from qkit.families.structure import ModelStructure
from qkit.nn.attention import LONGEST, PlainAttention
from qkit.planning.plan import Plan, parts
from qkit.rounding.block import LOOKS, PIECE_TOKENS, held_out
from qkit.rounding.learned_weight import LearnedWeight, LearningState
from qkit.system.parallel import Workers
from qkit.system.progress import Progress
from qkit.tensor.qtensor import weight_sha256

RATE = 1.0e-4  # of the first step, in units of the grid, for a gradient of the size that is usual in its linear


def learn_end_to_end(plan: Plan, structure: ModelStructure, job: Job, pool: Workers, progress: Progress) -> None:
    """Learn the codes of the planned linears of the language model together, and commit them.

    Does nothing where the job has them already, or the plan asks for no steps.
    """
    steps = plan.learning("e2e_steps")
    if not steps or job.stage(WHOLE) is not None:
        return
    assert plan.calibration is not None
    rows = _Tokens(plan.calibration.tokens.clone(), plan.calibration.mask)
    first_held = len(rows.ids) - held_out(len(rows.ids))
    held_rows, training_rows = rows[first_held:], rows[:first_held] if first_held else rows
    batch = next(iter(plan.linears.values())).options["batch"]
    progress.start("learned rounding of the whole model", steps)
    with torch.inference_mode(False):
        model = _Model(plan, structure, job, pool)
        names = [w.learner.linear.name for w in model.states]
        weights = pool.map(LearningState.weight, model.states)
        first_divergence = best_divergence = model.divergence(weights, held_rows)
        order, queue = torch.Generator().manual_seed(plan.seed), list[int]()
        for number in range(steps):
            if len(queue) < batch:
                queue = torch.randperm(len(training_rows.ids), generator=order).tolist() + queue
            chosen = [queue.pop() for _ in range(min(batch, len(queue)))]
            gradients = model.gradients(weights, training_rows[chosen])
            rate = RATE * (1 - number / steps)
            weights = pool.map(
                lambda pair: pair[0].step_offsets(pair[1], rate),  # noqa: B023
                zip(model.states, gradients, strict=True),
            )
            if (number + 1) % -(-steps // LOOKS) == 0 or number + 1 == steps:
                divergence = model.divergence(weights, held_rows)
                if divergence < best_divergence:
                    best_divergence = divergence
                    for state in model.states:
                        state.save_best()
            progress.step()
        records, tensors, entry = job.records(), dict[str, Tensor](), dict[str, Any]()
        for name, state in zip(names, model.states, strict=True):
            q = state.learner.finish(*state.best)
            tensors[f"{name}:codes"] = q.codes
            entry[name] = {**records[name], "weight_sha256": weight_sha256([q])}
    divergences = {"divergence": [float(f"{first_divergence:.6g}"), float(f"{best_divergence:.6g}")]}
    job.commit(job.finished, tensors, {"stage": WHOLE, "linears": entry, **divergences}, None)


@dataclass(frozen=True)
class _Tokens:
    """Rows of a text. ids: int64 [rows, length]; mask: bool of the same shape, True for tokens that count; None: all"""

    ids: Tensor
    mask: Tensor | None

    def __getitem__(self, rows: slice | list[int]) -> _Tokens:
        return _Tokens(self.ids[rows], None if self.mask is None else self.mask[rows])

    @property
    def counted(self) -> int:
        """Number of tokens that count."""
        return self.ids.numel() if self.mask is None else int(self.mask.sum())

    def pieces(self) -> list[_Tokens]:
        """The rows as one worker runs them through the model at a time."""
        step = _rows_at_a_time(self.ids.shape[1])
        return [self[start : start + step] for start in range(0, len(self.ids), step)]


class _Model:
    """The original and the quantized model, with a learning state for every planned linear.

    Pieces of a batch run in parallel and are summed in order: the result does not depend on the number of workers.
    """

    def __init__(self, plan: Plan, structure: ModelStructure, job: Job, pool: Workers) -> None:
        self.pool, self.local = pool, threading.local()
        dtype = getattr(torch, plan.run_dtype)
        source = original_model(plan, structure, job)
        self.states, self.paths, self.hooks = list[LearningState](), list[str](), list[tuple[str, Any]]()
        for index, block in enumerate(parts(plan, structure)):
            for linear in (x for x in block.linears if x.name in plan.linears):
                p = plan.linears[linear.name]
                q, static = job.quantized(index, p.name, p.weights)
                inputs = job.inputs(index, p.name, p.shape[1], p.rotation)
                weight = inputs.weight(linear.view(source.get_submodule(block.path)).float())
                self.states.append(LearningState(LearnedWeight.of(linear, weight, q, inputs).cloned(), dtype))
                self.paths.append(f"{block.path}.{linear.param}")
                if p.activations is not None:
                    self.hooks.append(
                        (self.paths[-1].removesuffix(".weight"), quantizing_hook(p.activations, static, inputs))
                    )
        self.original = source.to(dtype)

    def divergence(self, weights: Sequence[Tensor], rows: _Tokens) -> float:
        """Mean KL divergence from the original model over the tokens that count, in nats."""

        def one(piece: _Tokens) -> float:
            with torch.inference_mode(False), torch.no_grad(), PlainAttention():
                return float(self._summed_divergence(weights, piece))

        return sum(self.pool.map(one, rows.pieces())) / rows.counted

    def gradients(self, weights: Sequence[Tensor], rows: _Tokens) -> list[tuple[Tensor, ...]]:
        """Gradients of the summed KL divergence: for each weight, those of every piece."""

        def one(piece: _Tokens) -> tuple[Tensor, ...]:
            with torch.inference_mode(False), torch.enable_grad(), PlainAttention():
                leaves = [w.detach().requires_grad_() for w in weights]
                return torch.autograd.grad(
                    self._summed_divergence(leaves, piece), leaves, allow_unused=True, materialize_grads=True
                )

        return list(zip(*self.pool.map(one, rows.pieces()), strict=True))

    def _summed_divergence(self, weights: Sequence[Tensor], rows: _Tokens) -> Tensor:
        with torch.no_grad():
            original = self._logits(self.original, {}, rows.ids)
        logits = self._logits(self._worker_model(), self._by_path(weights), rows.ids)
        if rows.mask is not None:
            original, logits = original[rows.mask], logits[rows.mask]
        return nn.functional.kl_div(logits, original, reduction="sum", log_target=True)

    def _by_path(self, weights: Sequence[Tensor]) -> dict[str, Tensor]:
        linears = (x.learner.linear for x in self.states)
        return {p: x.as_stored(w) for p, x, w in zip(self.paths, linears, weights, strict=True)}

    def _logits(self, model: nn.Module, weights: Mapping[str, Tensor], tokens: Tensor) -> Tensor:
        """Log probabilities, float32 [rows, length, vocabulary]."""
        inputs = {"input_ids": tokens, "use_cache": False}
        logits = torch.func.functional_call(model, dict(weights), (), inputs).logits
        log_probs: Tensor = logits.float().log_softmax(-1)
        return log_probs

    def _worker_model(self) -> nn.Module:
        """The worker's own copy of the model, with hooks that quantize inputs; tensors are shared with the original."""
        if not hasattr(self.local, "model"):
            shared = {id(t): t for t in (*self.original.parameters(), *self.original.buffers())}
            self.local.model = copy.deepcopy(self.original, shared)
            for path, hook in self.hooks:
                self.local.model.get_submodule(path).register_forward_pre_hook(hook)
        model: nn.Module = self.local.model
        return model


def _rows_at_a_time(length: int) -> int:
    """Number of rows that one worker runs through the model at a time."""
    return max(1, PIECE_TOKENS // length)


def end_to_end_memory(plan: Plan, structure: ModelStructure, workers: int) -> int:
    """Peak bytes of the end-to-end stage.

    These are: the model in float32 and in the dtype that it runs in; for every weight the original, the offset, its first and
    its best value (float32) and the codes; the dequantized weights and their gradients for every piece; and for each worker the
    activations of a piece for the backward pass, and its logits.
    """
    assert plan.calibration is not None
    item, sizes = getattr(torch, plan.run_dtype).itemsize, [p.shape[0] * p.shape[1] for p in plan.linears.values()]
    batch = next(iter(plan.linears.values())).options["batch"]
    rows = _rows_at_a_time(plan.calibration.seqlen)
    piece_count, tokens = -(-batch // rows), rows * plan.calibration.seqlen
    hidden, heads = (int(getattr(structure.text_config, n, None) or 0) for n in ("hidden_size", "num_attention_heads"))
    scores = 4 * heads * plan.calibration.seqlen if plan.calibration.seqlen <= LONGEST else 0
    widths = sum(p.shape[0] + p.shape[1] for p in plan.linears.values())
    activations = tokens * (widths + (8 * hidden + scores) * len(structure.blocks)) * item
    logits = tokens * structure.text_config.vocab_size * (4 * 4 + 2 * item)
    learned = sum(sizes) * (17 + (1 + piece_count) * item) + 32 * max(sizes)
    return int(4 * structure.parameters + learned + min(workers, piece_count) * (activations + logits))
