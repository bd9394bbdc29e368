"""Paths that hold nothing to diagnose: one sentence each, and exit code 3."""

import json
import shutil

import pytest
import tiny_models
from safetensors.torch import load_file, save_file

from qkit.files.embedded import reference_models


def refused(run, *asked: object) -> str:
    """The sentence of a refusal, which is all that is printed."""
    code, out, err = run("doctor", *asked)
    assert code == 3 and out == "" and err.startswith("qkit: ") and len(err.strip().splitlines()) == 1
    assert "Error" not in err and "outgoing traffic" not in err
    return err


def test_a_path_that_does_not_exist(tmp_path, run):
    assert "no such file or folder" in refused(run, tmp_path / "no")


def test_a_name_that_is_not_in_the_cache(tmp_path, run, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert "hf download owner/other" in refused(run, "owner/other")


def test_a_folder_without_weights(tmp_path, run):
    assert "no weights" in refused(run, tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    assert "pytorch_model.bin" in refused(run, tmp_path)


def test_a_file_of_another_kind(tmp_path, run):
    (tmp_path / "notes.txt").write_text("text")
    assert "no weight file" in refused(run, tmp_path / "notes.txt")


def test_a_model_that_is_not_quantized(plain_model, run):
    assert "nothing in it is quantized" in refused(run, plain_model)


def test_an_adapter(tmp_path, run):
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    (tmp_path / "adapter_model.safetensors").write_bytes(b"")
    assert "adapter (LoRA)" in refused(run, tmp_path)


def test_a_pipeline(plain_model, tmp_path, run):
    (tmp_path / "model_index.json").write_text('{"_class_name": "WanPipeline"}')
    assert "get the complete folder" in refused(run, tmp_path)
    shutil.copytree(plain_model, tmp_path / "transformer")
    assert f"give one of its components: {tmp_path / 'transformer'}" in refused(run, tmp_path)


@pytest.mark.parametrize("scheme", ["w4a16", "q4_k"])
def test_a_baseline_of_other_sizes(scheme, made, run):
    other = reference_models()["tiny-llama"]
    said = refused(run, made(scheme), "--baseline", other)
    assert "it is not the model that" in said and "other shapes" in said and str(other) in said


@pytest.mark.parametrize("scheme", ["w4a16", "q4_k"])
def test_a_baseline_of_another_architecture(scheme, made, tmp_path, run):
    said = refused(run, made(scheme), "--baseline", tiny_models.make("gpt_neox", tmp_path / "neox"))
    assert "it is not the model that" in said


def test_a_baseline_that_is_a_gguf_file(made, run):
    assert "model.gguf" in refused(run, made("w4a16"), "--baseline", made("q4_k") / "model.gguf")


def test_a_weight_file_stands_for_its_folder(made, run):
    code, out, _ = run("doctor", made("w4a16") / "model.safetensors")
    assert code == 0 and "sound" in out


def test_a_gguf_file_under_another_name(made, tmp_path, run):
    shutil.copy(made("q4_k") / "model.gguf", tmp_path / "sha256-0")
    code, out, _ = run("doctor", tmp_path / "sha256-0")
    assert code == 0 and "Q4_K" in out


def test_the_json_file_has_what_is_printed(made, tmp_path, run):
    """Also where there is a fault, which is exit code 4."""
    copy = tmp_path / "copy"
    shutil.copytree(made("w4a16"), copy)
    tensors = load_file(copy / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight_scale"][0, 0] = float("nan")
    save_file(tensors, copy / "model.safetensors", {"format": "pt"})
    code, out, err = run("doctor", copy, "--engine", "vllm", "--json", tmp_path / "doctor.json")
    said = json.loads((tmp_path / "doctor.json").read_text())
    assert code == 4 and "NaN" in err and said["verdict"] in out and said["sound"] is False
    assert said["path"] in out and said["made_by"] in out
    assert said["counts"]["fault"] == 3  # the scale, its layer and the file
    for finding in said["findings"]:
        assert f"{finding['level']}: {finding['kind']}" in out and finding["found"] in out and finding["advice"] in out
    assert said["engine_answers"] and all(f"engine: {answer}" in out for answer in said["engine_answers"])
    assert "of the format, whatever is wrong with this file:\nengine: " in out
    assert "whatever is wrong" not in run("doctor", made("w4a16"), "--engine", "vllm")[1]
    assert all(label in out for label in said["formats"])
    assert run("doctor", copy, "--engine", "tensorrt")[0] == 2
