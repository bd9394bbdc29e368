"""Text encoders of diffusion pipelines: quantized beside the transformer, and by themselves."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

pytest.importorskip("diffusers", reason="needs diffusers: pip install 'qkit[diffusion]'")
from tiny_dits import make_pipeline

import qkit
from qkit.diffusion.trajectory import sampling_of


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_pipeline(tmp_path_factory.mktemp("pipe") / "wan", steps=3)


def test_a_pipeline_with_its_text_encoder(run, source: Path, tmp_path: Path) -> None:
    """Both are packed, listed, proven and loaded, by diffusers too; what the encoder says is off by what its format is."""
    from diffusers import DiffusionPipeline
    from transformers import UMT5EncoderModel

    out = tmp_path / "out"
    code, _, err = run(
        "quantize", "--model", source, "--scheme", "w8a8", "--target", "text_encoder=w8a16", "--out", out
    )
    assert code == 0, err
    assert not (tmp_path / "out.job" / "components").exists()
    assert run("verify", out)[0] == 0 and run("verify", out / "text_encoder")[0] == 0
    listed = json.loads((out / "qkit.json").read_text())["files"]
    assert "text_encoder/qkit.json" in listed and "text_encoder/model.safetensors" in listed
    config = json.loads((out / "text_encoder" / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "qkit"
    ids = torch.arange(8)[None]
    pipes = [qkit.load(out, dtype=torch.float32), DiffusionPipeline.from_pretrained(out, dtype=torch.float32)]
    given = [p.text_encoder(ids).last_hidden_state for p in pipes]
    assert torch.equal(*given) and type(pipes[0].text_encoder).__name__ == "UMT5EncoderModel"
    original = UMT5EncoderModel.from_pretrained(source / "text_encoder", dtype=torch.float32)(ids).last_hidden_state
    assert 1e-4 < float((given[0] - original).norm() / original.norm()) < 0.03
    sampling = sampling_of(out, None, {})
    made = pipes[0](prompt=sampling.prompts[0], **sampling.call, output_type="latent").frames
    assert made.isfinite().all()
    # The same command again finds everything done; a scheme of the encoder that is another is another result.
    code, _, err = run(
        "quantize", "--model", source, "--scheme", "w8a8", "--target", "text_encoder=w8a16", "--out", out
    )
    assert code == 0, err
    code, _, err = run(
        "quantize", "--model", source, "--scheme", "w8a8", "--target", "text_encoder=w4a16", "--out", out
    )
    assert code == 2, err


def test_a_changed_encoder_is_noticed(run, source: Path, tmp_path: Path) -> None:
    from transformers import UMT5EncoderModel

    out, sharded = tmp_path / "out", tmp_path / "sharded"
    shutil.copytree(source, sharded)
    encoder = UMT5EncoderModel.from_pretrained(source / "text_encoder")
    (sharded / "text_encoder" / "model.safetensors").unlink()
    encoder.save_pretrained(sharded / "text_encoder", max_shard_size="8KB")
    assert len(list((sharded / "text_encoder").glob("model-*.safetensors"))) > 1
    assert (
        run("quantize", "--model", sharded, "--scheme", "w8a8", "--target", "text_encoder=w4a16", "--out", out)[0] == 0
    )
    assert not list((out / "text_encoder").glob("model-*"))  # the packed one takes the place of all files
    shutil.copyfile(source / "text_encoder" / "config.json", out / "text_encoder" / "config.json")
    code, _, err = run("verify", out)
    assert code != 0 and "text_encoder/config.json" in err


def test_bad_input_of_text_encoders(run, source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    for given, code, said in (
        (
            ("--model", source, "--scheme", "w8a8", "--target", "text_encoder_2=w8a8"),
            2,
            "no text encoder 'text_encoder_2'",
        ),
        (("--model", source, "--scheme", "w8a8", "--target", "vae=w8a8"), 2, "expected one of text_encoder"),
        (("--model", source, "--scheme", "w8a8", "--target", "text_encoder=w9"), 2, "w9"),
        (("--model", source, "--scheme", "w8a8", "--target", "text_encoder=nvfp4"), 3, "without calibration"),
        (("--model", source / "text_encoder", "--scheme", "w4a16", "--method", "gptq"), 3, "without calibration"),
        (
            ("--model", source / "text_encoder", "--scheme", "w4a16", "--export", "compressed-tensors"),
            3,
            "leave the option out",
        ),
        (
            ("--model", source / "transformer", "--scheme", "w8a8", "--target", "text_encoder=w8a8"),
            2,
            "no text encoder",
        ),
    ):
        found, _, err = run("quantize", *given, "--out", out)
        assert found == code and said in err and len(err.strip().splitlines()) == 1, (given, err)
        assert not out.exists()
