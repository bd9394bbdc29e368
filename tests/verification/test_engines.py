"""The static engine table: what it promises for the schemes that qkit can write, and what it refuses."""

from dataclasses import replace

import pytest

from qkit.tensor.formats import SCHEMES, layout
from qkit.verification.engine_types import EngineFit, ModelFacts
from qkit.verification.engines import engine_fits
from qkit.verification.layout_engines import layout_fits
from qkit.verification.vllm_table import GPUS


def vllm(scheme: str, packing: str, **changes: object) -> EngineFit:
    made = SCHEMES[scheme]
    return engine_fits(replace(made.weights, **changes), made.activations, packing)[0]


@pytest.mark.parametrize(
    ("scheme", "packing", "loads_as", "limit"),
    [
        ("W4A16", "pack-quantized", "WNA16", "tensor-parallel"),
        ("W3A16", "pack-quantized", "WNA16", "tensor-parallel"),
        ("W8A16_ASYM", "pack-quantized", "WNA16", "tensor-parallel"),
        ("W8A16_ASYM", "pack-quantized", "WNA16", "Humming (sm90: Machete)"),
        ("W4A16_ASYM", "pack-quantized", "WNA16", "Marlin (sm90: Machete)"),
        ("W3A16_ASYM", "pack-quantized", "WNA16", "Humming"),
        ("W3A16", "pack-quantized", "WNA16", "no kernel for CPUs"),
        ("W4A8", "pack-quantized", "WNA8Int", "on CPUs without AMX inputs stay in 16 bits"),
        ("W4A8", "int-quantized", "W4A8Int", "legacy"),
        ("W4A8-FP8", "pack-quantized", "W4A8Fp8", "not on sm75, sm80, sm86, sm89, sm100, sm120"),
        ("W8A8", "int-quantized", "W8A8Int8", ""),
        ("FP8", "float-quantized", "W8A8Fp8", "sm89"),
        ("FP8_DYNAMIC", "float-quantized", "W8A8Fp8", "sm89"),
        ("FP8_BLOCK", "float-quantized", "W8A8Fp8", "sm89"),
        ("NVFP4", "nvfp4-pack-quantized", "W4A4Fp4", "Blackwell"),
        ("NVFP4A16", "nvfp4-pack-quantized", "W4A4Fp4", ""),
        ("MXFP4", "mxfp4-pack-quantized", "W4A4Mxfp4", ""),
        ("MXFP8A16", "mxfp8-quantized", "W8A8Mxfp8", "quantizes them too on Blackwell"),
        ("MXFP4A16", "mxfp4-pack-quantized", "W4A4Mxfp4", "quantizes them too on Blackwell"),
    ],
)
def test_vllm_takes(scheme, packing, loads_as, limit):
    fit = vllm(scheme, packing)
    assert fit.loads_as is not None and loads_as in fit.loads_as
    assert limit in " ".join(fit.limits)


@pytest.mark.parametrize(
    ("scheme", "packing", "changes", "why"),
    [
        ("W4A16", "int-quantized", {}, "only as pack-quantized"),
        ("W4A8-FP8", "pack-quantized", {"group": 64}, "it has no kernel for weights in "),
        (
            "W4A8-FP8",
            "pack-quantized",
            {"strategy": "channel", "group": None},
            "it has no kernel for weights in ",
        ),
        ("W8A8", "int-quantized", {"symmetric": False}, "no scheme"),
        ("W4A16", "pack-quantized", {"strategy": "tensor", "group": None}, "no scheme"),
        ("W3A16", "pack-quantized", {"bits": 1}, "no scheme"),
    ],
)
def test_vllm_refuses(scheme, packing, changes, why):
    fit = vllm(scheme, packing, **changes)
    assert fit.loads_as is None and why in fit.limits[0]


def test_asymmetric_activations_are_refused():
    made = SCHEMES["W4A8"]
    assert made.activations
    fit = engine_fits(made.weights, replace(made.activations, symmetric=False), "pack-quantized")[0]
    assert fit.loads_as is None


@pytest.mark.parametrize("symmetric", [True, False])
def test_asymmetric_weights_with_int8_inputs_load(symmetric):
    assert "WNA8Int" in str(vllm("W4A8", "pack-quantized", symmetric=symmetric).loads_as)


@pytest.mark.parametrize(
    ("group", "kernel", "wrong"),
    [
        (32, "Marlin (sm90: Humming)", False),
        (64, "Marlin (sm90: Machete)", False),
        (128, "Marlin (sm90: Machete)", False),
        (-1, "Marlin (sm90: Machete)", False),
        (16, "Humming (sm75: Exllama)", False),
        (48, "Humming (sm75: Exllama)", True),
        (96, "Humming (sm75: Exllama)", True),
        (256, "TritonW4A16 (sm75: Exllama; sm90: Humming)", False),
    ],
)
def test_kernels_by_group(group, kernel, wrong):
    fit = engine_fits(SCHEMES["W4A16"].weights.with_group(group), None, "pack-quantized")[0]
    assert fit.loads_as and f"runs on GPUs with {kernel}" in fit.limits
    assert any("may be wrong" in limit for limit in fit.limits) == wrong


