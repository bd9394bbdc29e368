"""The Triton kernels, run by Triton's interpreter (conftest.py asks for it), against float64."""

import json
import os
import re
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

pytest.importorskip("triton")
from qkit_kernels import aot, gpu, tiles
from qkit_kernels.decode import ptx
from qkit_kernels.layout import block_columns, codes_of, lay_out, lay_out_gated, why_not
from qkit_kernels.matmul import Tile, product
from qkit_kernels.matmul8 import product8, quantize, takes, view8
from qkit_kernels.sparse import sparse_product
from qkit_kernels.weight import E2M1, CodeFormat, Weight, dequantize, float_scale

from qkit.nn import ops
from qkit.tensor import formats, lowrank, qtensor, sparse

SMALL = Tile(16, 8, 4, 2, 1)
DTYPES = (torch.float16, torch.bfloat16)
EXTRA = {
    "int4 g32 asym": CodeFormat("int", 4, 32, symmetric=False),
    "int3 g32": CodeFormat("int", 3, 32),
    "int8 g32 asym": CodeFormat("int", 8, 32, symmetric=False),
    "fp8 g128": CodeFormat("fp8", 8, 128),
}
FORMATS = {**tiles.FORMATS, **EXTRA}


def random_weight(fmt: CodeFormat, shape: tuple[int, int], dtype: torch.dtype, seed: int = 0) -> Weight:
    """Random codes, scales and zero points, none of them special."""
    g = torch.Generator().manual_seed(seed)
    n, k = shape
    groups = 1 if fmt.group is None else k // fmt.group
    half = 1 << (fmt.bits - 1)
    if fmt.kind == "int":
        codes = torch.randint(-half, half, shape, generator=g, dtype=torch.int8)
    elif fmt.kind == "fp4":
        codes = torch.randint(0, 16, shape, generator=g, dtype=torch.uint8)
    else:
        codes = (torch.randn(shape, generator=g) * 100).clamp(-448, 448).to(torch.float8_e4m3fn)
    zero = None if fmt.symmetric else torch.randint(-half, half, (n, groups), generator=g, dtype=torch.int8)
    if fmt.scale == "e4m3":
        scale = torch.rand(n, groups, generator=g).mul(448).clamp_min(2.0**-9).to(torch.float8_e4m3fn)
        return Weight(fmt, codes, scale, zero, torch.tensor([5000.0]))
    if fmt.scale == "e8m0":
        return Weight(fmt, codes, torch.randint(110, 122, (n, groups), generator=g, dtype=torch.uint8), zero)
    return Weight(fmt, codes, (torch.rand(n, groups, generator=g) + 0.5).mul(0.01).to(dtype), zero)


