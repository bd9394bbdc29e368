"""Quantize and dequantize: every format on awkward shapes and values, and the way through a file.

What a loader computes is decided by the compressed-tensors package: its own decompression of what was written must give
the very floats that ``dequantize`` gives.
"""

import math
from dataclasses import replace

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.compressors.nvfp4.helpers import unpack_fp4_from_uint8
from compressed_tensors.quantization import QuantizationConfig
from compressed_tensors.quantization.lifecycle.forward import dequantize as ct_dequantize
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from qkit.files.safefile import save_tensors
from qkit.tensor.compressed_tensors import config, formats_of, read, specs, write
from qkit.tensor.formats import ACTIVATION_FORMATS, FORMATS, SCHEMES, Format, layout
from qkit.tensor.qtensor import (
    code_range,
    codes_to_grid,
    dequantize,
    effective_scale,
    expand,
    find_params,
    grid_to_codes,
    half_range,
    param_shape,
    quantize,
    round_to_grid,
    tiles,
    untile,
)

MODEL_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
WIDTHS = {16: (16, 48, 112), 32: (32, 96, 160), None: (1, 7, 33, 130), 20: (20, 100), 128: (128, 384)}


def cases():
    """(format, shape): odd widths, one row, ragged blocks, groups that are not a power of two."""
    for fmt in FORMATS.values():
        variants = [replace(fmt, group=20), fmt] if fmt.strategy == "group" and fmt.scale == "model" else [fmt]
        for f in variants:
            widths = (1, 100, 128, 130, 257) if f.strategy == "block" else WIDTHS[f.group]
            for i, columns in enumerate(widths):
                for rows in (1, 200) if f.strategy == "block" else ((1, 37)[i % 2], 5):
                    yield f, (rows, columns)


CASES = list(cases())
IDS = [f"{f.name}-{f.group or f.strategy}-{r}x{c}" for f, (r, c) in CASES]


def weight(shape: tuple[int, int], seed: int = 0) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=g) * torch.exp(torch.randn(shape[0], 1, generator=g)) * 0.1


# ---- tiles -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("fmt", "shape"), CASES, ids=IDS)
def test_tiles_and_expand_agree(fmt, shape):
    w = weight(shape)
    assert torch.equal(untile(tiles(w, fmt), fmt, shape), w)
    scale = torch.rand(param_shape(fmt, shape)) + 0.5
    by_tile = untile(tiles(w, fmt) * scale[..., None], fmt, shape)
    assert torch.equal(expand(scale, fmt, shape) * w, by_tile)


# ---- accuracy --------------------------------------------------------------------------------------------------


def bound(q, dtype: torch.dtype) -> torch.Tensor:
    """The largest error of an element whose tile's full range was taken, from the grid and the rounding of the scale."""
    fmt, scale = q.format, effective_scale(q.params, q.format)
    slack = {"model": torch.finfo(dtype).eps, "e4m3": 2**-3, "e8m0": 0.0}[fmt.scale] * half_range(fmt)
    if fmt.kind == "int":
        step = (0.5 if fmt.symmetric else 1.0) + slack
    elif fmt.kind == "fp4":
        step = 1.0 + slack + (1.0 if fmt.scale == "e8m0" else 0.0)
    else:
        step = 16.0 + slack + (32.0 if fmt.scale == "e8m0" else 0.0)
    return expand(scale * step * 1.001, fmt, q.shape).expand(q.shape)


@pytest.mark.parametrize("dtype", MODEL_DTYPES, ids=str)
@pytest.mark.parametrize("fmt", FORMATS.values(), ids=lambda f: f.name)
def test_error_is_within_the_step(fmt, dtype):
    w = weight((9, 384)).to(dtype).float()
    q = quantize(w, find_params(w, fmt, dtype), fmt)
    assert bool(((dequantize(q) - w).abs() <= bound(q, dtype)).all())
    assert q.params.scale.dtype == {"model": dtype, "e4m3": torch.float8_e4m3fn, "e8m0": torch.uint8}[fmt.scale]


@pytest.mark.parametrize(("fmt", "shape"), CASES, ids=IDS)
def test_quantizing_again_changes_nothing(fmt, shape):
    w = weight(shape)
    q = quantize(w, find_params(w, fmt, torch.bfloat16), fmt)
    again = quantize(dequantize(q), q.params, fmt)
    assert torch.equal(dequantize(again), dequantize(q))


