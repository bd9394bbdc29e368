"""Modules of a packed model: a linear, and routed experts made of such linears."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from qkit.nn import ops
from qkit.tensor import compressed_tensors as ct
from qkit.tensor import lowrank, sparse
from qkit.tensor.formats import Format
from qkit.tensor.input_transform import PLAIN


class QuantLinear(nn.Module):
    """A linear layer whose weight stays packed.

    ``take`` loads tensors by their names on disk; ``prepare`` then arranges them for the operator that runs
    them.
    """

    def __init__(self, weights: Format, activations: Format | None, shape: tuple[int, int], dtype: torch.dtype) -> None:
        super().__init__()
        self.weights, self.activations = weights, activations
        self.out_features, self.in_features = shape
        self.dtype = dtype
        self.bias: Tensor | None
        self.register_buffer("bias", None)
        # Not buffers: loaders that fill in or convert buffers must not touch packed weights. ``_apply`` moves them.
        self.static: Tensor | None = None
        # In a diffusion transformer: gives the format of inputs at every call, in place of ``activations``.
        self.chooser: Callable[[Tensor], Format | None] | None = None
        self.inputs = PLAIN  # transform of inputs before they are quantized
        self.packed: ops.PreparedWeight | None = None

    def take(self, tensors: dict[str, Tensor]) -> None:
        """Load the weight. tensors: {suffix: stored tensor}, with 'bias' where there is one."""
        shape = (self.out_features, self.in_features)
        bias = tensors.get("bias")
        self.bias = None if bias is None else bias.to(self.dtype)
        static = tensors.get("input_global_scale", tensors.get("input_scale"))
        self.static = None if static is None else static.to(torch.float32)
        q = replace(
            ct.read(tensors, self.weights, shape), sparse=sparse.read(tensors), low_rank=lowrank.read(tensors, shape)
        )
        self.packed = ops.prepare(q, self.activations, self.dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantLinear:
        """Follow the module to another device; conversions of dtype leave packed weights as they are."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        device = fn(torch.empty(0)).device
        if device.type != "meta":
            self.static = None if self.static is None else self.static.to(device)
            self.inputs = self.inputs.to(device)
            self.packed = None if self.packed is None else self.packed.to(device)
        return self

    @property
    def nbytes(self) -> int:
        """Bytes of the packed weight in memory."""
        return 0 if self.packed is None else self.packed.nbytes

    def forward(self, input: Tensor) -> Tensor:
        """The layer's output [..., out] for input [..., in], in its dtype."""
        return self.product(input, self.activations if self.chooser is None else self.chooser(input))

    def product(self, x: Tensor, activations: Format | None) -> Tensor:
        """x [..., in] times the weight, plus bias, [..., out], with x quantized in a format (None: not quantized)."""
        assert self.packed is not None, "tensors were never loaded"
        return ops.linear(self.inputs(x), self.packed, self.bias, activations, self.static, self.inputs.residual)

    def extra_repr(self) -> str:
        op = "empty" if self.packed is None else self.packed.op
        acts = "" if self.activations is None else f", activations={self.activations.name}"
        acts = acts if self.chooser is None else ", activations by step"
        return f"{self.in_features} -> {self.out_features}, {self.weights.name}{acts}, {op}"


class QuantExperts(nn.Module):
    """Routed experts as packed linears, in the place of transformers' fused experts module.

    linears: {(expert, 'gate' | 'up' | 'down'): module}
    """

    def __init__(self, linears: dict[tuple[int, str], nn.Module], act: nn.Module, count: int) -> None:
        super().__init__()
        self.count = count
        self.act_fn = act
        self.experts = nn.ModuleList(
            nn.ModuleDict({part: linears[e, part] for part in ("gate", "up", "down")}) for e in range(count)
        )

    def forward(self, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Weighted sum of expert outputs, [tokens, H]. hidden: [tokens, H]; top_k_index, top_k_weights: [tokens, k]."""
        result = torch.zeros_like(hidden)
        for e, expert in enumerate(self.experts):
            token, slot = torch.where(top_k_index == e)
            if not len(token):
                continue
            parts: Any = expert
            x = hidden[token]
            y = parts["down"](self.act_fn(parts["gate"](x)) * parts["up"](x))
            result.index_add_(0, token, (y * top_k_weights[token, slot, None]).to(result.dtype))
        return result
