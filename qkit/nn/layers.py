"""Modules of a packed model: a linear, and routed experts made of such linears."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import register_parametrization

from qkit.families.blocks import FusedExperts
from qkit.nn import ops
from qkit.tensor import compressed_tensors as ct
from qkit.tensor import lowrank, sparse
from qkit.tensor.formats import Format
from qkit.tensor.input_transform import PLAIN
from qkit.tensor.qtensor import QTensor, dequantize


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

    def keep_inputs(self) -> None:
        """From here on inputs are not quantized, as in a kernel that takes them in 16 bits."""
        assert self.packed is not None, "tensors were never loaded"
        self.activations = None
        self.packed = ops.prepare(ops.unpacked(self.packed), None, self.dtype)

    @property
    def weight(self) -> Tensor:
        """The dequantized weight [out, in], for modules that look at the weight of a linear. It is computed at every access."""
        assert self.packed is not None, "tensors were never loaded"
        return self.inputs.weight_back(dequantize(ops.unpacked(self.packed))).to(self.dtype)

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


class QuantEmbedding(nn.Module):
    """Token embeddings whose table stays packed; a lookup dequantizes the rows of its tokens.

    head:   the packed output head, where it is the same matrix: its codes are used, so that they are in memory once
    factor: what the rows are multiplied by, and whether that is rounded to their dtype first (``families.ends.factor_of``)
    """

    def __init__(
        self,
        q: QTensor,
        dtype: torch.dtype,
        head: QuantLinear | None = None,
        factor: tuple[float, bool] | None = None,
        padding_idx: int | None = None,
    ) -> None:
        super().__init__()
        self.num_embeddings, self.embedding_dim = q.shape
        self.dtype, self.factor, self.padding_idx = dtype, factor, padding_idx
        self.format = q.format
        self._head = (head,)  # in a tuple: it is a module of the model in another place
        shared = head is not None and head.packed is not None and head.packed.on_cpu
        self.own = None if shared else ops.prepare_lookup(q, dtype)

    @property
    def packed(self) -> ops.PreparedWeight:
        """The table, packed."""
        if self.own is not None:
            return self.own
        assert self._head[0] is not None and self._head[0].packed is not None
        return self._head[0].packed

    @property
    def weight(self) -> Tensor:
        """The dequantized table, for modules that look at it or at its device. It is computed at every access."""
        return dequantize(ops.unpacked(self.packed)).to(self.dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantEmbedding:
        """Follow the module to another device, with codes of its own there: those of a head suit its product."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        device = fn(torch.empty(0)).device
        if device.type == "meta":
            return self
        if self.own is not None:
            self.own = ops.lookup_on(self.own, device)
        elif device.type != "cpu":
            self.own = ops.lookup_on(self.packed, device)
        return self

    @property
    def nbytes(self) -> int:
        """Bytes of the table in memory, beside those of the head."""
        return 0 if self.own is None else self.own.nbytes

    def forward(self, ids: Tensor) -> Tensor:
        """The rows of tokens, [..., width] for ids [...], in the model's dtype."""
        rows = ops.rows(self.packed, ids.reshape(-1)).to(self.dtype).view(*ids.shape, -1)
        if self.factor is None:
            return rows
        value, rounded = self.factor
        return rows * (torch.tensor(value, device=rows.device).to(self.dtype) if rounded else value)

    def extra_repr(self) -> str:
        shared = ", one matrix with the head" if self.own is None else ""
        return f"{self.num_embeddings} x {self.embedding_dim}, {self.format.name}{shared}"


class QuantExperts(nn.Module):
    """Routed experts as packed linears, in the place of transformers' fused experts module.

    linears: for each expert, the linears that read its input (a gate before what it gates, or one), and its last one
    fused:   the module that is replaced; its activation and gate stay in use. It is no part of this one, which has its biases
             and its norm, where every loader puts their values
    """

    def __init__(
        self, linears: list[tuple[list[nn.Module], nn.Module]], fused: nn.Module, layout: FusedExperts
    ) -> None:
        super().__init__()
        self.layout = layout
        for name in (layout.first, layout.down):
            setattr(fused, name, None)
        for name, p in list(fused.named_parameters(recurse=False)):
            self.register_parameter(name, p)
            setattr(fused, name, None)
        for name, child in fused.named_children():
            self.add_module(name, child)
        self._is_hf_initialized = True  # transformers would fill in the weights that it has no more
        self._fused = (fused,)
        self.experts = nn.ModuleList(
            nn.ModuleDict({"first": nn.ModuleList(first), "down": down}) for first, down in linears
        )

    def forward(self, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Weighted sum of expert outputs, [tokens, H]. hidden: [tokens, H]; top_k_index, top_k_weights: [tokens, k]."""
        result = torch.zeros_like(hidden)
        fused: Any = self._fused[0]
        for e, expert in enumerate(self.experts):
            token, slot = torch.where(top_k_index == e)
            if not len(token):
                continue
            parts: Any = expert
            x = hidden[token]
            inner = gated(fused, self.layout, e, torch.cat([linear(x) for linear in parts["first"]], -1), self)
            y = parts["down"](inner)
            if fused.has_bias:
                y = y + getattr(self, f"{self.layout.down}_bias")[e]
            if fused.has_post_expert_norm:
                y = fused.post_expert_norm(y)
            result.index_add_(0, token, (y * top_k_weights[token, slot, None]).to(result.dtype))
        return result


def gated(fused: Any, layout: FusedExperts, expert: int, first: Tensor, biases: nn.Module | None = None) -> Tensor:
    """What the last linear of an expert reads, [tokens, inner], from the product of its first weight, [tokens, out].

    fused: the experts module of transformers; biases: the module that has its biases, None: itself
    """
    if fused.has_bias:
        first = first + getattr(biases or fused, f"{layout.first}_bias")[expert]
    result: Tensor = fused._apply_gate(first) if fused.has_gate else fused.act_fn(first)
    return result


class _PackedStack(nn.Module):
    """Stacked matrices [count, out, in] that are computed from packed ones, as torch's parametrization of a parameter."""

    def __init__(self, matrices: list[list[nn.Module]], transposed: bool) -> None:
        super().__init__()
        self.matrices = nn.ModuleList(nn.ModuleList(rows) for rows in matrices)
        self.transposed = transposed

    def forward(self, _: Tensor) -> Tensor:
        whole = torch.stack([torch.cat([m.weight for m in rows]) for rows in self.matrices])  # type: ignore[attr-defined]
        return whole.transpose(1, 2) if self.transposed else whole


def place_stack(owner: nn.Module, leaf: str, matrices: list[list[nn.Module]], transposed: bool) -> None:
    """Make a parameter of a module a product of packed linears, at every access. matrices: for each index, its rows"""
    delattr(owner, leaf)
    owner.register_buffer(leaf, torch.empty(0), persistent=False)
    register_parametrization(owner, leaf, _PackedStack(matrices, transposed), unsafe=True)
    # What is computed has no value in a file, and loaders must not miss it there.
    owner.parametrizations[leaf]._non_persistent_buffers_set.add("original")  # type: ignore[index,union-attr]