@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
@pytest.mark.parametrize("fmt", FORMATS.values(), ids=lambda f: f.name)
def test_scale_search_is_never_worse_than_the_range(fmt, weighted):
    w = weight((40, 384), seed=3)
    w[3, 5] = 9.0  # an outlier, which a search may clip
    importance = torch.rand(384).exp() if weighted else None
    cost = torch.ones(384) if importance is None else importance
    tile_cost = tiles(cost.expand(w.shape), fmt)

    def errors(search: bool) -> torch.Tensor:
        p = find_params(w, fmt, torch.bfloat16, importance=importance, search=search)
        return (tiles(dequantize(quantize(w, p, fmt)) - w, fmt).square() * tile_cost).sum(-1)

    if fmt.strategy in ("tensor", "block"):
        tile_cost = torch.ones_like(tile_cost)  # one scale for rows and columns: the search weighs all alike
    plain, searched = errors(False), errors(True)
    assert bool((searched <= plain * (1 + 1e-5)).all())
    if fmt.kind == "int" and fmt.strategy in ("group", "channel") and fmt.bits < 6:
        assert float(searched.sum()) < 0.99 * float(plain.sum())


# ---- grids -----------------------------------------------------------------------------------------------------


def grid_values(fmt: Format) -> torch.Tensor:
    if fmt.kind == "int":
        low, high = code_range(fmt)
        return torch.arange(low, high + 1)
    if fmt.kind == "fp4":
        return codes_to_grid(torch.arange(16, dtype=torch.uint8), fmt)
    codes = torch.arange(256, dtype=torch.uint8)
    return codes[(codes & 0x7F) != 0x7F].view(torch.float8_e4m3fn).float()


@settings(deadline=None, max_examples=300)
@given(name=st.sampled_from(sorted(FORMATS)), x=st.floats(-600, 600, width=32))
def test_rounding_finds_the_nearest_value_of_the_grid(name, x):
    fmt = FORMATS[name]
    found = float(round_to_grid(torch.tensor([x]), fmt))
    distance = (grid_values(fmt).double() - x).abs()
    assert abs(found - x) <= float(distance.min())


@pytest.mark.parametrize("name", ["int2", "int4", "int8", "nvfp4", "fp8"])
def test_ties_go_to_even_codes(name):
    fmt = FORMATS[name]
    values = grid_values(fmt).sort().values.unique()
    middle = (values[1:] + values[:-1]) / 2
    found = round_to_grid(middle, fmt)
    codes = grid_to_codes(found, fmt)
    raw = codes.view(torch.uint8) if fmt.kind == "fp8" else codes.to(torch.int32)
    assert bool((raw % 2 == 0).all())


@pytest.mark.parametrize("fmt", FORMATS.values(), ids=lambda f: f.name)
def test_codes_and_grid_are_inverse(fmt):
    values = grid_values(fmt)
    assert torch.equal(codes_to_grid(grid_to_codes(values, fmt), fmt), values)
    assert torch.equal(codes_to_grid(grid_to_codes(values, fmt), fmt).signbit(), values.signbit())


# ---- golden values of the scale rules --------------------------------------------------------------------------


def test_integer_scale_rule():
    w = torch.zeros(1, 128)
    w[0, 3], w[0, 9] = -3.0, 1.5
    p = find_params(w, FORMATS["int4"], torch.float32)
    assert p.scale.tolist() == [[pytest.approx(3 / 7.5)]] and p.zero is None
    p = find_params(w, FORMATS["int4_asym"], torch.float32)
    assert p.scale.tolist() == [[pytest.approx(4.5 / 15)]]
    assert p.zero.tolist() == [[2]]  # -8 + 3 / 0.3
    positive = find_params(w.abs() + 1, FORMATS["int4_asym"], torch.float32)
    assert positive.scale.tolist() == [[pytest.approx(4 / 15)]] and positive.zero.tolist() == [
        [-8]
    ]  # 0 is in the range


def test_fp8_scale_rule():
    w = torch.full((2, 8), 0.1)
    w[1, 2] = -44.8
    assert find_params(w, FORMATS["fp8"], torch.float32).scale.tolist() == [[pytest.approx(0.1)]]
    assert find_params(w, FORMATS["fp8_channel"], torch.float32).scale[1].tolist() == [pytest.approx(0.1)]


def test_nvfp4_scale_rule():
    w = torch.full((1, 32), 0.25)
    w[0, 1], w[0, 20] = -2.0, 1.0
    p = find_params(w, FORMATS["nvfp4"], torch.bfloat16)
    assert p.global_scale.tolist() == [2688 / 2.0] and p.global_scale.dtype == torch.float32
    assert p.scale.float().tolist() == [[448.0, 224.0]]
    empty = find_params(torch.zeros(1, 16), FORMATS["nvfp4"], torch.bfloat16)
    assert empty.global_scale.tolist() == [1.0] and empty.scale.float().tolist() == [[0.125]]


