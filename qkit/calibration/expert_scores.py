"""What each routed expert contributes on calibration rows: REAP's score, router-weighted expert activation pruning (Lasby et
al., arXiv 2510.13999).

The score of an expert is the mean, over the tokens that are sent to it, of the router's weight times the norm of the expert's
output. An expert that no token reaches has a score of 0.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from qkit.calibration.block_calls import Call, OneByOne
from qkit.calibration.statistics import Rows
from qkit.families.blocks import FusedExperts
from qkit.nn.layers import gated


class ExpertScores:
    """Sums over the calls of one module of experts, while rows run through its block in pieces.

    The pieces run in threads, in any order; they are added in the order of the rows.
    """

    def __init__(self, fused: nn.Module, layout: FusedExperts, rows: Rows) -> None:
        self._fused, self._layout, self._rows = fused, layout, rows
        self._local = threading.local()
        self._pieces: dict[int, list[tuple[Tensor, Tensor]]] = {}

    def counting(self, call: Call | OneByOne) -> Callable[[nn.Module, Tensor, slice], Tensor]:
        """The call of the block; what the experts do during it is counted."""

        def counted(block: nn.Module, hidden: Tensor, rows: slice = slice(None)) -> Tensor:
            self._local.rows = rows
            self._pieces[rows.start] = []
            return call(block, hidden, rows)

        return counted

    def hook(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A forward pre-hook of the experts' module."""
        hidden, index, weights = routed(args, kwargs)
        rows: slice = self._local.rows
        valid = self._rows.valid(rows.start, rows.stop)
        if valid is not None and len(valid) == len(hidden):
            hidden, index, weights = hidden[valid], index[valid], weights[valid]
        self._pieces[rows.start].append(_sums(self._fused, self._layout, hidden, index, weights))

    def finish(self) -> tuple[Tensor, Tensor]:
        """(scores, float64 [experts], tokens, int64 [experts])."""
        sums = torch.zeros(self._layout.count, dtype=torch.float64)
        tokens = torch.zeros(self._layout.count, dtype=torch.int64)
        for start in sorted(self._pieces):
            for piece_sums, piece_tokens in self._pieces[start]:
                sums += piece_sums
                tokens += piece_tokens
        return sums / tokens.clamp(min=1), tokens


def routed(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    """(hidden [tokens, width], index of the experts [tokens, k], their weights [tokens, k]) of a call of routed experts."""
    hidden, index, weights = (*args, *kwargs.values())[:3]
    hidden, index = hidden.reshape(-1, hidden.shape[-1]), index.reshape(-1, index.shape[-1])
    weights = weights.reshape(-1, weights.shape[-1])
    return hidden, index, weights if weights.shape == index.shape else weights.gather(1, index)


def _sums(fused: Any, layout: FusedExperts, hidden: Tensor, index: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """For each expert the sum of weight times norm of its output, and its tokens."""
    sums = torch.zeros(layout.count, dtype=torch.float64)
    tokens = torch.zeros(layout.count, dtype=torch.int64)
    for e in range(layout.count):
        token, slot = torch.where(index == e)
        if len(token):
            norms = _output(fused, layout, e, hidden[token]).double().norm(dim=-1)
            sums[e] = (weights[token, slot].double().abs() * norms).sum()
            tokens[e] = len(token)
    return sums, tokens


def _output(fused: Any, layout: FusedExperts, expert: int, x: Tensor) -> Tensor:
    """The output of one expert, [tokens, width]."""

    def times(name: str, values: Tensor) -> Tensor:
        weight: Tensor = getattr(fused, name)[expert]
        return values @ weight if layout.transposed else values @ weight.T

    y = times(layout.down, gated(fused, layout, expert, times(layout.first, x)))
    if fused.has_bias:
        y = y + getattr(fused, f"{layout.down}_bias")[expert]
    normed: Tensor = fused.post_expert_norm(y) if fused.has_post_expert_norm else y
    return normed


def chosen(scores: Tensor, left: int) -> tuple[int, ...]:
    """The experts with the highest scores, in their order; of equal ones the first. scores: [experts]"""
    return tuple(sorted(scores.sort(descending=True, stable=True).indices[:left].tolist()))
