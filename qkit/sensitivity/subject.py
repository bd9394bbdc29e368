"""A full-precision model in memory whose units can be replaced, for a while, by what a candidate makes of them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from qkit.activations import quantize_activations
from qkit.families.outline import Outline
from qkit.formats import Format
from qkit.parallel import Workers
from qkit.sensitivity.spill import Chunks, Spilled

R = TypeVar("R")
CHUNK_TOKENS = 1024  # of a forward or backward pass of one worker
SPILL_BYTES = 1 << 30  # log probabilities that are kept in memory; our choice


@dataclass(frozen=True)
class Replacement:
    """weight: float32 [out, in]; activations: the format of the linear's input and its static scale, or None."""

    weight: Tensor
    activations: Format | None = None
    static: Tensor | None = None


class Subject:
    """model: in float32, eval mode. Every linear is found by its checkpoint name."""

    def __init__(self, model: Any, outline: Outline, pool: Workers) -> None:
        self.model, self.outline, self.pool = model, outline, pool
        for p in model.parameters():
            if p.is_inference():  # read as it is, from a float32 checkpoint: autograd refuses it
                p.data = p.data.clone()
        self.blocks = {b.index: model.get_submodule(b.path) for b in outline.blocks}
        self.where = {x.name: (b.index, x) for b in outline.blocks for x in b.linears}

    def weight(self, name: str) -> Tensor:
        """The weight in place now, [out, in]; a view."""
        block, linear = self.where[name]
        return linear.view(self.blocks[block])

    @contextmanager
    def replaced(self, replacements: Mapping[str, Replacement]) -> Iterator[None]:
        """With these linears (by name) replaced; the originals are put back."""
        originals = {name: self.weight(name).clone() for name in replacements}
        handles = []
        try:
            for name, r in replacements.items():
                self.weight(name).copy_(r.weight)
                if r.activations is not None and self.where[name][1].expert is None:
                    handles.append(self._module(name).register_forward_pre_hook(_quantizing(r)))
            yield
        finally:
            for handle in handles:
                handle.remove()
            for name, weight in originals.items():
                self.weight(name).copy_(weight)

    # ---- passes ----------------------------------------------------------------------------------------------

    def chunks(self, tokens: Tensor) -> tuple[Tensor, ...]:
        """tokens [rows, length] in pieces that one worker takes at a time; they do not depend on the workers."""
        pieces: tuple[Tensor, ...] = tokens.split(max(1, CHUNK_TOKENS // tokens.shape[1]))
        return pieces

    def log_probs(self, tokens: Tensor, spill: Path | None = None) -> Chunks:
        """log p of every next token, float32 [rows, length - 1, vocabulary], chunk by chunk.

        spill: where more than SPILL_BYTES of them go, into a file that goes with the result; None: they stay in memory.
        """
        if spill is None or log_prob_bytes(tokens.shape, self.model.config.vocab_size) <= SPILL_BYTES:
            return self.pool.map(self._log_probs, self.chunks(tokens))
        spilled = Spilled(spill)
        for piece in self.pool.stream(self._log_probs, self.chunks(tokens)):
            spilled.append(piece)
        return spilled

    def loss(self, tokens: Tensor) -> float:
        """Mean negative log likelihood of positions 2.., in nats."""
        nll = self.pool.map(lambda ids: _nll(self._log_probs(ids), ids), self.chunks(tokens))
        return float(torch.cat(nll).double().mean())

    def compare(self, tokens: Tensor, reference: Chunks) -> tuple[float, float]:
        """(loss, mean KL divergence from ``reference``, which ``log_probs`` gave), in nats a token."""
        pieces = self.chunks(tokens)
        assert len(pieces) == len(reference)

        def one(item: tuple[int, Tensor]) -> tuple[Tensor, Tensor]:
            index, ids = item
            q = self._log_probs(ids)
            p = reference[index]  # read here: a map takes all its items at once
            return _nll(q, ids), (p.exp() * (p - q)).sum(-1, dtype=torch.float64)

        found = self.pool.map(one, enumerate(pieces))
        nll, kl = (torch.cat([t[i].flatten() for t in found]).double() for i in (0, 1))
        return float(nll.mean()), float(kl.mean())

    def gradients(self, tokens: Tensor, names: list[str], squares: bool = False) -> tuple[float, dict[str, Tensor]]:
        """(loss, {linear: gradient of the mean loss [out, in]}) over all rows.

        squares: instead of the gradient the mean over rows of the squared gradient of a row's mean loss (the diagonal of
        the empirical Fisher matrix).
        """
        params = {(self.where[n][0], self.where[n][1].param) for n in names}
        leaves = {key: self.blocks[key[0]].get_parameter(key[1]) for key in sorted(params)}
        pieces = tokens.split(1) if squares else self.chunks(tokens)
        total = {key: torch.zeros_like(leaf) for key, leaf in leaves.items()}
        losses: list[tuple[float, int]] = []

        def one(ids: Tensor) -> tuple[float, int, tuple[Tensor, ...]]:
            with torch.inference_mode(False), torch.enable_grad():
                nll = _nll(self._log_probs(ids.clone()), ids)
                return float(nll.detach().mean()), len(ids), torch.autograd.grad(nll.mean(), list(leaves.values()))

        for leaf in leaves.values():
            leaf.requires_grad_(True)
        try:
            for loss, rows, grads in self.pool.stream(one, pieces):
                losses.append((loss, rows))
                for sum_, grad in zip(total.values(), grads, strict=True):
                    sum_.add_(grad.square() if squares else grad, alpha=rows / len(tokens))
        finally:
            for leaf in leaves.values():
                leaf.requires_grad_(False)
        mean = sum(loss * rows for loss, rows in losses) / len(tokens)
        return mean, {n: self.where[n][1].part(total[self.where[n][0], self.where[n][1].param]) for n in names}

    def with_inputs(
        self, tokens: Tensor, names: Sequence[str], use: Callable[[dict[str, tuple[Tensor, Tensor]]], R]
    ) -> Iterator[R]:
        """What ``use`` makes of {linear: (x, g)}, chunk by chunk, in the order of the rows; nothing else of a chunk is kept.

        names: linears that are modules (not those of fused experts)
        x: float32 [rows, length, in] of the chunk, what the linear reads
        g: the same shape, the gradient of the mean loss over all of ``tokens`` at x, in nats, as far as x works through this
           linear: W^T of the gradient at its output. Summed over all linears that read x it is what these linears add
           to the gradient at x.
        """
        local = threading.local()  # chunks run through the same modules at the same time
        scored = len(tokens) * (tokens.shape[1] - 1)

        def noting(name: str) -> Any:
            def hook(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
                x = args[0]
                branch = x.view_as(x) if x.requires_grad else x.detach().requires_grad_(True)
                local.seen[name] = branch
                return (branch, *args[1:])

            return hook

        def one(ids: Tensor) -> R:
            local.seen = {}
            try:
                with torch.inference_mode(False), torch.enable_grad():
                    loss = _nll(self._log_probs(ids.clone()), ids).sum() / scored
                    gradients = torch.autograd.grad(loss, list(local.seen.values()))
                return use({n: (x.detach(), g) for (n, x), g in zip(local.seen.items(), gradients, strict=True)})
            finally:
                local.seen = {}

        handles = [self._module(n).register_forward_pre_hook(noting(n)) for n in names]
        try:
            yield from self.pool.stream(one, self.chunks(tokens))
        finally:
            for handle in handles:
                handle.remove()

    def sample_inputs(self, tokens: Tensor, modules: Sequence[str], count: int) -> dict[str, Tensor]:
        """What these modules (by their path in the model) read: {path: float32 [n, width]}.

        Of n tokens that are spread evenly over all rows, n the smaller of ``count`` and the number of tokens; the same tokens
        for every module, in the order of the rows.
        """
        total = tokens.numel()
        n = min(count, total)
        places = torch.arange(n) * total // n
        pieces = self.chunks(tokens)
        starts = [0]
        for piece in pieces:
            starts.append(starts[-1] + piece.numel())
        local = threading.local()

        def noting(path: str) -> Any:
            def hook(_: nn.Module, args: tuple[Any, ...]) -> None:
                local.seen[path] = args[0].flatten(0, -2)[local.places].float()

            return hook

        def one(item: tuple[Tensor, int]) -> dict[str, Tensor]:
            ids, start = item
            inside = (places >= start) & (places < start + ids.numel())
            local.seen, local.places = {}, places[inside] - start
            self.model.base_model(input_ids=ids, use_cache=False)
            found: dict[str, Tensor] = local.seen
            return found

        handles = [self.model.get_submodule(p).register_forward_pre_hook(noting(p)) for p in modules]
        try:
            found = self.pool.map(one, list(zip(pieces, starts, strict=False)))
        finally:
            for handle in handles:
                handle.remove()
        return {path: torch.cat([seen[path] for seen in found]) for path in modules}

    def path(self, name: str) -> str:
        """The path in the model of the module of a linear that is one (not a fused expert's)."""
        block, linear = self.where[name]
        assert linear.expert is None
        return f"{self.outline.blocks[block].path}.{linear.param.removesuffix('.weight')}"

    def _module(self, name: str) -> nn.Module:
        module: nn.Module = self.model.get_submodule(self.path(name))
        return module

    def _log_probs(self, ids: Tensor) -> Tensor:
        logits: Tensor = self.model(input_ids=ids, use_cache=False).logits
        return torch.log_softmax(logits[:, :-1].float(), dim=-1)


def log_prob_bytes(shape: Sequence[int], vocabulary: int) -> int:
    """Bytes of what ``log_probs`` gives for tokens of that shape [rows, length]."""
    rows, length = shape
    return rows * (length - 1) * vocabulary * 4


def _nll(log_probs: Tensor, ids: Tensor) -> Tensor:
    return -log_probs.gather(-1, ids[:, 1:, None])[..., 0]


def _quantizing(r: Replacement) -> Any:
    fmt = r.activations
    assert fmt is not None

    def hook(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (quantize_activations(args[0], fmt, r.static), *args[1:])

    return hook
