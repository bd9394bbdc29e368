"""A full-precision model in memory whose units can be replaced, for a while, by what a candidate makes of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qkit.activations import quantize_activations
from qkit.families.outline import Outline
from qkit.formats import Format
from qkit.parallel import Workers

CHUNK_TOKENS = 1024  # of a forward or backward pass of one worker


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
                block, linear = self.where[name]
                if r.activations is not None and linear.expert is None:
                    module = self.blocks[block].get_submodule(linear.param.removesuffix(".weight"))
                    handles.append(module.register_forward_pre_hook(_quantizing(r)))
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

    def log_probs(self, tokens: Tensor) -> list[Tensor]:
        """log p of every next token [rows, length - 1, vocabulary], chunk by chunk."""
        return self.pool.map(self._log_probs, self.chunks(tokens))

    def loss(self, tokens: Tensor) -> float:
        """Mean negative log likelihood of positions 2.., in nats."""
        nll = self.pool.map(lambda ids: _nll(self._log_probs(ids), ids), self.chunks(tokens))
        return float(torch.cat(nll).double().mean())

    def compare(self, tokens: Tensor, reference: list[Tensor]) -> tuple[float, float]:
        """(loss, mean KL divergence from ``reference``, which ``log_probs`` gave), in nats a token."""

        def one(item: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
            ids, p = item
            q = self._log_probs(ids)
            return _nll(q, ids), (p.exp() * (p - q)).sum(-1, dtype=torch.float64)

        found = self.pool.map(one, zip(self.chunks(tokens), reference, strict=True))
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

    def _log_probs(self, ids: Tensor) -> Tensor:
        logits: Tensor = self.model(input_ids=ids, use_cache=False).logits
        return torch.log_softmax(logits[:, :-1].float(), dim=-1)


def _nll(log_probs: Tensor, ids: Tensor) -> Tensor:
    return -log_probs.gather(-1, ids[:, 1:, None])[..., 0]


def _quantizing(r: Replacement) -> Any:
    fmt = r.activations
    assert fmt is not None

    def hook(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (quantize_activations(args[0], fmt, r.static), *args[1:])

    return hook
