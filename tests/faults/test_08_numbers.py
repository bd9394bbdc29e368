"""Weights and inputs at the edges of what numbers can hold: one sentence, or a sound result, and a job folder that goes on."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from conftest import Quiet
from safetensors.torch import load_file, save_file

import qkit.solvers.gptq
from qkit.engine.job import Job
from qkit.errors import NumericFailure
from qkit.workflows.quantize import Request, quantize

DOWN = "model.layers.0.mlp.down_proj"


@pytest.fixture
def changed(tiny, calib, tmp_path):
    """``changed(edit, scheme, method, dtype)``: the request for a copy of a tiny Llama whose tensors were edited."""

    def make(edit, scheme: str, method: str, dtype: torch.dtype = torch.bfloat16) -> Request:
        model = tmp_path / "model"
        shutil.copytree(tiny("llama", dtype), model)
        tensors = load_file(model / "model.safetensors")
        edit(tensors)
        save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
        group = 32 if scheme.startswith("w4") else None
        return Request(
            model=str(model),
            scheme=scheme,
            method=method,
            group_size=group,
            calib=calib,
            samples=8,
            seqlen=32,
            threads=1,
        )

    return make


def put(value: float):
    def edit(tensors):
        tensors[f"{DOWN}.weight"][3, 5] = value

    return edit


@pytest.mark.parametrize("value", [1e30, -3e38])
@pytest.mark.parametrize(
    "scheme,method", [("w4a16", "rtn"), ("w4a16", "gptq"), ("nvfp4", "rtn"), ("fp8_dynamic", "rtn")]
)
def test_a_huge_weight_is_one_sentence_and_the_job_goes_on(value, scheme, method, changed, tmp_path):
    request = changed(put(value), scheme, method)
    for _ in range(2):  # the second time it is the same sentence, and not a damaged folder
        with pytest.raises(
            NumericFailure, match=rf"{DOWN}: its largest weight is (1e\+30|3e\+38|2\.99e\+38), expected"
        ):
            quantize(request, tmp_path / "out", Quiet())
    put(0.5)(tensors := load_file(tmp_path / "model" / "model.safetensors"))
    save_file(tensors, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    assert quantize(request, tmp_path / "out", Quiet()).ok


def test_a_layer_with_a_huge_weight_can_be_left_as_it_is(changed, tmp_path):
    rule = {"match": "*.layers.0.mlp.down_proj", "skip": "it has a weight of 1e30"}
    assert quantize(replace(changed(put(1e30), "w4a16", "rtn"), rules=(rule,)), tmp_path / "out", Quiet()).ok


@pytest.mark.parametrize("scheme", ["w4a16", "w8a8", "nvfp4", "fp8"])
def test_a_large_weight_is_quantized(scheme, changed, tmp_path):
    assert quantize(changed(put(1e15), scheme, "rtn"), tmp_path / "out", Quiet()).ok


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_the_journal_never_holds_what_is_not_finite(value, tmp_path):
    linear = {"x": {"error": value, "baseline_error": 0.0}}
    for entry in ({"linears": linear}, {"linears": {}, "block_error": [0.5, value]}):
        with Job.open(tmp_path / "job", {"plan": 1}) as job, pytest.raises(NumericFailure, match="finite"):
            job.commit(0, {}, entry, None)
        with Job.open(tmp_path / "job", {"plan": 1}) as job:
            assert job.finished == 0


def zero(tensors) -> None:
    tensors["model.layers.0.mlp.up_proj.weight"].zero_()


@pytest.mark.parametrize("method", ["gptq", "awq+gptq", "smoothquant+gptq", "signround"])
def test_inputs_that_are_all_zero_are_no_failure(method, changed, tmp_path):
    """One of 14 linears is more than may fall back; here rounding is as good as anything."""
    assert quantize(changed(zero, "w4a16", method), tmp_path / "out", Quiet()).ok


@pytest.mark.parametrize(
    ("dtype", "scheme", "name"),
    [
        (torch.float16, "fp8", "input_scale"),
        (torch.bfloat16, "fp8", "input_scale"),
        (torch.float16, "nvfp4", "input_global_scale"),
    ],
)
def test_the_static_scale_of_zeros_is_one(dtype, scheme, name, changed, tmp_path):
    """With a scale as small as what was seen, any other input would saturate."""
    assert quantize(changed(zero, scheme, "gptq", dtype), tmp_path / "out", Quiet()).ok
    assert load_file(tmp_path / "out" / "model.safetensors")[f"{DOWN}.{name}"].item() == 1.0
    record = json.loads((tmp_path / "out" / "qkit.json").read_text())["linears"][DOWN]
    assert record["fallback"] == "its inputs are all zero"


def test_static_scales_do_not_underflow_in_fp16(changed, tmp_path):
    """Inputs near 1e-6 have a scale of 2e-9, which fp16 does not hold."""

    def tiny_inputs(tensors) -> None:
        tensors["model.layers.0.mlp.up_proj.weight"].mul_(2e-3)
        tensors["model.layers.0.mlp.gate_proj.weight"].mul_(2e-3)

    assert quantize(changed(tiny_inputs, "fp8", "rtn", torch.float16), tmp_path / "out", Quiet()).ok
    scale = load_file(tmp_path / "out" / "model.safetensors")[f"{DOWN}.input_scale"]
    assert scale.dtype == torch.float16 and scale.item() == 2**-24  # the least that is above 0
    record = json.loads((tmp_path / "out" / "qkit.json").read_text())["linears"][DOWN]
    assert record["error"] < 0.01


def test_too_many_fallbacks_end_the_run(changed, tmp_path, monkeypatch):
    """2 of 14 linears are more than may be rounded instead of solved."""
    real = qkit.solvers.gptq.factorize

    def factorize(hessian, damp):
        return (None, "the Hessian is not finite") if len(hessian) != 64 else real(hessian, damp)

    monkeypatch.setattr(qkit.solvers.gptq, "factorize", factorize)
    with pytest.raises(NumericFailure, match=r"2 of 14 linears fell back.*down_proj \(the Hessian is not finite.*"):
        quantize(changed(put(0.5), "w4a16", "gptq"), tmp_path / "out", Quiet())
    assert not (tmp_path / "out").exists() and len(list((tmp_path / "out.job" / "parts").iterdir())) == 2
