"""The loss increase of a narrower KV cache in each layer: PM-KVQ's first-order measure, and its integral.

PM-KVQ (arXiv 2505.18610, section on block-wise allocation): s[l, b] = mean |G_K (K - Q_b(K))| + mean |G_V (V -
Q_b(V))|, with G the gradient of the next-token loss at the keys after rotary embedding and at the values of layer l,
and means over samples and elements. Q_b rounds to 16 bits and halves from there, as the cache will.

``points`` > 0 takes instead the midpoint rule along the way from K to K + (Q_b(K) - K), all layers going together,
without absolute values: the parts of the loss change that each layer brings (PQI, arXiv 2503.01901, carried over from
weights; our choice). The errors are those of the undisturbed keys and values and stay what they are along the way:
codes that jump as their inputs move have no derivative to integrate. Rows are read at stretched positions 0, stretch,
2 stretch, ..: short rows then have keys rotated as at long positions (positional interpolation). Rows with images have the
model's own positions, and the loss counts their answers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import DynamicCache

from qkit.calibration.batches import Batch, InputRows, single_rows
from qkit.kvcache.argument import with_cache
from qkit.kvcache.grouping import channel_group
from qkit.kvcache.store import narrowed, quantize

KeyValueTensors = tuple[Tensor, Tensor]


class PassThroughCache(DynamicCache):  # type: ignore[misc]
    """A cache that returns only new keys and values; ``seen`` has those of every layer."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[KeyValueTensors] = []

    def update(self, keys: Tensor, values: Tensor, layer: int, *args: Any, **kwargs: Any) -> KeyValueTensors:
        self.seen.append((keys, values))
        return keys, values


class _GradientCache(PassThroughCache):
    """A cache that adds a share of errors to keys and values, and keeps these with their gradients.

    errors: of keys and values of each layer; None: nothing is added.
    """

    def __init__(self, errors: Sequence[KeyValueTensors] | None = None, share: float = 0.0) -> None:
        super().__init__()
        self.errors, self.part = errors, share
        self.loss = 0.0

    def update(self, keys: Tensor, values: Tensor, layer: int, *args: Any, **kwargs: Any) -> KeyValueTensors:
        if self.errors is not None:
            keys, values = keys + self.part * self.errors[layer][0], values + self.part * self.errors[layer][1]
        for x in (keys, values):
            if x.requires_grad:
                x.retain_grad()
            else:
                x.requires_grad_()
        return super().update(keys, values, layer)


def rounded(x: Tensor, bits: int, group_limit: int) -> Tensor:
    """x [batch, heads, tokens, head_dim] rounded as in a cache with ``bits`` bits, in x's dtype."""
    group = channel_group(x.shape[3], group_limit)
    packed = quantize(x, bits, group) if bits == 3 else narrowed(quantize(x, 16, group), bits)
    return packed.dequantize(x.dtype)


class _RoundedLayerCache(PassThroughCache):
    """A cache that rounds keys and values of one layer and returns those of others unchanged."""

    def __init__(self, layer: int, bits: int, group: int) -> None:
        super().__init__()
        self.layer, self.bits, self.group = layer, bits, group

    def update(self, keys: Tensor, values: Tensor, layer: int, *args: Any, **kwargs: Any) -> KeyValueTensors:
        if layer != self.layer:
            return keys, values
        return rounded(keys, self.bits, self.group), rounded(values, self.bits, self.group)


def divergences(
    model: Any, rows: InputRows, widths: Sequence[int], group: int = 128, stretch: int = 1,
    progress: Callable[[], None] | None = None,
) -> Tensor:  # fmt: skip
    """KL divergence of next-token probabilities caused by each layer's cache at each width, float64 [layers, widths], in nats.

    It is a mean over all tokens of rows of a text, and over answer tokens of rows with images.
    """
    layers = model.config.get_text_config(decoder=True).num_hidden_layers
    divergence = torch.zeros(layers, len(widths), dtype=torch.float64)
    with torch.inference_mode():
        row_batches = single_rows(rows)
        for batch in row_batches:
            reference = _compared(model, batch, stretch, PassThroughCache())
            for layer in range(layers):
                for i, bits in enumerate(widths):
                    log_probs = _compared(model, batch, stretch, _RoundedLayerCache(layer, bits, group))
                    kl = functional.kl_div(log_probs, reference, reduction="none", log_target=True).sum(-1)
                    divergence[layer, i] += kl.double().mean().cpu()
            if progress is not None:
                progress()
    return divergence / len(row_batches)


