"""Products with packed weights: connects qkit's QTensor with the operators of ``qkit_kernels``.

At load time, ``prepare`` brings a QTensor into the layout of the operator that suits its format, its shape and the activations;
``linear`` multiplies. Weights in memory are packed in every case.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from qkit_kernels import cpu, gpu
from qkit_kernels import weight as leaf
from torch import Tensor

from qkit.tensor import lowrank, sparse
from qkit.tensor.activations import quantize_activations, token_scale
from qkit.tensor.formats import Format
from qkit.tensor.qtensor import Params, QTensor, dequantize, round_to_grid


@dataclass(frozen=True)
class PreparedWeight:
    """A weight ready to multiply with.

    operator_weight: the codes in the layout of an operator
    q:           the parameters, format, sparse and low-rank part; no codes: they are in ``operator_weight``
    activations: their format, None if they are not quantized; dtype: of activations
    """

    operator_weight: cpu.CpuWeight | gpu.GpuWeight
    q: QTensor
    activations: Format | None
    dtype: torch.dtype

    @property
    def op(self) -> str:
        """Name of the chosen operator."""
        return self.operator_weight.op

    @property
    def on_cpu(self) -> bool:
        """Whether its codes have a layout of which ``rows`` reads single rows."""
        return isinstance(self.operator_weight, cpu.CpuWeight)

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        return self.operator_weight.shape

    def to(self, device: torch.device) -> PreparedWeight:
        """The same weight on another device, laid out anew for the operators there."""
        if device == self.q.params.scale.device:
            return self
        q = unpacked(self)
        params = Params(*(None if t is None else t.to(device) for t in _tensors(q.params)))  # type: ignore[arg-type]
        sparse_part = None if q.sparse is None else q.sparse.to(device)
        low_rank = None if q.low_rank is None else q.low_rank.to(device)
        return prepare(
            QTensor(q.codes.to(device), params, q.format, sparse_part, low_rank), self.activations, self.dtype
        )

    @property
    def nbytes(self) -> int:
        """Bytes held, scales included."""
        w, s, low_rank = self.operator_weight.weight, self.q.sparse, self.q.low_rank
        tensors = [*_tensors(self.q.params), w.scale, w.zero, w.global_scale]
        if isinstance(self.operator_weight, cpu.CpuWeight):
            tensors += [self.operator_weight.data, self.operator_weight.scales]
        else:
            kernel = self.operator_weight.kernel_weight
            tensors += [kernel.words, kernel.scale, kernel.zero, kernel.row]
        tensors += [] if s is None else [s.rows, s.columns, s.values]
        tensors += [] if low_rank is None else [low_rank.down, low_rank.up]
        storages = [t.untyped_storage() for t in tensors if t is not None]
        return sum({x.data_ptr(): x.nbytes() for x in storages}.values())


def _tensors(p: Params) -> tuple[Tensor, Tensor | None, Tensor | None]:
    return p.scale, p.zero, p.global_scale


def prepare(q: QTensor, activations: Format | None, dtype: torch.dtype) -> PreparedWeight:
    """The weight in the layout of the operator that suits activations of ``dtype``."""
    operator_weight = _lay_out(q, activations, dtype, q.codes.device.type)
    params = (
        q.params
        if operator_weight.weight.scale.shape != q.params.scale.shape
        else replace(q.params, scale=operator_weight.weight.scale)
    )
    return PreparedWeight(
        operator_weight, replace(q, codes=operator_weight.weight.codes, params=params), activations, dtype
    )


def _lay_out(q: QTensor, activations: Format | None, dtype: torch.dtype, device: str) -> cpu.CpuWeight | gpu.GpuWeight:
    weight = _weight(q)
    fmt, shape = weight.format, q.shape
    integers = activations is not None and activations.kind == "int" and activations.strategy == "token"
    int8_product = (
        integers and q.sparse is None and q.low_rank is None
    )  # else all parts see the same quantized activations
    if device == "cpu":
        return cpu.prepare(
            weight, torch.int8 if int8_product and cpu.supported("int_mm", fmt, shape, torch.int8) else dtype
        )
    if device == "cuda":
        for op in gpu.OPS if int8_product else ("product",):
            if gpu.supported(op, fmt, shape, dtype):
                return gpu.prepare(weight, dtype, op)
    return cpu.lay_out("dequantize", weight, rows=0)  # in plain torch, on any device


def _weight(q: QTensor) -> leaf.Weight:
    """The weight in the form of ``qkit_kernels``, with scales expanded to rows and groups."""
    fmt, p, (out, columns) = q.format, q.params, q.shape
    scale, zero, group = p.scale, p.zero, fmt.group
    if fmt.strategy == "tensor":
        scale = scale.expand(out, 1).contiguous()
        zero = None if zero is None else zero.expand(out, 1).contiguous()
    elif fmt.block is not None:
        group = math.gcd(columns, fmt.block[1])
        index = torch.arange(columns // group, device=scale.device) * group // fmt.block[1]
        scale = scale.repeat_interleave(fmt.block[0], dim=0)[:out, index].contiguous()
    kind = leaf.CodeFormat(fmt.kind, fmt.bits, group, fmt.symmetric, "float" if fmt.scale == "model" else fmt.scale)
    return leaf.Weight(kind, q.codes, scale, zero, p.global_scale)


def unpacked(w: PreparedWeight) -> QTensor:
    """The QTensor that was prepared."""
    codes = (
        cpu.codes(w.operator_weight) if isinstance(w.operator_weight, cpu.CpuWeight) else gpu.codes(w.operator_weight)
    )
    return replace(w.q, codes=codes)


def prepare_lookup(q: QTensor, dtype: torch.dtype) -> PreparedWeight:
    """The weight of an embedding that shares none with a head: its codes lie row by row, on any device."""
    operator_weight = cpu.lay_out("dequantize", _weight(q), rows=0)
    return PreparedWeight(operator_weight, replace(q, codes=operator_weight.weight.codes), None, dtype)


def lookup_on(w: PreparedWeight, device: torch.device) -> PreparedWeight:
    """The weight of an embedding on a device; the same object where it is there already."""
    if w.on_cpu and w.q.params.scale.device == device:
        return w
    q = unpacked(w)
    params = Params(*(None if t is None else t.to(device) for t in _tensors(q.params)))  # type: ignore[arg-type]
    return prepare_lookup(QTensor(q.codes.to(device), params, q.format), w.dtype)


def rows(w: PreparedWeight, index: Tensor) -> Tensor:
    """The dequantized rows float32 [n, in] of a weight of integers with index int64 [n]; no other row is unpacked."""
    assert isinstance(w.operator_weight, cpu.CpuWeight)
    p = w.q.params
    chosen = Params(p.scale[index], None if p.zero is None else p.zero[index])
    return dequantize(QTensor(cpu.rows_of(w.operator_weight, index), chosen, w.q.format))


def linear(
    x: Tensor,
    w: PreparedWeight,
    bias: Tensor | None,
    activations: Format | None,
    static: Tensor | None,
    residual: int = 0,
) -> Tensor:
    """x [..., in] times the weight, plus bias, [..., out] in x's dtype; activations are quantized first where the scheme asks.

    static: float32 [1], the activations' stored scale or global scale; residual: how many channels from the first on are
    residual channels.
    """
    flat = x.reshape(-1, w.shape[1])
    if w.op == "int_mm":
        assert activations is not None and isinstance(w.operator_weight, cpu.CpuWeight)
        flat = flat.to(torch.float32)
        scale = token_scale(flat, activations)
        y = cpu.linear(round_to_grid(flat / scale, activations).to(torch.int8), w.operator_weight) * scale
        return _finished(y, x, bias)
    if activations is not None and w.op not in gpu.INTEGERS:
        flat = quantize_activations(flat, activations, static, residual)
    correction = _beside(flat, w)
    if isinstance(w.operator_weight, gpu.GpuWeight):
        return gpu.linear(flat, w.operator_weight, bias, correction).view(*x.shape[:-1], -1)
    y = cpu.linear(flat, w.operator_weight)
    return _finished(y if correction is None else y.to(torch.float32) + correction, x, bias)


def _beside(flat: Tensor, w: PreparedWeight) -> Tensor | None:
    """float32 [tokens, out]: flat [tokens, in] times the sparse and the low-rank part; None where there is neither."""
    s, low_rank, y = w.q.sparse, w.q.low_rank, None
    if s is not None:
        on_gpu = isinstance(w.operator_weight, gpu.GpuWeight)
        y = gpu.sparse(flat, s.rows, s.columns, s.values) if on_gpu else sparse.product(flat, s)
    if low_rank is None:
        return y
    return lowrank.product(flat, low_rank) if y is None else y + lowrank.product(flat, low_rank)


def _finished(y: Tensor, x: Tensor, bias: Tensor | None) -> Tensor:
    y = y.to(x.dtype).view(*x.shape[:-1], -1)
    return y if bias is None else y + bias
