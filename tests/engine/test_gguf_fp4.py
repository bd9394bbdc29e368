"""MXFP4 and NVFP4 as types of GGUF: packed as ggml has them, proved, loaded, and run by llama.cpp where one is named."""

import in_llama_cpp
import numpy as np
import pytest
import tiny_models
import torch
from conftest import Quiet

import qkit
from qkit.errors import Unsupported, UsageError
from qkit.files.gguf_container import MODEL
from qkit.tensor.formats import GGUF_FORMATS, fit_gguf, scheme
from qkit.tensor.gguf_blocks import pack, scale_of_tensor
from qkit.tensor.qtensor import dequantize, find_params, quantize
from qkit.verification.gguf_blocks import decode_blocks
from qkit.verification.gguf_header import read_gguf
from qkit.verification.verify import verify
from qkit.workflows.quantize import Request, prepare
from qkit.workflows.quantize import quantize as run_quantize

gguf = pytest.importorskip("gguf", reason="the gguf package is not installed: pip install 'qkit[gguf]'")
NAMES = ("gguf_mxfp4", "gguf_nvfp4")
UP = "model.layers.0.mlp.up_proj"


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("size", [1e-6, 0.05, 300.0], ids=["tiny", "usual", "large"])
def test_blocks_are_those_of_ggml(name, size):
    fmt = GGUF_FORMATS[name]
    torch.manual_seed(1)
    weight = torch.randn(7, 128) * size
    weight[2, :64], weight[3, 5] = 0.0, -1e-9 * size
    q = quantize(weight, find_params(weight, fmt, torch.float32, search=True), fmt)
    raw, wanted = pack(q).numpy(), dequantize(q).numpy()
    scale = np.float32(float(scale_of_tensor(q))) if name == "gguf_nvfp4" else np.float32(1)
    own = decode_blocks(fmt.ggml, raw, 128) * scale
    theirs = gguf.quants.dequantize(raw, gguf.GGMLQuantizationType[fmt.ggml]) * scale
    assert np.array_equal(own.view(np.int32), wanted.view(np.int32))  # the sign of zero, too
    assert np.array_equal(theirs, wanted)
    assert float((torch.from_numpy(wanted) - weight).norm() / weight.norm()) < 0.14


def test_a_search_of_scales_errs_less():
    fmt = GGUF_FORMATS["gguf_mxfp4"]
    torch.manual_seed(2)
    weight = torch.randn(64, 128)
    errors = []
    for search in (True, False):
        q = quantize(weight, find_params(weight, fmt, torch.float32, search=search), fmt)
        errors.append(float((dequantize(q) - weight).square().sum()))
    assert errors[0] < errors[1]


def test_names_and_widths():
    assert scheme("GGUF_NVFP4").weights.ggml == "NVFP4" and not scheme("nvfp4").weights.gguf
    assert fit_gguf(GGUF_FORMATS["gguf_nvfp4"], 96) == GGUF_FORMATS["gguf_mxfp4"]
    assert fit_gguf(GGUF_FORMATS["gguf_nvfp4"], 576) == GGUF_FORMATS["gguf_nvfp4"]


@pytest.fixture(scope="module", params=NAMES)
def made(request, tiny, calib, tmp_path_factory):
    """(scheme, source, result), with gptq"""
    source, out = tiny("llama", hidden_size=64, intermediate_size=128), tmp_path_factory.mktemp("out") / "out"
    asked = Request(
        model=str(source), scheme=request.param, method="gptq", calib=calib, samples=4, seqlen=32, threads=1
    )
    report = run_quantize(asked, out, Quiet())
    assert report.ok and report.bytes == (out / MODEL).stat().st_size == prepare(asked).plan.packed_bytes
    return request.param, source, out


def test_a_result_loads_with_the_numbers_of_the_file(made):
    name, source, out = made
    file = read_gguf(out / MODEL)
    kinds = {t.dtype for n, t in file.tensors.items() if n.startswith("blk.") and len(t.shape) == 2}
    assert kinds == {GGUF_FORMATS[name].ggml}
    scales = [n for n in file.tensors if n.endswith(".scale")]
    assert len(scales) == (14 if name == "gguf_nvfp4" else 0)
    loaded, original = qkit.load(out, dtype=torch.float32), qkit.load(source, dtype=torch.float32)
    weight, before = (m.get_submodule(UP).weight.detach() for m in (loaded, original))
    assert 0 < float((weight - before).norm() / before.norm()) < 0.2


@pytest.mark.parametrize("place", ["block", "scale"])
def test_a_changed_byte_is_found(made, tmp_path, place):
    name, _, out = made
    if place == "scale" and name != "gguf_nvfp4":
        pytest.skip("has no scale of the tensor")
    file = read_gguf(out / MODEL)
    raw = bytearray((out / MODEL).read_bytes())
    raw[
        file.tensors[f"blk.0.ffn_up.{'scale' if place == 'scale' else 'weight'}"].start + (2 if place == "scale" else 8)
    ] ^= 16
    before = (out / MODEL).read_bytes()
    try:
        (out / MODEL).write_bytes(raw)
        problems = [str(p) for p in verify(out).problems]
    finally:
        (out / MODEL).write_bytes(before)
    assert any("the decoded weight is not" in p and UP in p for p in problems)


def test_nvfp4_is_for_architectures_that_multiply_with_its_scales(tiny):
    with pytest.raises(Unsupported, match="leaves out the scale of a tensor in parts of qwen2"):
        prepare(Request(model=str(tiny("qwen2", hidden_size=64)), scheme="gguf_nvfp4"))
    assert prepare(Request(model=str(tiny("qwen2", hidden_size=64)), scheme="gguf_mxfp4")).plan.linears


def test_doctor_decodes_with_the_scale_of_the_tensor(tiny, tmp_path, quiet):
    from qkit.workflows.doctor import diagnose

    run_quantize(Request(model=str(tiny("llama", hidden_size=64)), scheme="gguf_nvfp4"), tmp_path / "out", quiet)
    assert [f for f in diagnose(tmp_path / "out", None, None).findings if f.level == "fault"] == []


def test_embeddings_get_no_nvfp4(tiny):
    with pytest.raises(UsageError, match="looks up rows without the scale of the tensor"):
        prepare(Request(model=str(tiny("llama")), scheme="gguf_nvfp4", embeddings="gguf_nvfp4"))
    plan = prepare(Request(model=str(tiny("llama", hidden_size=64)), scheme="gguf_nvfp4")).plan
    assert {p.scheme for p in plan.ends.values()} == {"Q8_0"}


@in_llama_cpp.needed
def test_llama_cpp_computes_what_qkit_computes(made, tmp_path):
    _, _, out = made
    # llama.cpp rounds inputs to 8 bits; a scale that it does not apply makes an error of order one.
    assert in_llama_cpp.error(*in_llama_cpp.likelihoods(out, tiny_models.tokens(2, 48), tmp_path)) < 0.05
