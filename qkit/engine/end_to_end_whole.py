"""End-to-end learning of a model whose blocks cannot be run one after another: all of it is in memory.

Memory holds the model, the codes, the dequantized weights, and gradients of all linears.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from qkit.engine.chain import spans
from qkit.engine.entry import quantizing_hook
from qkit.engine.job import Job
from qkit.engine.original_model import original_model
from qkit.families.structure import ModelStructure
from qkit.nn.attention import LONGEST, PlainAttention
from qkit.planning.plan import Plan, parts
from qkit.rounding.learned_scale import LearnedScale
from qkit.system.parallel import Workers
from qkit.tensor.qtensor import QTensor

Tokens = tuple[
    Tensor, Tensor | None
]  # int64 [rows, length], and bool of the same shape: which of them count (None: all)


class WholeModel:
    """The original and the quantized model, with learned scales for every planned linear.

    Pieces of a batch run in parallel and are summed in order: the result does not depend on the number of workers.
    """

    def __init__(self, plan: Plan, structure: ModelStructure, job: Job, pool: Workers) -> None:
        assert plan.calibration is not None
        self.calibration, self.pool, self.local = plan.calibration, pool, threading.local()
        dtype = getattr(torch, plan.run_dtype)
        source = original_model(plan, structure, job)
        self.learned, self.paths, self.hooks = list[LearnedScale](), list[str](), list[tuple[str, Any]]()
        for index, block in enumerate(parts(plan, structure)):
            for linear in (x for x in block.linears if x.name in plan.linears):
                p = plan.linears[linear.name]
                q, static = job.quantized(index, p.name, p.weights)
                inputs = job.inputs(index, p.name, p.shape[1], p.rotation)
                self.learned.append(LearnedScale(linear, q, inputs))
                self.paths.append(f"{block.path}.{linear.param}")
                if p.activations is not None:
                    hook = quantizing_hook(p.activations, static, inputs)
                    self.hooks.append((self.paths[-1].removesuffix(".weight"), hook))
        self.original, self.dtype = source.to(dtype), dtype
        self.states = [x.begin() for x in self.learned]
        self.weights = self._dense()
        self.save_best()

    def save_best(self) -> None:
        """Keep the current scales as the best ones."""
        self.best = [x.result(state[0]) for x, state in zip(self.learned, self.states, strict=True)]

    def results(self) -> list[tuple[str, QTensor]]:
        """(linear, it with its best scales) of all planned linears."""
        return [(x.linear.name, q) for x, q in zip(self.learned, self.best, strict=True)]

    def divergence(self, rows: Sequence[int]) -> float:
        """Summed KL divergence from the original model over the tokens of the rows that count, in nats."""

        def one(piece: Tokens) -> float:
            with torch.inference_mode(False), torch.no_grad(), PlainAttention():
                return float(self._summed_divergence(self.weights, piece))

        return sum(self.pool.map(one, self._pieces(rows)))

    def step(self, rows: Sequence[int], number: int, rate: float) -> None:
        """Step ``number``, from 1, along the gradients of the summed KL divergence of the rows."""

        def one(piece: Tokens) -> tuple[Tensor, ...]:
            with torch.inference_mode(False), torch.enable_grad(), PlainAttention():
                leaves = [w.detach().requires_grad_() for w in self.weights]
                return torch.autograd.grad(
                    self._summed_divergence(leaves, piece), leaves, allow_unused=True, materialize_grads=True
                )

        gradients = zip(*self.pool.map(one, self._pieces(rows)), strict=True)
        triples = zip(self.learned, self.states, gradients, strict=True)
        self.states = self.pool.map(lambda triple: triple[0].step(*triple[1:], number, rate), triples)
        self.weights = self._dense()

    def _dense(self) -> list[Tensor]:
        """The weights as the model runs with them."""

        def one(pair: tuple[LearnedScale, Tensor]) -> Tensor:
            with torch.inference_mode(False):
                return pair[0].dense(pair[1][0]).to(self.dtype)

        return self.pool.map(one, zip(self.learned, self.states, strict=True))

    def _pieces(self, rows: Sequence[int]) -> list[Tokens]:
        tokens, mask = self.calibration.tokens, self.calibration.mask
        pieces = [list(rows[slice(*span)]) for span in spans(len(rows), tokens.shape[1])]
        return [(tokens[piece], None if mask is None else mask[piece]) for piece in pieces]

    def _summed_divergence(self, weights: Sequence[Tensor], piece: Tokens) -> Tensor:
        tokens, mask = (None if t is None else t.clone() for t in piece)
        with torch.no_grad():
            original = self._log_probs(self.original, {}, tokens)
        log_probs = self._log_probs(self._worker_model(), self._by_path(weights), tokens)
        if mask is not None:
            original, log_probs = original[mask], log_probs[mask]
        return nn.functional.kl_div(log_probs, original, reduction="sum", log_target=True)

    def _by_path(self, weights: Sequence[Tensor]) -> dict[str, Tensor]:
        linears = (x.linear for x in self.learned)
        return {p: x.as_stored(w) for p, x, w in zip(self.paths, linears, weights, strict=True)}

    def _log_probs(self, model: nn.Module, weights: Mapping[str, Tensor], tokens: Tensor | None) -> Tensor:
        """float32 [rows, length, vocabulary]"""
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


def whole_memory(plan: Plan, structure: ModelStructure, workers: int, batch: int) -> int:
    """Peak bytes.

    These are: the model in float32 and in the dtype that it runs in; for every weight its code, the dequantized weight, and
    its gradients for every piece; and for each worker the activations of a piece for the backward pass, and its logits.
    batch: rows of a step
    """
    assert plan.calibration is not None
    length = plan.calibration.seqlen
    item, sizes = getattr(torch, plan.run_dtype).itemsize, [p.shape[0] * p.shape[1] for p in plan.linears.values()]
    pieces = spans(batch, length)
    tokens = pieces[0][1] * length
    hidden, heads = (int(getattr(structure.text_config, n, None) or 0) for n in ("hidden_size", "num_attention_heads"))
    scores = 4 * heads * length if length <= LONGEST else 0
    widths = sum(p.shape[0] + p.shape[1] for p in plan.linears.values())
    activations = tokens * (widths + (8 * hidden + scores) * len(structure.blocks)) * item
    logits = tokens * structure.text_config.vocab_size * (4 * 4 + 2 * item)
    learned = sum(sizes) * (1 + (2 + len(pieces)) * item) + 32 * max(sizes)
    return int(4 * structure.parameters + learned + min(workers, len(pieces)) * (activations + logits))
