"""Caches differences between inputs of attention of neighbouring layers (XQuant-CL, arXiv 2508.10395).

A_l = A_(l-1) + D_l with D_l = Q(X_l - A_(l-1)): differences are relative to the reconstructed inputs of the layer below, not to
the original ones, so errors do not add up. The first ANCHORS layers have at least ANCHOR_BITS bits.

What the paper leaves open is our choice; all of it was tried on a Llama of 8 layers (24 rows of 1,024 tokens, every
token at 2 bits; change of perplexity, with twice its standard error):

- X is what the projections read, after the norm: +0.69 +- 0.17 %. Differences of the residual stream, with the norm
  done on reading, were no different (-0.15 +- 0.21 to that) and cannot be had without all numbers of an input.
- Differences begin with the second layer: anchors that keep X themselves +0.85 %. Differences to what went in +2.03 %;
  no differences at all, the same anchors, +3.44 %.
- Scales are of a token. Scales along tokens were no different (-0.04 +- 0.24 to that).
- Where an input has more numbers than keys and values together (grouped queries), X U is differenced, with [W_k | W_v]
  = U S B^T: A_l = A_(l-1) + Q((X_l - A_(l-1)) U) U^T, as good in the space that keys and values depend on. A Hadamard
  matrix turns U within that space: with U itself directions of large S get the largest errors, +1.64 % against +0.58 %.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from qkit.kvcache.layer import KeyValueSegments, PackedLayer, Tensors
from qkit.kvcache.policy import CachePolicy
from qkit.kvcache.store import Plain
from qkit.kvcache.xquant import InputLayer, InputSource


@dataclass
class LayerBelow:
    """Reconstructed inputs that a layer passes to the next one within a pass.

    inputs: of the tokens in the body, float32 [batch, tokens, in]; None between passes
    """

    inputs: Tensor | None = None


class CrossLayer(InputLayer):
    """A cache layer that stores differences; the newest tokens are stored as they are, in the layer's own basis.

    All layers of a cache have the same tokens in the body. Every token has scales of its own, so a body can be cut anywhere
    without the layers below.
    """

    def __init__(self, policy: CachePolicy, source: InputSource, below: LayerBelow, first: bool, last: bool) -> None:
        super().__init__(policy, source)
        self.by_token = False
        self.below, self.first, self.last = below, first, last

    def exchange(self, x: Tensor) -> Tensors | None:
        """Keys and values of the past, for new inputs. Tokens that now move to the body still count with their old values."""
        tokens, recent = (0 if self.body is None else self.body[0].tokens), self.recent
        if self.first:
            self.below.inputs = None
        self.append(*self.source.kept(x))
        body_inputs = self._body_inputs()
        self.below.inputs = None if self.last else body_inputs
        past_parts = [] if body_inputs is None or not tokens else [body_inputs[:, :tokens].to(self.dtype)]
        if recent is not None:
            past_parts.append(self.source.inputs(_dequantized(recent, self.dtype)))
        if not past_parts:
            return None
        past = torch.cat(past_parts, dim=1)
        return self.source.projected(past, self.positions(past.shape[1]))

    def _body_inputs(self) -> Tensor | None:
        """Reconstructed inputs A_l of the body, float32 [batch, tokens, in]; None without a body."""
        if self.body is None:
            return None
        differences = self.source.inputs(_dequantized(self.body, torch.float32))
        return differences if self.below.inputs is None else differences.add_(self.below.inputs.to(differences.device))

    def _packed(self, pair: KeyValueSegments) -> KeyValueSegments:
        if self.below.inputs is None:
            return super()._packed(pair)
        start = 0 if self.body is None else self.body[0].tokens
        below = self.source.kept(self.below.inputs[:, start : start + pair[0].tokens].to(self.device))
        keys, values = (Plain(s - b) for s, b in zip(_dequantized(pair, torch.float32), below, strict=True))
        return super()._packed((keys, values))


def _dequantized(pair: KeyValueSegments, dtype: torch.dtype) -> Tensors:
    return pair[0].dequantize(dtype), pair[1].dequantize(dtype)


def cross_layers(policy: CachePolicy, layer_sources: Sequence[InputSource]) -> list[PackedLayer]:
    """The empty layers of a cache, in order."""
    below, last_layer = LayerBelow(), len(layer_sources) - 1
    widths = policy.widths_of(len(layer_sources))
    return [
        CrossLayer(replace(policy, widths=(w,)), s, below, i == 0, i == last_layer)
        for i, (s, w) in enumerate(zip(layer_sources, widths, strict=True))
    ]
