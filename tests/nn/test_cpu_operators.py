"""The CPU operators against float64, on odd shapes and on both sides of the number of rows where they hand over to slices."""

import json
from dataclasses import replace
from importlib.resources import files

import pytest
import torch
from qkit_kernels import cores, cpu
from qkit_kernels.weight import CodeFormat, Weight, dequantize

from qkit.benchmark.contenders import random_weight
from qkit.nn import ops
from qkit.tensor.activations import quantize_activations, static_scale
from qkit.tensor.formats import ACTIVATION_FORMATS, FORMATS, fit_group
from qkit.tensor.qtensor import dequantize as exact

FORMATS_OF_THE_LEAF = [
    *(CodeFormat("int", b, g, s) for b in (2, 3, 4, 5, 8) for g in (32, 96, None) for s in (True, False)),
    CodeFormat("fp4", 4, 16, True, "e4m3"),
    CodeFormat("fp4", 4, 32, True, "e8m0"),
    CodeFormat("fp8", 8, None),
    CodeFormat("fp8", 8, 32, True, "e8m0"),
]
SHAPES = ((64, 96), (24, 96), (192, 288), (40, 480), (2112, 1056))  # the last is more than a slice
ROWS = (1, 2, 3, 17, 64)


def named(fmt: CodeFormat) -> str:
    return f"{fmt.kind}{fmt.bits}-{fmt.group}-{'sym' if fmt.symmetric else 'asym'}-{fmt.scale}"