def forward(model: Any, batch: Batch, stretch: int, cache: PassThroughCache, **options: Any) -> Any:
    """Output of a model (or its part without the head) for one row; rows of a text have positions 0, stretch, 2 stretch, .."""
    inputs = batch.to(model.device).inputs
    if batch.at is None:
        inputs["position_ids"] = torch.arange(batch.ids.shape[1], device=model.device)[None] * stretch
    return model(**inputs, **options, **with_cache(model, cache), use_cache=True)


def _compared(model: Any, batch: Batch, stretch: int, cache: PassThroughCache) -> Tensor:
    """Log probabilities where they are compared: everywhere in a text, or where tokens count."""
    logits = _logits(model, batch, stretch, cache)
    return (logits if batch.mask is None else batch.scored(logits)).log_softmax(-1, dtype=torch.float32)


def _logits(model: Any, batch: Batch, stretch: int, cache: PassThroughCache) -> Tensor:
    """Logits [1, n, vocabulary] at all positions of a text, or at those before the answer tokens of a row with images."""
    logits: Tensor = forward(model, batch, stretch, cache, **batch.to(model.device).options).logits
    return logits


def sensitivities(
    model: Any, rows: InputRows, widths: Sequence[int], group: int = 128, stretch: int = 1, points: int = 0,
    progress: Callable[[], None] | None = None,
) -> Tensor:  # fmt: skip
    """Cost of each width of each layer's cache, float64 [layers, widths], in nats per token, by the measure above.

    points: 0 for the first-order measure. Freezes the model's parameters.
    """
    for p in model.parameters():
        p.requires_grad_(False)
    total = torch.zeros(0)
    row_batches = single_rows(rows)
    for batch in row_batches:
        start = with_gradients(model, batch, stretch)
        costs = [
            _integral(model, batch, stretch, start, b, group, points) if points else _first(start, b, group)
            for b in widths
        ]
        row_costs = torch.stack(costs, dim=1)
        total = row_costs if not len(total) else total + row_costs
        if progress is not None:
            progress()
    return (total / len(row_batches)).cpu()


def with_gradients(
    model: Any, batch: Batch, stretch: int = 1, errors: Sequence[KeyValueTensors] | None = None, share: float = 1.0
) -> _GradientCache:
    """A cache with keys, values and their gradients after a forward and a backward pass of one row.

    errors: of keys and values of each layer, of which ``share`` is added. The cache's ``loss`` is in nats per token.
    """
    cache = _GradientCache(errors, share)
    logits = batch.scored(_logits(model, batch, stretch, cache))
    loss = functional.cross_entropy(logits[0].to(torch.float32), batch.targets[0].to(logits.device))
    loss.backward()
    cache.loss = float(loss.detach())
    return cache


def errors_of(seen: Sequence[KeyValueTensors], bits: int, group: int) -> list[KeyValueTensors]:
    """Rounding errors of keys and values of each layer at ``bits`` bits."""
    errors = [[rounded(x.detach(), bits, group) - x.detach() for x in pair] for pair in seen]
    return [(keys, values) for keys, values in errors]


def _first(start: _GradientCache, bits: int, group: int) -> Tensor:
    errors = errors_of(start.seen, bits, group)
    return torch.stack(
        [_sum(p.abs().mean() for p in _products(*pair)) for pair in zip(start.seen, errors, strict=True)]
    )


def _integral(
    model: Any, batch: Batch, stretch: int, start: _GradientCache, bits: int, group: int, points: int
) -> Tensor:
    errors = errors_of(start.seen, bits, group)
    costs = []
    for i in range(points):
        seen = with_gradients(model, batch, stretch, errors, (i + 0.5) / points).seen
        costs.append(torch.stack([_sum(p.sum() for p in _products(*pair)) for pair in zip(seen, errors, strict=True)]))
    return torch.stack(costs).mean(0)


def _sum(terms: Iterable[Tensor]) -> Tensor:
    return torch.stack(list(terms)).sum()


def _products(seen: KeyValueTensors, errors: KeyValueTensors) -> list[Tensor]:
    """Gradient times error of keys and of values, float64."""
    return [x.grad.double() * e.double() for x, e in zip(seen, errors, strict=True) if x.grad is not None]
