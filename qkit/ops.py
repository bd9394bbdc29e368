"""Products with packed weights: picks the fast operator where one exists, the dequantizing reference where not.

One function, ``supported``, says whether an operator takes a format, shape, dtype and device. ``prepare`` brings a
QTensor into the operator's own layout once, at load time; ``linear`` multiplies. What is kept in
memory is packed in every case.

CPU operators of torch (2.13):
  int4pack   _weight_int4pack_mm_for_cpu: symmetric INT4 with groups of 32 to 256, bf16 activations
  int8pack   _weight_int8pack_mm: INT8 per channel, activations as they are, bf16
  int_mm     _int_mm: INT8 per channel with INT8 activations per token: exact integer sums; on cores that have INT8 products
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from qkit.activations import quantize_activations, token_scale
from qkit.errors import Unsupported
from qkit.formats import Format
from qkit.machine import has_int8_products
from qkit.packing import pack_bits, pack_nibbles, unpack_bits, unpack_nibbles
from qkit.qtensor import Params, QTensor, dequantize, effective_scale, round_to_grid
from qkit.sparse import product

OPERATORS = ("int4pack", "int8pack", "int_mm")


def supported(
    op: str, fmt: Format, activations: Format | None, shape: tuple[int, int], dtype: torch.dtype, device: torch.device
) -> bool:
    """Whether operator ``op`` computes this linear. shape: (out, in)."""
    if device.type != "cpu" or not fmt.symmetric or fmt.kind != "int":
        return False
    if op == "int4pack":
        groups = fmt.strategy == "group" and fmt.group in (32, 64, 128, 256)
        return groups and fmt.bits == 4 and activations is None and dtype == torch.bfloat16 and shape[0] % 16 == 0
    if op == "int8pack":
        return fmt.bits == 8 and fmt.strategy == "channel" and activations is None and dtype == torch.bfloat16
    if op == "int_mm":
        token = activations is not None and activations.kind == "int" and activations.strategy == "token"
        fits = fmt.bits == 8 and fmt.strategy == "channel" and shape[1] % 8 == 0 and shape[0] % 8 == 0
        return token and fits and has_int8_products()
    return False


@dataclass
class Prepared:
    """A weight ready to multiply with.

    op:     one of OPERATORS, or 'dequantize'
    data:   codes in the operator's layout (for 'dequantize': packed bytes, or float8)
    q:      the scales, zero points, format and sparse part (its codes are dropped)
    scales: the operator's scales
    """

    op: str
    data: Tensor
    q: QTensor
    scales: Tensor
    shape: tuple[int, int]

    def to(self, device: torch.device) -> Prepared:
        """The same weight on another device. An operator's own layout stays where that operator runs."""
        if device == self.data.device:
            return self
        if self.op == "int4pack":
            raise Unsupported(
                f"a weight laid out for the CPU cannot move to {device}: load the model with device={device}"
            )
        p = self.q.params
        moved = Params(*(None if t is None else t.to(device) for t in (p.scale, p.zero, p.global_scale)))  # type: ignore[arg-type]
        sparse = None if self.q.sparse is None else self.q.sparse.to(device)
        bare = QTensor(self.q.codes.to(device), moved, self.q.format, sparse)
        op = self.op if supported(self.op, self.q.format, None, self.shape, torch.bfloat16, device) else "dequantize"
        if op != self.op and self.q.format.kind == "int":
            return Prepared(op, pack_bits(self.data, self.q.format.bits).to(device), bare, torch.empty(0), self.shape)
        return Prepared(op, self.data.to(device), bare, self.scales.to(device), self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes held, scales included."""
        p, s = self.q.params, self.q.sparse
        held = [self.data, self.scales, p.scale, *(t for t in (p.zero, p.global_scale) if t is not None)]
        held += [] if s is None else [s.rows, s.columns, s.values]
        return sum({t.data_ptr(): t.nbytes for t in held if t.numel()}.values())


def prepare(q: QTensor, activations: Format | None, dtype: torch.dtype) -> Prepared:
    """Choose the operator for activations of ``dtype`` and lay the codes out for it."""
    fmt, shape = q.format, q.shape
    op = next((o for o in OPERATORS if supported(o, fmt, activations, shape, dtype, q.codes.device)), "dequantize")
    scale = effective_scale(q.params, fmt)
    if q.sparse is not None and activations is not None:
        op = "dequantize"  # both parts see the same quantized activations
    bare = QTensor(torch.empty(0, dtype=q.codes.dtype), q.params, fmt, q.sparse)
    if op == "int4pack":
        data = torch.ops.aten._convert_weight_to_int4pack_for_cpu(q.codes.to(torch.int32) + 8, 1)
        scales = torch.stack((scale.T, torch.zeros_like(scale.T)), dim=-1).to(torch.bfloat16).contiguous()
        return Prepared(op, data, bare, scales, shape)
    if op == "int8pack":
        return Prepared(op, q.codes, bare, scale[:, 0].to(torch.bfloat16), shape)
    if op == "int_mm":
        return Prepared(op, q.codes, bare, scale[:, 0].contiguous(), shape)
    if fmt.kind == "int":
        data = pack_bits(q.codes, fmt.bits)
    else:
        data = pack_nibbles(q.codes) if fmt.kind == "fp4" else q.codes
    return Prepared(op, data, bare, torch.empty(0), shape)


def unpacked(w: Prepared) -> QTensor:
    """The QTensor of a weight prepared for 'dequantize', 'int8pack' or 'int_mm'."""
    fmt = w.q.format
    if w.op != "dequantize" or fmt.kind == "fp8":
        codes = w.data
    else:
        codes = unpack_nibbles(w.data) if fmt.kind == "fp4" else unpack_bits(w.data, fmt.bits, w.shape[1])
    return QTensor(codes, w.q.params, fmt, w.q.sparse)


def linear(x: Tensor, w: Prepared, bias: Tensor | None, activations: Format | None, static: Tensor | None) -> Tensor:
    """x [..., in] times the weight, plus bias; activations are quantized first where the scheme says so.

    static: float32 [1], the activations' stored scale or global scale.
    """
    if w.op == "int_mm":
        assert activations is not None
        y = _int8(x, w, activations)
    elif w.op == "int4pack":
        flat = x.reshape(-1, w.shape[1]).to(torch.bfloat16)
        y = torch.ops.aten._weight_int4pack_mm_for_cpu(flat, w.data, w.q.format.group, w.scales)
        y = y.view(*x.shape[:-1], -1).to(x.dtype)
    elif w.op == "int8pack" and x.dtype == torch.bfloat16:
        y = torch.ops.aten._weight_int8pack_mm(x.reshape(-1, w.shape[1]), w.data, w.scales).view(*x.shape[:-1], -1)
    else:
        if activations is not None:
            x = quantize_activations(x, activations, static)
        return functional.linear(x, dequantize(unpacked(w)).to(x.dtype), bias)
    if w.q.sparse is not None:
        y = (y.float() + product(x, w.q.sparse)).to(x.dtype)
    return y if bias is None else y + bias


def _int8(x: Tensor, w: Prepared, activations: Format) -> Tensor:
    """INT8 times INT8 with exact integer sums; the scales are applied in float32 at the end."""
    flat = x.reshape(-1, w.shape[1]).to(torch.float32)
    scale = token_scale(flat, activations)
    codes = round_to_grid(flat / scale, activations).to(torch.int8)
    rows = len(codes)
    if rows <= 16:  # the operator wants more than 16 rows on some builds
        codes = functional.pad(codes, (0, 0, 0, 17 - rows))
    sums = torch._int_mm(codes, w.data.T)[:rows]
    return (sums * (scale * w.scales)).to(x.dtype).view(*x.shape[:-1], -1)
