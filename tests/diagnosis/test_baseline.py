"""The file against the original: what rounding explains is sound, real drift and another model are found."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from seeded_gguf import gguf_scale

from qkit.diagnosis.findings import FAULT, NOTE, WARNING
from qkit.diagnosis.rounding import gguf_format, rounding_error
from qkit.workflows.api import quantize
from qkit.workflows.doctor import diagnose

CALIBRATION = {"samples": 4, "seqlen": 32}


def changed(model, to, change):
    """A copy of a model with every weight changed. change: (name, weight, generator) -> weight"""
    shutil.copytree(model, to)
    g = torch.Generator().manual_seed(1)
    tensors = load_file(to / "model.safetensors")
    tensors = {name: change(name, w.float(), g).to(w.dtype) for name, w in tensors.items()}
    save_file(tensors, to / "model.safetensors", {"format": "pt"})
    return to


def with_noise(share):
    """Matrices as another fine-tune has them: near those of the original."""

    def change(name, w, g):
        return w + share * w.std() * torch.randn(w.shape, generator=g) if w.dim() == 2 else w

    return change


def kinds(found, level=FAULT):
    return [f.kind for f in found.findings if f.level == level]


@pytest.mark.parametrize("options", [{}, {"method": "gptq", **CALIBRATION}], ids=["rtn", "gptq"])
@pytest.mark.parametrize("scheme", ["q2_k", "q4_k", "q4_0", "gguf_nvfp4"])
def test_types_of_gguf_are_judged_by_rounding_to_them(scheme, options, made, plain_model):
    found = diagnose(made(scheme, **options), plain_model)
    assert [f for f in found.findings if f.level != NOTE] == [] and len(found.drift) > 14
    packed = [line for line in found.drift if "_proj" in line["layer"]]
    assert all(0.4 < line["error"] / line["explained"] < 2.5 for line in packed)


@pytest.mark.parametrize(
    ("dtype", "error"), [("Q8_0", 0.006), ("Q4_K", 0.08), ("IQ4_XS", 0.08), ("MXFP4", 0.12), ("Q2_K", 0.33)]
)
def test_what_rounding_explains(dtype, error):
    """Of normal weights, within a quarter of values that llama.cpp's types are known for."""
    w = torch.randn(64, 512, generator=torch.Generator().manual_seed(0))
    assert rounding_error(w, gguf_format(dtype)) == pytest.approx(error, rel=0.25)


def test_types_that_qkit_does_not_round_to_are_judged_by_a_near_one():
    assert gguf_format("IQ2_XXS").name == "q2_k" and gguf_format("IQ3_S").name == "q3_k"
    assert gguf_format("NVFP4").name == "gguf_nvfp4"


def test_drift_of_one_layer_of_gguf(made, plain_model, tmp_path):
    """A quarter of the limit that constants by bits would give."""
    copy = tmp_path / "copy"
    shutil.copytree(made("q8_0"), copy)
    base = changed(
        plain_model, tmp_path / "base", lambda name, w, g: with_noise(0.05)(name, w, g) if "1.mlp.up" in name else w
    )
    (fault,) = [f for f in diagnose(copy, base).findings if f.level == FAULT]
    assert fault.kind == "drift" and fault.layers == ("model.layers.1.mlp.up_proj.weight",)


def test_a_gguf_layer_that_is_twice_as_large(made, plain_model, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(made("q2_k"), copy)
    gguf_scale("blk.0.attn_v.weight", None)(copy)
    assert "drift" in kinds(diagnose(copy, plain_model))


@pytest.mark.parametrize("scheme", ["w4a16", "q4_k"])
def test_another_model_of_the_same_sizes(scheme, made, plain_model, tmp_path, run):
    def unrelated(name, w, g):
        return w.std() * torch.randn(w.shape, generator=g) if w.dim() == 2 else w

    base = changed(plain_model, tmp_path / "base", unrelated)
    code, _, err = run("doctor", made(scheme), "--baseline", base, "--json", tmp_path / "doctor.json")
    said = json.loads((tmp_path / "doctor.json").read_text())
    assert code == 4 and "this is not the model that the file was made from" in err
    assert said["counts"] == {"fault": 1, "warning": 0, "note": said["counts"]["note"]}
    assert "nothing in common" in said["findings"][0]["found"]


@pytest.mark.parametrize("scheme", ["w4a16", "q4_k"])
def test_another_fine_tune(scheme, made, plain_model, tmp_path):
    found = diagnose(made(scheme), changed(plain_model, tmp_path / "base", with_noise(0.6)))
    assert kinds(found) == ["baseline"]
    assert "not the model" in found.findings[0].found and "fine-tune" in found.findings[0].found


def test_norms_of_another_model_are_one_finding(made, plain_model, tmp_path):
    base = changed(
        plain_model,
        tmp_path / "base",
        lambda name, w, g: w * (1 + 0.2 * torch.randn(w.shape, generator=g)) if w.dim() == 1 else w,
    )
    (fault,) = [f for f in diagnose(made("w4a16"), base).findings if f.level == FAULT]
    assert fault.kind == "norms" and len(fault.layers) == 5 and "fine-tune" in fault.found


def test_a_rotated_file_is_a_warning(made, plain_model, tmp_path):
    """Rows of the embeddings keep their sizes under a rotation of their columns."""
    q, _ = torch.linalg.qr(torch.randn(256, 256, generator=torch.Generator().manual_seed(3)))

    def rotated(name, w, g):
        if w.dim() < 2:
            return w
        return q.T @ w if name.endswith(("o_proj.weight", "down_proj.weight")) else w @ q

    found = diagnose(made("w4a16"), changed(plain_model, tmp_path / "base", rotated))
    assert kinds(found) == [] and kinds(found, WARNING) == ["baseline"]
    assert "rotated" in found.findings[0].advice


@pytest.mark.parametrize("spread", [0.1, 0.4])
def test_a_fold_that_the_error_of_rounding_hides_is_no_fault_and_a_norm_alone_is_one(
    spread, made, plain_model, tmp_path
):
    """Of a norm and of the columns behind it. The file is made from the folded model."""
    factors = torch.exp(spread * torch.randn(256, generator=torch.Generator().manual_seed(4)))
    norm, behind = "layers.1.input_layernorm", ("1.self_attn.q_proj", "1.self_attn.k_proj", "1.self_attn.v_proj")

    def folded(name, w, g):
        return w * factors if any(x in name for x in behind) else w / factors if norm in name else w

    source = changed(plain_model, tmp_path / "folded", folded)
    quantize(model=str(source), scheme="w4a16", out=str(tmp_path / "out"), group_size=32)
    assert kinds(diagnose(tmp_path / "out", plain_model)) == []
    alone = changed(plain_model, tmp_path / "alone", lambda name, w, g: w / factors if norm in name else w)
    assert kinds(diagnose(made("w4a16", group_size=32), alone)) == ["norms"]


@pytest.mark.parametrize("scheme", ["w4a16", "q4_k"])
def test_a_baseline_that_is_quantized_itself_is_told(scheme, made):
    found = diagnose(made(scheme), made("w8a8"))
    assert [f.layers for f in found.findings if f.level == WARNING and f.kind == "baseline"] == [(str(made("w8a8")),)]
    assert kinds(found) == []
