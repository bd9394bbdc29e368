"""Caches quantized inputs of attention instead of keys and values, and computes the projections again (XQuant,
arXiv 2508.10395).

Where an input has no more numbers than its keys (multi-head attention), the input X itself is kept,
by token. Else (grouped queries) W_k = U_k S_k B_k^T and the like for W_v: X U_k is kept by channel, X U_v by token,
as many numbers as keys and values have, and S B^T is multiplied on reading; nothing is cut off. Keys are kept before
rotary embedding, which is done on reading for the positions that the tokens had.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qkit.errors import Unsupported, UsageError
from qkit.kvcache.layer import ROTATION_SEED, PackedLayer, Tensors
from qkit.kvcache.policy import CachePolicy
from qkit.kvcache.scales import attentions
from qkit.nn import ops
from qkit.tensor.qtensor import dequantize
from qkit.transforms.rotate import orthogonal


@dataclass(frozen=True)
class InputSource:
    """Computes a layer's keys and values from its inputs.

    attention: the module, with k_proj and v_proj; head_dim: of keys; latent: for keys and for values (U [in, r], S
    B^T [r, out]) or, shared, the halves of one basis (U [in, r], U^T [r, in]); None where inputs are kept as they are;
    rotary: (x, positions) -> cos, sin; None without rotary embedding
    """

    attention: Any
    head_dim: int
    latent: tuple[Tensors, Tensors] | None
    rotary: Callable[[Tensor, Tensor], Tensors] | None

    def __deepcopy__(self, memo: dict[int, Any]) -> InputSource:
        return self  # a copy of a cache belongs to the same model

    @staticmethod
    def of(model: Any, attention: Any, head_dim: int, shared: bool = False) -> InputSource:
        """The source for an attention module.

        shared: use one basis for keys and values, from which inputs can be reconstructed. Raises Unsupported for attention
        without separate projections of keys and values.
        """
        if not (hasattr(attention, "k_proj") and hasattr(attention, "v_proj")):
            raise Unsupported(
                f"an xquant cache for {type(attention).__name__}: it has no k_proj and v_proj of its own: use kivi or int8"
            )
        norm = getattr(getattr(attention, "k_norm", None), "weight", None)
        if getattr(attention, "use_rope", True) in (False, 0) or (norm is not None and len(norm) != head_dim):
            raise Unsupported(
                f"an xquant cache for {type(attention).__name__}: keys that are made in a way of their own: use kivi"
            )
        weights = [_dense(getattr(attention, n)) for n in ("k_proj", "v_proj")]
        latent = None
        if shared:
            stacked = torch.cat(weights)
            if stacked.shape[1] > stacked.shape[0]:
                basis = _factors(stacked)[0]
                latent = tuple((u, u.T) for u in (basis @ orthogonal(basis.shape[1], ROTATION_SEED)).chunk(2, dim=1))
        elif weights[0].shape[1] > weights[0].shape[0]:
            latent = tuple(_factors(w) for w in weights)
        rotary = getattr(model.get_decoder(), "rotary_emb", None)
        return InputSource(attention, head_dim, latent, rotary)  # type: ignore[arg-type]

    def kept(self, x: Tensor) -> Tensors:
        """The two tensors to store for x [batch, tokens, in], [batch, 1, tokens, ..] each."""
        if self.latent is None:
            first, second = x[:, None].chunk(2, dim=3)
            return first, second
        keys, values = ((x.to(u.dtype) @ u.to(x.device))[:, None].to(x.dtype) for u, _ in self.latent)
        return keys, values

    def keys_values(self, pair: Tensors, positions: Tensor) -> Tensors:
        """Keys after rotary embedding, and values, [batch, heads, tokens, head_dim], from the stored tensors."""
        if self.latent is None:
            return self.projected(torch.cat(pair, dim=3)[:, 0], positions)
        biases = (self.attention.k_proj.bias, self.attention.v_proj.bias)
        keys, values = (y if b is None else y + b for y, b in zip(self._multiplied(pair), biases, strict=True))
        return self._with_rotary(keys, values, positions)

    def inputs(self, pair: Tensors) -> Tensor:
        """Inputs [batch, tokens, in], up to parts that do not affect keys and values, from tensors in the shared basis."""
        if self.latent is None:
            return torch.cat(pair, dim=3)[:, 0]
        first, second = self._multiplied(pair)
        return first + second

    def projected(self, x: Tensor, positions: Tensor) -> Tensors:
        """Keys and values of inputs [batch, tokens, in], as ``keys_values`` gives them."""
        return self._with_rotary(self.attention.k_proj(x), self.attention.v_proj(x), positions)

    def _multiplied(self, pair: Tensors) -> Tensors:
        assert self.latent is not None
        first, second = (
            (t[:, 0].to(m.dtype) @ m.to(t.device)).to(t.dtype) for t, (_, m) in zip(pair, self.latent, strict=True)
        )
        return first, second

    def _with_rotary(self, keys: Tensor, values: Tensor, positions: Tensor) -> Tensors:
        a = self.attention
        keys, values = (t.unflatten(2, (-1, self.head_dim)) for t in (keys, values))
        keys, values = getattr(a, "k_norm", nn.Identity())(keys).transpose(1, 2), values.transpose(1, 2)
        if self.rotary is not None:
            turn = sys.modules[type(a).__module__].apply_rotary_pos_emb
            keys = turn(keys, keys, *self.rotary(keys, positions))[1]
        return keys, values


def _dense(linear: Any) -> Tensor:
    """The dense weight of a linear, float32 [out, in]."""
    packed = getattr(linear, "packed", None)
    weight: Tensor = linear.weight.detach() if packed is None else dequantize(ops.unpacked(packed))
    return weight.to(torch.float32)


def _factors(weight: Tensor) -> Tensors:
    """W^T = U (S B^T) for a weight [out, in]: ([in, r], [r, out])."""
    u, s, vh = torch.linalg.svd(weight.T.to(torch.float64), full_matrices=False)
    return u.to(torch.float32), (s[:, None] * vh).to(torch.float32)


class InputLayer(PackedLayer):
    """A cache layer that stores inputs of attention. ``capture`` passes them to it before attention runs."""

    def __init__(self, policy: CachePolicy, source: InputSource) -> None:
        super().__init__(policy)
        self.source = source
        self.by_token = source.latent is not None

    def reset(self) -> None:
        """Empty the layer."""
        super().reset()
        self.seen: tuple[Tensor, Tensor | None] | None = None
        self.shift: Tensor | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> Tensors:
        """Keys and values of all tokens. Stores inputs only, not the new keys and values."""
        if self.seen is None:
            raise UsageError("an xquant cache belongs to the model that it was made for: make one for this model")
        x, positions = self.seen
        self.seen = None
        if positions is not None:
            # Sequences that were padded on the left begin at position 0 later; all else counts up.
            self.shift = self.get_seq_length() + x.shape[1] - 1 - positions.expand(len(x), -1)[:, -1:]
        old = self.exchange(x)
        if old is None:
            return key_states, value_states
        return torch.cat([old[0], key_states], dim=2), torch.cat([old[1], value_states], dim=2)

    def exchange(self, x: Tensor) -> Tensors | None:
        """Keys and values of the past, before new inputs [batch, tokens, in] are stored."""
        old = self.read()
        self.append(*self.source.kept(x))
        return old

    def read(self) -> Tensors | None:
        """Keys and values of the past, computed from stored inputs; None where there is none."""
        pair = super().read()
        return None if pair is None else self.source.keys_values(pair, self.positions(pair[0].shape[2]))

    def positions(self, tokens: int) -> Tensor:
        """Positions of the first ``tokens`` tokens, int64 [batch or 1, tokens]."""
        counted = torch.arange(tokens, device=self.device)[None]
        return counted if self.shift is None else (counted - self.shift).clamp_min(0)

    def _map(self, change: Callable[[Tensor], Tensor]) -> None:
        super()._map(change)
        self.shift = None if self.shift is None else change(self.shift)


def capture(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
    """A forward pre-hook of attention modules that passes their inputs to the cache layer."""
    cache = kwargs.get("cache", kwargs.get("past_key_values"))
    layers = getattr(cache, "layers", ())
    layer = layers[module.layer_idx] if module.layer_idx < len(layers) else None
    if isinstance(layer, InputLayer):
        layer.seen = (kwargs["hidden_states"] if not args else args[0], kwargs.get("position_ids"))


def sources(model: Any, head_dim: int, shared: bool = False) -> list[InputSource]:
    """The sources of all layers, in order; attention then passes its inputs to the cache. Raises Unsupported."""
    modules = attentions(model)
    layer_sources = [InputSource.of(model, m, head_dim, shared) for m in modules.values()]
    for m in modules.values():
        if capture not in m._forward_pre_hooks.values():
            m.register_forward_pre_hook(capture, with_kwargs=True)
    return layer_sources