def weight(fmt: CodeFormat, shape: tuple[int, int]) -> Weight:
    """Every code there is but NaN, random scales."""
    torch.manual_seed(0)
    per_group = (shape[0], shape[1] // (fmt.group or shape[1]))
    low, high = -(1 << (fmt.bits - 1)), 1 << (fmt.bits - 1)
    scale, zero, global_scale = (torch.rand(per_group) * 0.1 + 0.01).bfloat16(), None, None
    if fmt.kind == "int":
        codes = torch.randint(low, high, shape, dtype=torch.int8)
        zero = None if fmt.symmetric else torch.randint(low, high, per_group, dtype=torch.int8)
    elif fmt.kind == "fp4":
        codes = torch.randint(0, 16, shape, dtype=torch.uint8)
    else:
        codes = torch.randint(0, 127, shape, dtype=torch.uint8) + 128 * torch.randint(0, 2, shape, dtype=torch.uint8)
        codes = codes.view(torch.float8_e4m3fn)
    if fmt.scale == "e8m0":
        scale = torch.randint(110, 125, per_group, dtype=torch.uint8)
    elif fmt.scale == "e4m3":
        scale, global_scale = (torch.rand(per_group) * 100 + 1).to(torch.float8_e4m3fn), torch.tensor([1234.5])
    return Weight(fmt, codes, scale, zero, global_scale)


def error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found.double() - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("fmt", FORMATS_OF_THE_LEAF, ids=named)
def test_products(fmt):
    """Within twice the error of a plain product in that dtype (of single rows, over sixteen of them), operator and slices
    alike; codes come back; runs repeat."""
    for shape in SHAPES:
        if shape[1] % (fmt.group or 1):
            continue
        w = weight(fmt, shape)
        dense = dequantize(w)
        for dtype in (torch.bfloat16, torch.float32):
            p = cpu.prepare(w, dtype)
            assert torch.equal(cpu.codes(p).view(torch.uint8), w.codes.view(torch.uint8))
            assert p.nbytes < (0.4 if fmt.bits <= 4 else 0.6) * dense.nbytes
            for rows in ROWS[:2] if shape[0] > 1000 else ROWS:
                each = torch.randn(16 if rows == 1 else 1, rows, shape[1]).to(dtype)  # a few outputs alone tell little
                wanted = each.double() @ dense.double().T
                bound = 2 * error(torch.stack([x @ dense.to(dtype).T for x in each]), wanted) + 1e-6
                for q in (replace(p, rows=1000), replace(p, rows=0)):
                    found = torch.stack([cpu.linear(x, q) for x in each])
                    assert found.dtype == dtype and error(found, wanted) <= bound, (shape, dtype, rows, q.op)
                    assert torch.equal(found[0], cpu.linear(each[0], q))


@pytest.mark.parametrize("fmt", FORMATS_OF_THE_LEAF, ids=named)
def test_slices_are_exact(fmt, monkeypatch):
    """The identity gets the dequantized weight back to the bit, from whatever layout, in several slices."""
    monkeypatch.setattr(cpu, "SLICE", 1 << 13)
    w = weight(fmt, (320, 96))
    p = replace(cpu.prepare(w, torch.float32), rows=0)
    assert torch.equal(cpu.linear(torch.eye(96), p).T, dequantize(w))


@pytest.mark.parametrize("fmt", FORMATS_OF_THE_LEAF, ids=named)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_an_input_that_is_a_transposed_view(fmt, dtype):
    """Mamba hands one on."""
    w = weight(fmt, SHAPES[0] if SHAPES[0][1] % (fmt.group or 1) == 0 else (64, 2 * (fmt.group or 1)))
    p = replace(cpu.prepare(w, dtype), rows=1000)
    x = torch.randn(dequantize(w).shape[1], 3).to(dtype).t()
    # BLAS may add in another order.
    assert error(cpu.linear(x, p), cpu.linear(x.contiguous(), p).double()) < 4 * torch.finfo(dtype).eps


def test_many_rows_leave_the_operator(monkeypatch):
    """linear takes the operator up to its number of rows, and slices beyond; no rows give none."""
    p = cpu.prepare(weight(CodeFormat("int", 8, 32), (64, 96)), torch.float32)
    assert p.op in ("bag", "dequantize")
    p, seen = replace(p, rows=2), []
    dense = cpu._dense
    monkeypatch.setattr(cpu, "_dense", lambda x, p: seen.append(len(x)) or dense(x, p))
    results = [cpu.linear(torch.randn(rows, 96), p).shape for rows in (0, 1, 2, 3)]
    assert results == [(0, 64), (1, 64), (2, 64), (3, 64)]
    assert seen == ([0, 3] if p.op == "bag" else [0, 1, 2, 3])


def test_integer_products_are_exact():
    """INT8 times INT8: the sums that float64 gives, also at the few rows that are filled up."""
    w = weight(CodeFormat("int", 8, None), (64, 96))
    p = cpu.lay_out("int_mm", w, 0)
    for rows in (1, 17):
        x = torch.randint(-128, 128, (rows, 96), dtype=torch.int8)
        sums = x.double() @ w.codes.double().T
        assert torch.equal(cpu.linear(x, p), sums.float() * w.scale[:, 0].float())
    assert cpu.supported("int_mm", w.format, (64, 96), torch.int8) == cores.multiplies_int8()
    assert not cpu.supported("int_mm", w.format, (63, 96), torch.int8)


def test_what_is_supported():
    bf16, int4 = torch.bfloat16, CodeFormat("int", 4, 128)
    for shape in ((64, 100), (64, 64)):  # groups do not divide the row
        assert not any(cpu.supported(op, int4, shape, bf16) for op in cpu.OPS)
    assert not cpu.supported("int4pack", int4, (64, 128), torch.float32)
    assert not cpu.supported("int4pack", CodeFormat("int", 2, 128), (64, 128), bf16)
    assert not cpu.supported("int8pack", CodeFormat("int", 8, None, symmetric=False), (64, 128), bf16)
    assert not cpu.supported("bag", CodeFormat("fp8", 8, None), (64, 128), bf16)
    assert all(cpu.supported("dequantize", f, (7, 96), bf16) for f in FORMATS_OF_THE_LEAF)
    if cores.kind() in ("avx2", "avx512", "avx512_bf16", "amx"):
        assert cpu.int4_tile() == (32 if cores.kind() == "avx2" else 64)
        assert cpu.prepare(weight(int4, (64, 128)), bf16).op == "int4pack"


def test_the_table():
    """Kinds of cores that exist, rows from the measured ones, and few rows for a core that was not measured."""
    table = json.loads(files("qkit_kernels").joinpath("tables/cpu.json").read_text())
    assert set(table) <= {*cores.KINDS} and "other" in table
    assert all(set(entry["rows"]) <= {*cpu.OPS} for entry in table.values())
    assert cpu.most_rows("a core of next year") == table["other"]["rows"]
    assert max(table["other"]["rows"].values()) <= 4


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("shape", [(64, 256), (72, 96)], ids=str)
def test_a_qtensor_is_multiplied_and_read_back(name, shape):
    """Every format, through qkit's own product: whatever shares a scale."""
    fmt = fit_group(FORMATS[name], shape[1])
    q = random_weight(fmt, shape, 9, torch.Generator().manual_seed(0))
    dense = exact(q)
    for dtype in (torch.bfloat16, torch.float32):
        p = ops.prepare(q, None, dtype)
        back = ops.unpacked(p)
        assert torch.equal(exact(back), dense) and back.format == fmt and back.codes.dtype == q.codes.dtype
        for rows in (1, 40):
            x = torch.randn(rows, shape[1]).to(dtype)
            wanted = x.double() @ dense.double().T
            bound = 2 * error(x @ dense.to(dtype).T, wanted) + 1e-6
            assert error(ops.linear(x, p, None, None, None), wanted) <= bound


@pytest.mark.parametrize("weights", ["int4", "int8_channel", "nvfp4"])
@pytest.mark.parametrize("name", ACTIVATION_FORMATS)
def test_rounded_activations(weights, name):
    """The product of what both sides are rounded to; a sparse part meets the same activations; biases are added."""
    acts = ACTIVATION_FORMATS[name]
    static = torch.tensor([static_scale(4.0, acts)]) if acts.strategy in ("tensor", "tensor_group") else None
    q = random_weight(FORMATS[weights], (64, 256), 9, torch.Generator().manual_seed(0))
    for part in (q.sparse, None):
        q = replace(q, sparse=part)
        p = ops.prepare(q, acts, torch.float32)
        x, bias = torch.randn(2, 3, 256), torch.randn(64)
        wanted = quantize_activations(x, acts, static).double() @ exact(q).double().T + bias.double()
        assert error(ops.linear(x, p, bias, acts, static), wanted) < 1e-6
