"""Layers that qkit does not decode are said to be not looked at, with the reason."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from qkit.diagnosis.findings import FAULT
from qkit.workflows.doctor import diagnose

LINEARS = 14  # of two blocks


def bitsandbytes(name, w):
    """Codes of 4 bits as bitsandbytes stores them, with scales that are quantized again."""
    state = torch.zeros(80, dtype=torch.uint8)
    return {
        f"{name}.weight": torch.randint(0, 255, (w.numel() // 2, 1), dtype=torch.uint8),
        f"{name}.weight.absmax": torch.randint(0, 255, (w.numel() // 64,), dtype=torch.uint8),
        f"{name}.weight.nested_absmax": torch.rand(4),
        f"{name}.weight.quant_map": torch.rand(16),
        f"{name}.weight.quant_state.bitsandbytes__nf4": state,
    }


def exl3(name, w):
    return {
        f"{name}.trellis": torch.randint(-99, 99, (w.shape[1] // 16, w.shape[0] // 16, 64), dtype=torch.int16),
        f"{name}.suh": torch.rand(w.shape[1]).half(),
        f"{name}.svh": torch.rand(w.shape[0]).half(),
    }


def hqq(name, w):
    """Its scales may be anything: they say nothing of a fault."""
    return {
        f"{name}.W_q": torch.randint(0, 255, (w.numel() // 128, 64), dtype=torch.uint8),
        f"{name}.scale": -torch.rand(w.numel() // 64, 1).half(),
        f"{name}.zero": torch.rand(w.numel() // 64, 1).half(),
        f"{name}.shape": torch.tensor(w.shape),
    }


@pytest.fixture(params=[bitsandbytes, exl3, hqq], ids=lambda f: f.__name__)
def foreign(request, plain_model, tmp_path):
    """A folder in the names and types of another layout."""
    torch.manual_seed(0)
    folder = tmp_path / request.param.__name__
    shutil.copytree(plain_model, folder)
    tensors = {}
    for name, w in load_file(folder / "model.safetensors").items():
        tensors |= request.param(name.removesuffix(".weight"), w) if "_proj.weight" in name else {name: w}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": request.param.__name__}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_layers_of_an_unknown_layout(foreign, plain_model, tmp_path, run):
    code, out, _ = run("doctor", foreign, "--baseline", plain_model, "--json", tmp_path / "doctor.json")
    said = json.loads((tmp_path / "doctor.json").read_text())
    assert code == 0 and said["sound"] is False and "\nsound" not in out
    assert len(said["not_looked_at"]) == LINEARS and "model.layers.0.mlp.down_proj" in said["not_looked_at"]
    assert set(said["not_looked_at"].values()) == {f"qkit has no decoder for {foreign.name}"}
    assert [f for f in said["findings"] if f["level"] == "fault"] == [] and said["counts"]["fault"] == 0
    (warning,) = [f for f in said["findings"] if f["kind"] == "not looked at"]
    assert f"{LINEARS} of {LINEARS} quantized layers" in warning["found"] and len(warning["layers"]) == LINEARS
    assert said["verdict"] in out and "not known to be sound" in said["verdict"]
    assert [label for label in said["formats"] if "not looked at" not in label] == []


def test_codes_beside_layers_that_are_decoded(made, tmp_path):
    """What a known layout does not have is no plain weight."""
    copy = tmp_path / "copy"
    shutil.copytree(made("w4a16"), copy)
    tensors = load_file(copy / "model.safetensors")
    tensors["model.extra.trellis"] = torch.ones(8, 8, dtype=torch.int16)
    save_file(tensors, copy / "model.safetensors", {"format": "pt"})
    found = diagnose(copy)
    assert (
        list(found.unread) == ["model.extra.trellis"]
        and not found.sound
        and "I16" in found.unread["model.extra.trellis"]
    )


def test_a_layer_with_a_fault_is_not_looked_at(made, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(made("w4a16"), copy)
    tensors = load_file(copy / "model.safetensors")
    del tensors["model.layers.0.mlp.up_proj.weight_scale"]
    save_file(tensors, copy / "model.safetensors", {"format": "pt"})
    found = diagnose(copy)
    assert found.faulty and list(found.unread) == ["model.layers.0.mlp.up_proj"]
    assert [f for f in found.findings if f.level == FAULT]


def test_types_of_gguf_that_nothing_decodes(made, tmp_path):
    from seeded_gguf import gguf_type

    copy = tmp_path / "copy"
    shutil.copytree(made("q4_k"), copy)
    gguf_type("blk.0.ffn_down.weight", 41)(copy)  # Q1_0, smaller than what is there
    found = diagnose(copy)
    assert list(found.unread) == ["blk.0.ffn_down.weight"] and "Q1_0" in found.unread["blk.0.ffn_down.weight"]
    assert not found.sound
