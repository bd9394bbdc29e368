"""Learned rounding of the whole model, once its blocks are done.

Blocks are learned one by one, each against what it should give; what their errors make of each other at the end no block sees.
Here the codes of all linears go on together, against the original's expectation of every next token: the KL divergence from it,
which is an end-to-end stage as in EfficientQAT (arXiv 2407.11062, section 3.3; that one learns scales, on the loss of a text).

Ours: offsets are learned alone (scales gained nothing), and by the sizes of their gradients, not by their signs: of weights
near the edge between two codes, those go over for which the most speaks, one in a hundred or so. Held-out rows decide what is
kept, so that nothing is worse there than the blocks left it. Two copies of the model are in memory, and the offsets.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from qkit.engine.entry import quantizing
from qkit.engine.job import WHOLE, Job
from qkit.engine.original_model import original_model
from qkit.families.structure import ModelStructure
from qkit.nn.attention import LONGEST, ByProducts
from qkit.planning.plan import Plan, parts
from qkit.rounding.block import LOOKS, PIECE_TOKENS, held_out
from qkit.rounding.learned_weight import LearnedWeight, LearningState
from qkit.system.parallel import Workers
from qkit.system.progress import Progress
from qkit.tensor.qtensor import weight_sha256

RATE = 1.0e-4  # of the first step, in units of the grid, for a gradient of the size that is usual in its linear


def learn_whole(plan: Plan, structure: ModelStructure, job: Job, pool: Workers, progress: Progress) -> None:
    """Learn the codes of the planned linears of the language model together, and commit them; nothing where that is done
    already, or not asked for."""
    steps = plan.learning("e2e_steps")
    if not steps or job.stage(WHOLE) is not None:
        return
    assert plan.calibration is not None
    tokens = plan.calibration.tokens.clone()
    first_held = len(tokens) - held_out(len(tokens))
    held, given = tokens[first_held:], tokens[:first_held] if first_held else tokens
    batch = next(iter(plan.linears.values())).options["batch"]
    progress.start("learned rounding of the whole model", steps)
    with torch.inference_mode(False):
        model = _Model(plan, structure, job, pool)
        names = [w.learner.linear.name for w in model.states]
        weights = pool.map(LearningState.weight, model.states)
        first = least = model.divergence(weights, held)
        order, queue = torch.Generator().manual_seed(plan.seed), list[int]()
        for number in range(steps):
            if len(queue) < batch:
                queue = torch.randperm(len(given), generator=order).tolist() + queue
            picked = [queue.pop() for _ in range(min(batch, len(queue)))]
            gradients = model.gradients(weights, given[picked])
            rate = RATE * (1 - number / steps)
            weights = pool.map(
                lambda pair: pair[0].step_offsets(pair[1], rate),  # noqa: B023
                zip(model.states, gradients, strict=True),
            )
            if (number + 1) % -(-steps // LOOKS) == 0 or number + 1 == steps:
                now = model.divergence(weights, held)
                if now < least:
                    least = now
                    for state in model.states:
                        state.save_best()
            progress.step()
        records, tensors, entry = job.records(), dict[str, Tensor](), dict[str, Any]()
        for name, state in zip(names, model.states, strict=True):
            q = state.learner.finish(*state.best)
            tensors[f"{name}:codes"] = q.codes
            entry[name] = {**records[name], "weight_sha256": weight_sha256([q])}
    found = {"divergence": [float(f"{first:.6g}"), float(f"{least:.6g}")]}
    job.commit(job.finished, tensors, {"stage": WHOLE, "linears": entry, **found}, None)


class _Model:
    """The original and the quantized model, with walks of all planned linears. Pieces of a batch run side by side and are added
    up in order: what is learned does not depend on the number of workers."""

    def __init__(self, plan: Plan, structure: ModelStructure, job: Job, pool: Workers) -> None:
        self.pool, self.local = pool, threading.local()
        dtype = getattr(torch, plan.run_dtype)
        source = original_model(plan, structure, job)
        self.states, self.paths, self.hooks = list[LearningState](), list[str](), list[tuple[str, Any]]()
        for place, block in enumerate(parts(plan, structure)):
            for linear in (x for x in block.linears if x.name in plan.linears):
                p = plan.linears[linear.name]
                q, static = job.quantized(place, p.name, p.weights)
                inputs = job.inputs(place, p.name, p.shape[1], p.rotation)
                weight = inputs.weight(linear.view(source.get_submodule(block.path)).float())
                self.states.append(LearningState(LearnedWeight.of(linear, weight, q, inputs).cloned(), dtype))
                self.paths.append(f"{block.path}.{linear.param}")
                if p.activations is not None:
                    self.hooks.append(
                        (self.paths[-1].removesuffix(".weight"), quantizing(p.activations, static, inputs))
                    )
        self.original = source.to(dtype)

    def divergence(self, weights: Sequence[Tensor], tokens: Tensor) -> float:
        """KL divergence from the original, in nats, the mean over ``tokens``."""

        def one(piece: Tensor) -> float:
            with torch.inference_mode(False), torch.no_grad(), ByProducts():
                return float(self._lost(weights, piece))

        return sum(self.pool.map(one, _pieces(tokens))) / tokens.numel()

    def gradients(self, weights: Sequence[Tensor], tokens: Tensor) -> list[tuple[Tensor, ...]]:
        """Of its sum, by weight, of every piece."""

        def one(piece: Tensor) -> tuple[Tensor, ...]:
            with torch.inference_mode(False), torch.enable_grad(), ByProducts():
                leaves = [w.detach().requires_grad_() for w in weights]
                return torch.autograd.grad(self._lost(leaves, piece), leaves)

        return list(zip(*self.pool.map(one, _pieces(tokens)), strict=True))

    def _lost(self, weights: Sequence[Tensor], tokens: Tensor) -> Tensor:
        with torch.no_grad():
            wanted = self._logits(self.original, {}, tokens)
        found = self._logits(self._own(), dict(zip(self.paths, weights, strict=True)), tokens)
        return nn.functional.kl_div(found, wanted, reduction="sum", log_target=True)

    def _logits(self, model: nn.Module, weights: Mapping[str, Tensor], tokens: Tensor) -> Tensor:
        """float32 log probabilities [rows, length, vocabulary]."""
        given = {"input_ids": tokens, "use_cache": False}
        logits = torch.func.functional_call(model, dict(weights), (), given).logits
        found: Tensor = logits.float().log_softmax(-1)
        return found

    def _own(self) -> nn.Module:
        """The worker's own copy, which weights can be put into, with inputs quantized where they are to be; its other tensors
        are those of the original."""
        if not hasattr(self.local, "model"):
            shared = {id(t): t for t in (*self.original.parameters(), *self.original.buffers())}
            self.local.model = copy.deepcopy(self.original, shared)
            for path, hook in self.hooks:
                self.local.model.get_submodule(path).register_forward_pre_hook(hook)
        model: nn.Module = self.local.model
        return model


def _rows_at_a_time(length: int) -> int:
    """That one worker runs through the model."""
    return max(1, PIECE_TOKENS // length)


def _pieces(tokens: Tensor) -> Sequence[Tensor]:
    pieces: Sequence[Tensor] = tokens.split(_rows_at_a_time(tokens.shape[1]))
    return pieces


def whole_memory(plan: Plan, structure: ModelStructure, workers: int) -> int:
    """Bytes at the worst moment: the model in float32, then in what it runs in; of every weight, in float32, the original, the
    offset, its first and its best value, and codes; weights that are made of them, and gradients of every piece; per worker
    what a piece leaves for the way back, and its logits."""
    assert plan.calibration is not None
    item, sizes = getattr(torch, plan.run_dtype).itemsize, [p.shape[0] * p.shape[1] for p in plan.linears.values()]
    batch = next(iter(plan.linears.values())).options["batch"]
    rows = _rows_at_a_time(plan.calibration.seqlen)
    pieces, tokens = -(-batch // rows), rows * plan.calibration.seqlen
    hidden, heads = (int(getattr(structure.text_config, n, None) or 0) for n in ("hidden_size", "num_attention_heads"))
    scores = 4 * heads * plan.calibration.seqlen if plan.calibration.seqlen <= LONGEST else 0
    widths = sum(p.shape[0] + p.shape[1] for p in plan.linears.values())
    kept = tokens * (widths + (8 * hidden + scores) * len(structure.blocks)) * item
    logits = tokens * structure.text_config.vocab_size * (4 * 4 + 2 * item)
    learned = sum(sizes) * (17 + (1 + pieces) * item) + 32 * max(sizes)
    return int(4 * structure.parameters + learned + min(workers, pieces) * (kept + logits))
