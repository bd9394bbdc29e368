"""GPTQ, AWQ, ModelOpt and MLX: what is written has the headers that are planned, known bits, and the weight that it had."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from quantized_sources import AWQ_ORDER, stream

from qkit.tensor.formats import ACTIVATION_FORMATS, FORMATS, SCHEMES
from qkit.tensor.layouts import awq, gptq, mlx, modelopt
from qkit.tensor.layouts.table import LAYOUTS, cache_name, cache_name_back, lost_scales, refusal, with_zeros
from qkit.tensor.qtensor import dequantize, find_params, nvfp4_global_scale, quantize

SHAPE = (64, 256)
CASES = [
    *(("gptq", f"int{bits}{zero}", None) for bits in (2, 3, 4, 8) for zero in ("", "_asym", "_channel")),
    ("awq", "int4", None),
    ("awq", "int4_asym", None),
    ("modelopt", "nvfp4", "nvfp4_dynamic"),
    ("modelopt", "nvfp4", None),
    ("modelopt", "fp8", "fp8_static"),
    ("modelopt", "fp8_channel", "fp8_token"),
    ("modelopt", "mxfp8", "mxfp8_dynamic"),
    *(("mlx", f"int{bits}{zero}", None) for bits in (2, 3, 4, 5, 6, 8) for zero in ("", "_asym")),
    ("mlx", "mxfp4", None),
    ("mlx", "mxfp8", None),
]


def made(name: str, shape: tuple[int, int] = SHAPE):
    fmt, weight = FORMATS[name], torch.randn(shape, generator=torch.Generator().manual_seed(3))
    return quantize(weight, find_params(weight, fmt, torch.bfloat16), fmt)


@pytest.mark.parametrize(("layout", "name", "inputs"), CASES)
def test_tensors_are_those_that_were_planned(layout: str, name: str, inputs: str | None) -> None:
    q, acts = made(name), None if inputs is None else ACTIVATION_FORMATS[inputs]
    assert LAYOUTS[layout].refusal(q.format, acts, SHAPE) is None
    tensors = LAYOUTS[layout].write(q, acts, torch.tensor([3.0]), torch.bfloat16)
    expected = LAYOUTS[layout].specs(q.format, acts, SHAPE, torch.bfloat16)
    assert {k: (t.dtype, tuple(t.shape)) for k, t in tensors.items()} == expected
    assert all(t.is_contiguous() for t in tensors.values())


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_words_of_gptq_are_the_bit_stream_of_autogptq(bits: int) -> None:
    q = made(f"int{bits}_asym")
    tensors = gptq.write(q, None, None, torch.bfloat16)
    half = 1 << (bits - 1)
    assert torch.equal(tensors["qweight"], stream(q.codes.T.long() + half, bits))
    zero = q.params.zero.T.long() + half
    assert torch.equal(tensors["qzeros"], stream(zero.T, bits).T)
    assert torch.equal(tensors["g_idx"], torch.arange(256).int() // 128)


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
@pytest.mark.parametrize("zero", ["", "_asym"])
def test_code_times_scale_plus_bias_of_mlx_is_the_weight(bits: int, zero: str) -> None:
    q = made(f"int{bits}{zero}")
    tensors = mlx.write(q, None, None, mlx.scale_dtype(q.format, torch.bfloat16))
    data = tensors["weight"].numpy().astype("<u4").view(np.uint8)
    codes = np.unpackbits(data, axis=1, bitorder="little").reshape(*SHAPE, bits) @ (1 << np.arange(bits))
    scale, bias = (tensors[n].double().numpy().repeat(128, axis=1) for n in ("scales", "biases"))
    assert np.array_equal((codes * scale + bias).astype("f4"), dequantize(q).numpy())
    assert tensors["biases"].dtype == (torch.float32 if zero else torch.bfloat16)


def test_biases_of_zero_points_do_not_fit_16_bits() -> None:
    assert mlx.lost_biases(made("int4"), torch.bfloat16) == 0
    assert mlx.lost_biases(made("int4_asym"), torch.bfloat16) > 0
    assert mlx.lost_biases(made("int4_asym"), torch.float32) == 0


def test_known_words() -> None:
    assert hex(int(gptq.write(made("int4"), None, None, torch.float16)["qzeros"][0, 0])) == "0x77777777"  # 8 less one
    both = gptq.write(with_zeros(made("int4")), None, None, torch.float16)
    assert int(both["qzeros"][0, 0]) & 0xFFFFFFFF == 0x88888888  # in a file that has zero points
    q = replace(made("int4"), codes=(torch.arange(8, dtype=torch.int8) - 8)[:, None].expand(8, 256).contiguous())
    q = replace(q, params=replace(q.params, scale=q.params.scale[:8]))
    word = int(awq.write(q, None, None, torch.float16)["qweight"][0, 0]) & 0xFFFFFFFF
    assert hex(word) == "0x75316420"
    assert [word >> 4 * i & 15 for i in range(8)] == list(AWQ_ORDER)


def test_scales_of_modelopt_are_reciprocals_that_give_the_numbers_back() -> None:
    # Scales that another tool computed in bfloat16 come back exactly, and so do those that the quantizer chooses.
    sixteen = torch.linspace(1, 20000, 3001).bfloat16().float().unique()
    assert all(float(modelopt.inverse(x.reciprocal())) == float(x) for x in sixteen)
    for amax in torch.rand(200, generator=torch.Generator().manual_seed(1)) + 0.01:
        chosen = modelopt.exact_amax(amax.reshape(1))
        assert amax <= chosen <= amax * (1 + 1e-5)
        scale = nvfp4_global_scale(chosen)
        assert torch.equal(modelopt.inverse(scale.reciprocal()), scale)
    inexact = [x for x in np.random.default_rng(0).uniform(1.5, 2, 200).astype("f4") if modelopt.inverse(
        torch.tensor(x).reciprocal()) != torch.tensor(x)]  # fmt: skip
    assert inexact  # without exact_amax some do not


REFUSED = [
    ("gptq", "NVFP4A16", SHAPE, "GPTQ stores integers with a scale for each group or channel, and this is nvfp4"),
    ("gptq", "W8A8", SHAPE, r"its inputs are quantized \(int8_token\), and GPTQ has no place for that"),
    ("gptq", "W5A16", SHAPE, "it has 5 bits, and GPTQ has 2, 3, 4, 8"),
    ("gptq", "W4A16", (60, 256), "its 60 outputs of 4 bits do not fill words of 32 bits"),
    ("awq", "W8A16", SHAPE, "it has 8 bits, and AWQ has 4"),
    ("awq", "W4A16", (60, 256), "its 60 outputs are not a multiple of 8"),
    ("modelopt", "W4A16", SHAPE, "ModelOpt has no name for int4, group 128 with inputs as they are"),
    ("modelopt", "MXFP4", SHAPE, "ModelOpt has no name for mxfp4 with inputs in mxfp4_dynamic"),
    ("mlx", "W7A16", SHAPE, "it has 7 bits, and MLX has 2, 3, 4, 5, 6, 8"),
    ("mlx", "W4A8", SHAPE, r"its inputs are quantized \(int8_token\), and files of MLX quantize weights only"),
    ("mlx", "NVFP4A16", SHAPE, r"MLX stores NVFP4 without a global scale, .* \(mxfp4a16 fits\)"),
    ("mlx", "FP8_DYNAMIC", SHAPE, "MLX stores integers, MXFP4 and MXFP8 with a scale for each group"),
    ("modelopt", "FP8_BLOCK", (60, 256), "blocks of 128x128 do not divide its 60x256 weights"),
]


@pytest.mark.parametrize(("layout", "scheme", "shape", "why"), REFUSED)
def test_what_has_no_place_is_refused(layout: str, scheme: str, shape: tuple[int, int], why: str) -> None:
    pair = SCHEMES[scheme].weights, SCHEMES[scheme].activations
    with pytest.raises(AssertionError, match=f"^x: {why}"):
        raise AssertionError(refusal(LAYOUTS[layout], {"x": pair}, {"x": shape}, []))


def test_awq_has_one_format_and_gptq_rules() -> None:
    one, two = FORMATS["int4"].with_group(32), FORMATS["int4"].with_group(64)
    pairs, shapes = {"m.0.a": (one, None), "m.0.b": (two, None)}, {"m.0.a": SHAPE, "m.0.b": SHAPE}
    reason = refusal(LAYOUTS["awq"], pairs, shapes, [])
    assert reason is not None and "m.0.b: AWQ has one format for the whole model" in reason
    assert "group 32 and group 64" in reason
    assert refusal(LAYOUTS["gptq"], pairs, shapes, []) is None
    config = gptq.config(pairs, ["m.0.c", "lm_head"], ["lm_head"], False)
    assert config["dynamic"] == {r"+:(m\.0\.b)$": {"bits": 4, "group_size": 64}, r"-:(m\.0\.c)$": {}}
    assert "it is an embedding" in str(refusal(LAYOUTS["gptq"], pairs, shapes, ["m.0.a"]))


def test_mlx_names_layers_of_another_format_and_plain_ones() -> None:
    one, two = FORMATS["int4"].with_group(32), FORMATS["int8"].with_group(64)
    pairs = {"m.0.a": (one, None), "m.0.b": (two, None), "m.1.a": (one, None), "embed": (FORMATS["mxfp4"], None)}
    assert refusal(LAYOUTS["mlx"], pairs, dict.fromkeys(pairs, SHAPE), ["embed"]) is None
    config = mlx.config(pairs, ["lm_head"], ["lm_head"], False)
    assert config == {
        "quant_method": "mlx", "group_size": 32, "bits": 4, "mode": "affine", "lm_head": False,
        "m.0.b": {"group_size": 64, "bits": 8, "mode": "affine"}, "embed": {"group_size": 32, "bits": 4, "mode": "mxfp4"},
    }  # fmt: skip
    group = FORMATS["int4"].with_group(16)
    assert "it has groups of 16" in str(refusal(LAYOUTS["mlx"], {"x": (group, None)}, {"x": SHAPE}, []))


def test_mlx_gets_the_older_keys_of_rotary_embeddings() -> None:
    said = {"quant_method": "mlx", "bits": 4}
    plain = mlx.keys({"quantization_config": said, "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}})
    assert plain == {"quantization": {"bits": 4}, "rope_theta": 5e5, "rope_scaling": None}
    scaled = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0}
    found = mlx.keys({"quantization_config": said, "rope_parameters": scaled, "rope_theta": 1e4})
    assert found == {"quantization": {"bits": 4}, "rope_scaling": scaled}  # what a config has already stays
    kinds = {"full_attention": {"rope_theta": 1e6}, "sliding_attention": {"rope_theta": 1e4}}
    inner = mlx.keys({"quantization_config": said, "text_config": {"rope_parameters": kinds}})["text_config"]
    assert (inner["rope_theta"], inner["rope_local_base_freq"]) == (1e6, 1e4)


def test_a_rule_names_what_engines_fuse() -> None:
    names = [f"l.0.self_attn.{x}_proj" for x in "qkvo"]
    pairs = {name: (FORMATS["int4"], None) for name in names} | {"l.0.mlp.down_proj": (FORMATS["int8"], None)}
    rules = gptq.config(pairs | {f"l.1.mlp.{x}": (FORMATS["int8"], None) for x in "abcde"}, [], [], False)["dynamic"]
    assert list(rules.values()) == [{"bits": 4, "group_size": 128}]
    assert r"l\.0\.self_attn\.qkv_proj" in next(iter(rules))


def test_scales_that_do_not_fit() -> None:
    q = made("int4")
    assert lost_scales(q, torch.float16) == 0  # of bfloat16 scales of usual size none is lost
    odd = replace(q, params=replace(q.params, scale=q.params.scale.float() + 1e-5))
    assert lost_scales(odd, torch.float16) > 0


@pytest.mark.parametrize(
    "name", ["model.layers.0.self_attn.k_scale", "model.layers.0.self_attn.v_scale", "model.norm.weight"]
)
def test_names_of_cache_scales(name: str) -> None:
    assert cache_name_back(cache_name(name, "modelopt")) == name == cache_name(name, "gptq")
    assert ("proj" in cache_name(name, "modelopt")) == name.endswith("_scale")