@pytest.mark.parametrize(("name", "offset"), [("mxfp4", 2), ("mxfp8", 8)])
@pytest.mark.parametrize("amax", [1.0, 1.25, 1.74, 1.75, 1.99, 2.0, 3.4, 3.5, 448.0, 1e-3, 7e-9, 5e20])
def test_mx_exponent_rule(name, offset, amax):
    mantissa = amax / 2.0 ** math.floor(math.log2(amax))
    rounded = 2.0 ** (math.floor(math.log2(amax)) + 1) if mantissa >= 1.75 else amax
    w = torch.zeros(1, 32)
    w[0, 7] = -amax
    expected = 127 + math.floor(math.log2(rounded)) - offset
    assert find_params(w, FORMATS[name], torch.bfloat16).scale.tolist() == [[expected]]


# ---- awkward values --------------------------------------------------------------------------------------------


def awkward() -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(5)
    base = torch.randn(6, 384, generator=g)
    row, group, outlier, half, top = (base.clone() for _ in range(5))
    row[2] = 0
    group[1, 128:256] = 0
    outlier[4, 200] = 1e30
    half[:, ::2] = 0
    top[0, :4] = torch.tensor([1.0, -1.0, 0.5, -0.25]) * torch.finfo(torch.bfloat16).max
    return {
        "zero row": row,
        "zero group": group,
        "zero tensor": torch.zeros(6, 384),
        "denormals": base * 1e-39,
        "tiny": base * 1e-33,
        "one outlier": outlier,
        "many zeros": half,
        "bf16 max": top,
        "all bf16 max": base.sign() * torch.finfo(torch.bfloat16).max,
        "one sign": base.abs(),
        "constant": torch.full((6, 384), -0.37),
    }


AWKWARD = awkward()


@pytest.mark.parametrize("search", [False, True], ids=["range", "search"])
@pytest.mark.parametrize("value", AWKWARD)
@pytest.mark.parametrize("fmt", FORMATS.values(), ids=lambda f: f.name)
def test_awkward_values(fmt, value, search):
    """Scales are finite and positive, zeros stay zero, and what was not saturated is as near as a step."""
    w = AWKWARD[value]
    p = find_params(w, fmt, torch.bfloat16, search=search)
    scale = effective_scale(p, fmt)
    assert bool((scale.isfinite() & (scale > 0)).all())
    assert bool((p.scale.float() > 0).all()) or fmt.scale == "e8m0"
    q = quantize(w, p, fmt)
    back = dequantize(q)
    assert bool(back.isfinite().all())
    assert bool((back[w == 0] == 0).all())
    assert bool(back.to(torch.bfloat16).isfinite().all()) or "max" not in value
    if not search and value not in ("one outlier", "bf16 max", "all bf16 max", "denormals"):
        assert bool(((back - w).abs() <= bound(q, torch.bfloat16)).all())
    # Nothing is ever further away than the range of its tile.
    amax = expand(tiles(w, fmt).abs().amax(-1), fmt, q.shape).expand(q.shape)
    assert bool(((back - w).abs().double() <= 1.01 * amax.double() + 1e-36).all())


@pytest.mark.parametrize("dtype", MODEL_DTYPES, ids=str)
@pytest.mark.parametrize("fmt", FORMATS.values(), ids=lambda f: f.name)
def test_the_largest_value_of_the_models_dtype(fmt, dtype):
    w = torch.full((2, 128), torch.finfo(dtype).max) * torch.tensor([1.0, -1.0]).repeat(64)
    for search in (False, True):
        q = quantize(w, find_params(w, fmt, dtype, search=search), fmt)
        assert bool(dequantize(q).isfinite().all())


# ---- through a file, and as another library reads it -----------------------------------------------------------


def ct_decompressed(tensors: dict, fmt: Format, activations: Format | None) -> torch.Tensor:
    """The weight as compressed-tensors decompresses it, with its arithmetic in float32."""
    written = QuantizationConfig.model_validate(config({"x": (fmt, activations)}, [], {}))
    scheme = next(iter(written.config_groups.values()))
    packing = layout(fmt, activations)
    wide = {k: v.float() if k == "weight_scale" and fmt.scale == "model" else v for k, v in tensors.items()}
    if fmt.scale == "e4m3":
        rows, half = tensors["weight_packed"].shape
        values = unpack_fp4_from_uint8(tensors["weight_packed"], rows, 2 * half).float()
        args = {"args": scheme.weights, "dtype": torch.float32, "global_scale": tensors["weight_global_scale"]}
        return ct_dequantize(values, tensors["weight_scale"].float(), **args)
    packer = BaseCompressor.get_value_from_registry(packing)
    return packer.decompress(wide, scheme)["weight"].float()