def test_dense_packings_ask_for_a_newer_transformers_stack():
    for scheme, newer in (("W3A16", True), ("W4A16", False), ("W5A16", True), ("NVFP4", False)):
        fit = engine_fits(SCHEMES[scheme].weights, None, "pack-quantized")[1]
        assert any("May 2026" in limit for limit in fit.limits) == newer


def test_own_method_is_for_qkit_alone():
    fits = {fit.engine: fit.loads_as for fit in engine_fits(SCHEMES["W3A16"].weights, None, "pack-quantized", "qkit")}
    assert fits["vLLM"] is None and fits["transformers + compressed-tensors"] is None and fits["qkit"]


@pytest.mark.parametrize(
    ("kind", "told"),
    [
        ("LlamaForCausalLM", False),
        ("GPT2LMHeadModel", False),
        ("", False),  # not known
        ("CTRLLMHeadModel", True),
        ("NanoChatForCausalLM", True),
    ],
)
def test_a_class_that_vllm_does_not_have_is_told(kind, told):
    fit = engine_fits(SCHEMES["W4A16"].weights, None, "pack-quantized", facts=ModelFacts(kind=kind))[0]
    assert fit.loads_as and any(f"no class {kind} of its own" in limit for limit in fit.limits) == told
    shown = engine_fits(
        SCHEMES["W4A16"].weights,
        None,
        "pack-quantized",
        facts=ModelFacts(kind="Qwen2VLForConditionalGeneration", images=True),
    )[0]
    assert not any("of its own" in limit for limit in shown.limits)


def test_every_scheme_of_qkit_is_in_the_table_on_every_kind_of_gpu():
    for made in SCHEMES.values():
        fit = engine_fits(made.weights, made.activations, layout(made.weights, made.activations))[0]
        if made.name == "NVFP4A8":  # of diffusion transformers
            assert fit.loads_as is None and "it takes NVFP4 weights with NVFP4 inputs" in fit.limits[0]
        else:
            assert fit.loads_as and set(fit.kernels) == {*GPUS, "cpu"}, made.name
            assert fit.known == "from a table (vLLM 0.32)"


@pytest.mark.parametrize(
    ("method", "scheme", "group", "name", "kernel"),
    [
        ("gptq", "W4A16", 128, "AutoGPTQLinearMethod", "runs on GPUs with Marlin (sm90: Machete)"),
        ("gptq", "W4A16", 32, "AutoGPTQLinearMethod", "runs on GPUs with Marlin (sm90: Humming)"),
        ("gptq", "W8A16", 128, "AutoGPTQLinearMethod", "no kernel for CPUs"),
        ("awq", "W4A16_ASYM", 128, "AutoAWQMarlinLinearMethod", "runs on GPUs with Marlin (sm90: Machete)"),
        ("awq", "W4A16_ASYM", 16, "AutoAWQLinearMethod", "runs on GPUs with its own AWQ kernels"),
        ("gptq", "W4A16", 16, None, "Marlin takes groups of 32, 64, 128"),
        ("gptq", "W3A16", 128, None, "4 and 8 bits alone"),
    ],
)
def test_the_layouts_of_others_name_the_kernels_of_vllm(method, scheme, group, name, kernel):
    packing = "gptq" if method == "gptq" else "gemm"
    fit = layout_fits(SCHEMES[scheme].weights.with_group(group), None, packing, method, ModelFacts())[0]
    assert fit.loads_as == name and fit.known == "from a table (vLLM 0.32)"
    assert any(limit.startswith(kernel) or kernel in limit for limit in fit.limits)
    assert (name is None) or set(fit.kernels) == {*GPUS, "cpu"}


@pytest.mark.parametrize(
    ("scheme", "experts", "name", "kernel"),
    [
        ("FP8", False, "ModelOptLinearMethod (FP8)", "not on sm75"),
        ("FP8", True, "ModelOptFp8MoEMethod", "sm89: Triton"),
        ("FP8_DYNAMIC", False, "ModelOptLinearMethod (FP8)", "runs on CPUs too"),
        ("FP8_DYNAMIC", True, None, "one scale for a weight alone"),
        ("FP8_BLOCK", False, "ModelOptLinearMethod (FP8)", "DeepGemm"),
        ("MXFP8", False, "ModelOptLinearMethod (MXFP8)", "not on sm75"),
        ("NVFP4", False, "ModelOptLinearMethod (NVFP4)", "sm90: HummingNvFp4"),
        ("NVFP4A16", False, "ModelOptLinearMethod (NVFP4, weights alone)", "sm100: FlashInferCuteDslNvFp4W4A16"),
        ("W4A16", False, None, "FP8, NVFP4, W4A16_NVFP4 and MXFP8 alone"),
    ],
)
def test_modelopt_has_kernels_of_its_own(scheme, experts, name, kernel):
    made = SCHEMES[scheme]
    fit = layout_fits(made.weights, made.activations, "modelopt", "modelopt", ModelFacts(experts=experts))[0]
    assert fit.loads_as == name and kernel in " ".join(fit.limits), fit
    assert ("sm75" in fit.platforms) == scheme.startswith("NVFP4")