def columns(fmt: CodeFormat, blocks: int = 1) -> int:
    """More than ``blocks`` blocks, not a whole number of them where the groups allow it, an odd multiple of what they ask
    for."""
    step = fmt.group or 8
    return (blocks * block_columns(fmt.bits) // step + 1) // 2 * 2 * step + step


def assert_as_good(found: torch.Tensor, x: torch.Tensor, w: torch.Tensor) -> None:
    """Within twice the error of the plain product in x's dtype with the dequantized weight w (float32)."""
    truth = x.double() @ w.double().T
    plain = (x @ w.to(x.dtype).T).double()
    assert found.dtype == x.dtype
    assert (found.double() - truth).norm() <= 2 * (plain - truth).norm() + 1e-6 * truth.norm()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", FORMATS)
def test_every_format(name, dtype):
    fmt = FORMATS[name]
    weight = random_weight(fmt, (24, columns(fmt)), dtype)
    x = torch.randn(3, weight.shape[1], generator=torch.Generator().manual_seed(1)).to(dtype)
    laid = lay_out(weight, dtype)
    found = product(x, laid, SMALL)
    assert_as_good(found, x, dequantize(weight))
    assert torch.equal(found, product(x, laid, SMALL))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("m", (1, 2, 3, 17, 64))
@pytest.mark.parametrize("name", FORMATS)
def test_every_format_at_every_size(name, m, dtype):
    fmt = FORMATS[name]
    for rows, blocks in ((8, 0), (17, 1), (40, 3)):
        weight = random_weight(fmt, (rows, columns(fmt, blocks)), dtype, seed=m)
        x = torch.randn(m, weight.shape[1], generator=torch.Generator().manual_seed(m)).to(dtype)
        laid = lay_out(weight, dtype)
        for tile in (tiles.rule(laid, m, 4), Tile(16, 16, 4, 2, 3)):
            found = product(x, laid, tile)
            assert_as_good(found, x, dequantize(weight))
            assert torch.equal(found, product(x, laid, tile))


@pytest.mark.parametrize("m", (1, 2, 3, 17, 64))
def test_every_number_of_tokens(m):
    weight = random_weight(FORMATS["int4 g128"], (33, 640), torch.float16)
    x = torch.randn(m, 640).half()
    laid = lay_out(weight, torch.float16)
    tile = tiles.rule(laid, m, 2)
    assert tile.tokens >= min(m, 64)
    assert_as_good(product(x, laid, tile), x, dequantize(weight))


@pytest.mark.parametrize("name", FORMATS)
def test_the_layout_holds_the_codes(name):
    fmt = FORMATS[name]
    weight = random_weight(fmt, (21, columns(fmt, 2)), torch.float16)
    stored = codes_of(lay_out(weight, torch.float16))
    expected = weight.codes.view(torch.uint8).to(torch.int32)
    if fmt.kind == "int":
        expected = weight.codes.to(torch.int32) + (1 << (fmt.bits - 1))
    assert torch.equal(stored, expected)


def test_columns_that_are_split_add_up_in_order():
    weight = random_weight(FORMATS["int4 g128"], (40, 1024), torch.bfloat16)
    x = torch.randn(5, 1024).bfloat16()
    laid = lay_out(weight, torch.bfloat16)
    found = [product(x, laid, Tile(16, 8, 4, 2, split)) for split in (1, 2, 3, 8, 100)]
    for y in found:
        assert_as_good(y, x, dequantize(weight))
    assert torch.equal(found[2], product(x, laid, Tile(16, 8, 4, 2, 3)))
    assert not laid.counts.any()  # ready for the next launch


@pytest.mark.parametrize("split", (1, 2))
def test_bias_and_residual(split):
    weight = random_weight(FORMATS["int4 channel"], (24, 264), torch.float16)
    x, bias, residual = torch.randn(2, 264).half(), torch.randn(24).half(), torch.randn(2, 24)
    found = product(x, lay_out(weight, torch.float16), Tile(16, 8, 4, 2, split), bias, residual)
    truth = x.double() @ dequantize(weight).double().T + bias.double() + residual.double()
    torch.testing.assert_close(found.double(), truth, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("split", (1, 2))
@pytest.mark.parametrize("name", ("int4 g128", "nvfp4"))
def test_gate_and_up_in_one_product(name, split):
    gate, up = (random_weight(FORMATS[name], (24, 384), torch.float16, seed) for seed in (1, 2))
    x, bias = torch.randn(3, 384).half(), torch.randn(48).half()
    laid = lay_out_gated(gate, up, torch.float16)
    found = product(x, laid, Tile(16, 8, 4, 2, split), bias, gated=True)
    g, u = (x.double() @ dequantize(w).double().T + b.double() for w, b in ((gate, bias[:24]), (up, bias[24:])))
    torch.testing.assert_close(found.double(), torch.nn.functional.silu(g) * u, rtol=2e-3, atol=2e-3)


def test_gate_and_up_of_two_formats_are_refused():
    one, other = (random_weight(FORMATS[n], (16, 128), torch.float16) for n in ("int4 g128", "int4 g32"))
    with pytest.raises(ValueError, match="gate and up differ"):
        lay_out_gated(one, other, torch.float16)


# ---- INT8 activations ------------------------------------------------------------------------------------------


def int8_codes(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes [M, in], whole numbers in float32, and the scale of each token [M, 1]."""
    amax = x.float().abs().amax(1, keepdim=True)
    scale = torch.where(amax == 0, 1.0, amax / 127.5)
    return (x.float() / scale).round().clamp(-128, 127), scale


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", [n for n, f in FORMATS.items() if f.kind == "int" and f.bits in (4, 8)])
def test_int8_activations(name, dtype):
    fmt = FORMATS[name]
    weight = random_weight(fmt, (24, columns(fmt)), dtype)
    laid = lay_out(weight, dtype)
    x = torch.randn(3, weight.shape[1]).to(dtype)
    x[1] = 0
    if not takes(laid):
        with pytest.raises(ValueError, match="INT8 activations"):
            product8(x, laid, SMALL)
        return
    codes, scale = int8_codes(x)
    for split in (1, 2):
        found = product8(x, laid, Tile(16, 8, 4, 2, split))
        truth = (codes.double() @ dequantize(weight).double().T) * scale.double()
        rounded = truth.to(dtype).double()
        # The sums are exact: all that is lost is the last rounding and float32 scales.
        assert (found.double() - truth).norm() <= 1.01 * (rounded - truth).norm() + 1e-6 * truth.norm()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ("nvfp4", "mxfp4"))
def test_the_int8_view_of_floats_is_exact(name, dtype):
    """As integers give it: 2 E2M1 times the codes of x, summed in integers a group at a time, scaled in float64."""
    fmt = FORMATS[name]
    weight = random_weight(fmt, (24, columns(fmt)), dtype)
    laid = lay_out(weight, dtype)
    x = torch.randn(5, weight.shape[1], generator=torch.Generator().manual_seed(1)).to(dtype)
    x[0, 0], x[3] = 40.0, 0
    codes, scale = int8_codes(x)
    doubled = (2 * torch.tensor(E2M1))[weight.codes.int()].long()
    groups = torch.einsum(
        "mgk,ngk->mng", codes.long().unflatten(1, (-1, fmt.group)), doubled.unflatten(1, (-1, fmt.group))
    )
    truth = (groups * float_scale(weight).double() / 2).sum(2) * scale.double()
    bias, residual = torch.randn(24).to(dtype), torch.randn(5, 24)
    for split in (1, 2):
        for added, parts in ((0.0, ()), (bias.double() + residual.double(), (bias, residual))):
            found = view8(x, laid, Tile(16, 8, 4, 2, split), *parts)
            rounded = (truth + added).to(dtype).double()
            assert (found.double() - truth - added).norm() <= 1.01 * (
                rounded - truth - added
            ).norm() + 1e-6 * truth.norm()


def test_the_int8_view_of_integers_is_refused():
    laid = lay_out(random_weight(FORMATS["int4 g128"], (16, 128), torch.float16), torch.float16)
    with pytest.raises(ValueError, match="expected E2M1"):
        view8(torch.zeros(1, 128).half(), laid, SMALL)


def test_codes_of_activations_are_those_of_the_reference():
    x = torch.randn(4, 200).half()
    codes, scale, sums = quantize(x, 8)
    reference = (x.float() / (x.float().abs().amax(1, keepdim=True) / 127.5)).round().clamp(-128, 127)
    assert torch.equal(
        codes.flatten(1).sort(1).values, torch.nn.functional.pad(reference, (0, 56)).sort(1).values.to(torch.int8)
    )
    assert torch.equal(sums.sum(1), reference.sum(1).to(torch.int32))
    assert torch.equal(scale, x.float().abs().amax(1) / 127.5)


# ---- the sparse part -------------------------------------------------------------------------------------------


def test_sparse_product():
    g = torch.Generator().manual_seed(3)
    dense = torch.randn(37, 100, generator=g) * (torch.rand(37, 100, generator=g) < 0.1)
    dense[5] = 0
    dense[6] = 1.0  # a row that is full
    csr = dense.bfloat16().to_sparse_csr()
    x = torch.randn(3, 100, generator=g).bfloat16()
    found = sparse_product(x, csr.crow_indices().int(), csr.col_indices().int(), csr.values())
    torch.testing.assert_close(found, (x.double() @ dense.bfloat16().double().T).float(), rtol=1e-5, atol=1e-5)


# ---- as the layers use them ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scheme_name", "op"),
    [("W4A16", "product"), ("W8A8", "product8"), ("W4A8", "product8"), ("NVFP4A16", "product"), ("NVFP4A16", "view8")],
)
@pytest.mark.parametrize(("outliers", "rank"), [(0, 0), (60, 0), (0, 4), (60, 4)])
def test_a_weight_of_a_checkpoint(scheme_name, op, outliers, rank):
    """The kernels give what the operators of the CPU give, and hold the weight exactly."""
    torch.manual_seed(0)
    scheme = formats.scheme(scheme_name)
    if op == "view8":
        scheme = replace(scheme, activations=formats.scheme("W8A8").activations)
    dense = torch.randn(40, 256) / 16
    dense[0, :4] = 3.0
    rest, kept = sparse.split(dense, outliers, torch.float16) if outliers else (dense, None)
    amax = dense.abs().amax()
    params = qtensor.find_params(rest, scheme.weights, torch.float16, amax=amax.reshape(1))
    branch = lowrank.find(torch.randn(40, 256) / 16, None, rank, torch.float16) if rank else None
    q = replace(qtensor.quantize(rest, params, scheme.weights), sparse=kept, low_rank=branch)
    laid = ops._lay_out(q, scheme.activations, torch.float16, "cuda")
    if outliers or rank:
        op = "product"
    assert isinstance(laid, gpu.GpuWeight) and laid.op == op
    found = ops.PreparedWeight(laid, replace(q, codes=laid.weight.codes), scheme.activations, torch.float16)
    assert torch.equal(qtensor.dequantize(ops.unpacked(found)), qtensor.dequantize(q))
    x, bias = torch.randn(2, 3, 256).half(), torch.randn(40).half()
    y = ops.linear(x, found, bias, scheme.activations, None)
    expected = ops.linear(
        x.float(), ops.prepare(q, scheme.activations, torch.float32), bias.float(), scheme.activations, None
    )
    assert y.shape == (2, 3, 40) and y.dtype == torch.float16
    torch.testing.assert_close(y.float(), expected, rtol=2e-3, atol=2e-3)


# ---- what is refused -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fmt", "shape", "dtype", "words"),
    [
        (CodeFormat("int", 4, None), (16, 130), torch.float16, "130 columns: expected a multiple of 8"),
        (CodeFormat("int", 5, None), (16, 128), torch.float16, "5-bit codes"),
        (CodeFormat("int", 4, None), (16, 128), torch.float32, "activations in torch.float32"),
        (CodeFormat("int", 4, 96), (16, 192), torch.float16, "groups of 96"),
    ],
)
def test_what_the_layout_does_not_take(fmt, shape, dtype, words):
    assert words in why_not(fmt, shape, dtype)
    with pytest.raises(ValueError, match=re.escape(words)):
        lay_out(random_weight(fmt, shape, torch.float16), dtype)


def test_wrong_activations_are_refused():
    laid = lay_out(random_weight(FORMATS["int4 g128"], (16, 128), torch.float16), torch.float16)
    for x in (
        torch.zeros(1, 64).half(),
        torch.zeros(1, 128),
        torch.zeros(128, 1).half().T[:, ::1].expand(2, 128).T.T[:, :64],
    ):
        with pytest.raises(ValueError, match="x: expected rows of 128"):
            product(x, laid, SMALL)
    with pytest.raises(ValueError, match="bias: expected"):
        product(torch.zeros(1, 128).half(), laid, SMALL, bias=torch.zeros(3).half())


# ---- the assembly ----------------------------------------------------------------------------------------------


def run_ptx(text: str, word: int, offset: int, half: bool) -> tuple[float, float]:
    """The few instructions of ``decode.ptx``, in Python. -> the pair of 16-bit floats"""
    registers: dict[str, int] = {"$2": word, "$3": offset}

    def value(name: str) -> int:
        return registers[name] if name in registers else int(name, 0)

    def floats(bits: int) -> np.ndarray:
        halves = np.array([bits & 0xFFFF, bits >> 16], dtype=np.uint16)
        return (
            halves.view(np.float16).astype(np.float64)
            if half
            else (halves.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
        )

    for line in re.findall(r"^(\S+) (.+);$", text, re.M):
        op, arguments = line[0], [a.strip() for a in re.split(r",(?![^{]*})", line[1])]
        if op == ".reg":
            continue
        if op == "mov.b32" and arguments[0].startswith("{"):
            pair = floats(value(arguments[1]))
            return float(pair[0]), float(pair[1])
        a = [value(x) for x in arguments[1:]]
        if op == "mov.b32":
            result = a[0]
        elif op == "shr.b32":
            result = a[0] >> a[1]
        elif op == "lop3.b32":
            assert a[3] == 0xEA  # (a & b) | c
            result = (a[0] & a[1]) | a[2]
        else:
            exact = floats(a[0]) + floats(a[1]) if op == "add.rn.f16x2" else floats(a[0]) * floats(a[1]) + floats(a[2])
            assert op in ("add.rn.f16x2", "fma.rn.bf16x2")
            narrow = (
                torch.tensor(exact)
                .to(torch.float16 if half else torch.bfloat16)
                .view(torch.int16)
                .numpy()
                .view(np.uint16)
            )
            result = int(narrow[0]) | int(narrow[1]) << 16
        registers[arguments[0]] = result
    raise AssertionError("no result")


@pytest.mark.parametrize("half", (True, False), ids=("float16", "bfloat16"))
@pytest.mark.parametrize("bits", (2, 3, 4))
def test_the_assembly_gives_the_integers(bits, half):
    """Every code in every place, in PTX; that the plain path gives them too is what the products above show."""
    dtype = torch.float16 if half else torch.bfloat16
    offset = -float((1024 if half else 128) + (1 << (bits - 1)))
    packed = (int(torch.tensor(offset, dtype=dtype).view(torch.int16)) & 0xFFFF) * 0x10001
    mask = ((1 << bits) - 1) * 0x10001
    build = getattr(ptx, "fn", ptx)
    for shift in range(0, 16 - bits + 1, bits):
        for low in range(1 << bits):
            high = (low * 7 + 3) % (1 << bits)
            word = (low << shift) | (high << (16 + shift)) | (0xA5A5A5A5 & ~(mask << shift))
            for literal in (packed, None):
                found = run_ptx(build(shift, mask, half, literal), word & 0xFFFFFFFF, packed, half)
                assert found == (low - (1 << (bits - 1)), high - (1 << (bits - 1)))


# ---- compiled ahead of time ------------------------------------------------------------------------------------


def compiled(only: str) -> str:
    """What qkit_kernels.aot says, in a process in which nothing is interpreted."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-W", "ignore", "-m", "qkit_kernels.aot", "--only", only]
    found = subprocess.run(command, capture_output=True, text=True, env=env, check=False)
    assert found.returncode == 0, found.stdout + found.stderr[-2000:]
    return found.stdout


def table() -> dict:
    return json.loads((tiles.TABLES / "compiled.json").read_text())


def test_the_table_has_every_kernel_and_none_is_wrong():
    rows = table()["rows"]
    assert list(rows) == [label for label, _ in aot.kernels()]
    assert {n: aot.wrong(aot.Compiled(**row), int(n.rpartition("sm_")[2])) for n, row in rows.items()} == dict.fromkeys(
        rows, ""
    )


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"spilled": 8}, "8 bytes spilled"),
        ({"wide_loads": 0}, "16 bytes at a time"),
        ({"exchanged": 3}, "3 exchanges"),
        ({"spilled": 8, "instructions": None}, "8 bytes spilled"),
        ({"shared": 102_000}, "sm_89 has 101376"),
    ],
)
def test_what_is_wrong_with_a_kernel(row, said):
    sound = {
        "registers": 90,
        "spilled": 0,
        "shared": 0,
        "wide_loads": 2,
        "exchanged": 0,
        "instructions": 2.5,
        "core": "HMMA",
    }
    assert said in aot.wrong(aot.Compiled(**{**sound, **row}), 89) and not aot.wrong(aot.Compiled(**sound), 89)


@pytest.mark.parametrize("architecture", (80, 90))
def test_kernels_compile_for_gpus(architecture):
    """Some of them, here and now; with the compiler that made the table they come out as it says."""
    committed = table()
    lines = compiled(f" float16 32x8, 2 warps, 4 stages, split 4 sm_{architecture}").splitlines()
    formats = [n for n in tiles.FORMATS if any(f" {n} " in line for line in lines)]
    assert formats == list(tiles.FORMATS) and all(line.endswith("| ok") for line in lines)
    if committed["triton"] == aot.triton.__version__:
        for line in lines:
            label, figures, _ = line.split(" | ")
            assert figures == " ".join(f"{k} {v}" for k, v in committed["rows"][label].items())


@pytest.mark.slow
def test_every_kernel_compiles_for_every_gpu():
    compiled("")