@pytest.mark.parametrize(("fmt", "shape"), CASES, ids=IDS)
def test_through_a_file_bit_for_bit(fmt, shape, tmp_path):
    w = weight(shape, seed=7)
    q = quantize(w, find_params(w, fmt, torch.bfloat16, search=True), fmt)
    tensors = write(q, None, None, torch.bfloat16)
    assert {k: (t.dtype, tuple(t.shape)) for k, t in tensors.items()} == specs(fmt, None, shape, torch.bfloat16)
    save_tensors(tmp_path / "x.safetensors", tensors)
    loaded = load_file(tmp_path / "x.safetensors")
    back = read(loaded, fmt, shape)
    assert torch.equal(back.codes.view(torch.uint8), q.codes.view(torch.uint8))
    assert torch.equal(dequantize(back), dequantize(q))
    zero = loaded.get("weight_zero_point")
    if zero is not None and zero.dtype == torch.int32 and len(zero) == 1 and fmt.bits == 4:
        return  # compressed-tensors 0.20 itself cannot unpack a single row of words of zero points (a view of a transpose)
    assert torch.equal(ct_decompressed(loaded, fmt, None), dequantize(q))


@pytest.mark.parametrize("search", (False, True))
@pytest.mark.parametrize("name", ("int2", "int3", "int4"))
def test_signed_scales_reach_further_where_the_largest_weight_is(name, search):
    fmt = FORMATS[name].with_group(32)
    w = weight((64, 384), seed=3)
    plain, signed = (
        quantize(w, find_params(w, fmt, torch.bfloat16, search=search, signed=s), fmt) for s in (False, True)
    )
    parts = tiles(w, fmt)
    assert torch.equal(signed.params.scale < 0, parts.amax(-1) > -parts.amin(-1))
    errors = [float((dequantize(q) - w).square().sum()) for q in (plain, signed)]
    assert errors[1] < 0.95 * errors[0]
    # The mirror image has the mirrored scales and the same codes.
    mirrored = quantize(-w, find_params(-w, fmt, torch.bfloat16, search=search, signed=True), fmt)
    assert torch.equal(mirrored.codes, signed.codes) and torch.equal(mirrored.params.scale, -signed.params.scale)
    assert torch.equal(ct_decompressed(write(signed, None, None, torch.bfloat16), fmt, None), dequantize(signed))


@pytest.mark.parametrize("name", ("int8", "int4_asym", "nvfp4"))
def test_formats_whose_scales_have_no_sign(name):
    fmt = FORMATS[name]
    w = weight((8, 256), seed=3)
    plain, signed = (find_params(w, fmt, torch.bfloat16, signed=s) for s in (False, True))
    assert torch.equal(plain.scale.view(torch.uint8), signed.scale.view(torch.uint8))


@pytest.mark.parametrize("name", SCHEMES)
def test_schemes_through_compressed_tensors(name):
    s = SCHEMES[name]
    w = weight((64, 384), seed=9)
    q = quantize(w, find_params(w, s.weights, torch.bfloat16), s.weights)
    static = None if s.activations is None else torch.tensor([0.5])
    tensors = write(q, s.activations, static, torch.bfloat16)
    assert tensors.keys() == specs(s.weights, s.activations, (64, 384), torch.bfloat16).keys()
    assert torch.equal(ct_decompressed(tensors, s.weights, s.activations), dequantize(q))


@pytest.mark.parametrize("name", SCHEMES)
def test_the_config_says_the_formats(name):
    s = SCHEMES[name]
    pairs = {"a.x": (s.weights, s.activations), "a.y": (s.weights, s.activations)}
    written = config(pairs, ["lm_head"], {})
    assert written["format"] == layout(s.weights, s.activations) and written["ignore"] == ["lm_head"]
    found = formats_of(written, ["a.x", "a.y", "lm_head"], "here")
    assert found.keys() == pairs.keys()
    for weights, activations in found.values():
        assert replace(weights, name="") == replace(s.weights, name="")
        if s.activations is not None:
            loose = {"name": "", "dynamic": True}  # NVFP4's "local" counts as dynamic
            assert replace(activations, **loose) == replace(s.activations, **loose)
            assert activations.dynamic == s.activations.dynamic


def test_mixed_precision_config():
    pairs = {
        "a": (FORMATS["int4"], None),
        "b": (FORMATS["int4"], None),
        "c": (FORMATS["int4"].with_group(96), None),
        "d": (FORMATS["fp8_channel"], ACTIVATION_FORMATS["fp8_token"]),
    }
    written = config(pairs, [], {"c": "module.c"})
    assert written["format"] == "mixed-precision"
    groups = list(written["config_groups"].values())
    assert {g["format"] for g in groups} == {"pack-quantized", "float-quantized"}
    assert groups[-1]["targets"] == ["Linear"] and ["c", "module.c"] in [g["targets"] for g in groups]
    found = formats_of(written, list(pairs), "here")
    assert {n: w.group for n, (w, _) in found.items()} == {"a": 128, "b": 128, "c": 96, "d": None}
