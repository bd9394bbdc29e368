"""Towers of models that nobody declared: experts in them, which their checkpoint stores one by one."""

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file

import qkit
from qkit.files.embedded import embedded_text

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))

import sweep_configs


def test_experts_in_a_tower_are_copied_quantized_and_loaded(tmp_path):
    source = sweep_configs.save("image-text", "dots3_note", tmp_path / "source")
    stored = load_file(source / "model.safetensors")
    name = "vision_encoder.blocks.1.mlp.experts.2.fc2"
    for target, packed in (("skip", False), ("w4a16", True)):
        out = tmp_path / target
        qkit.quantize(source, out=out, scheme="w4a16", method="rtn", targets={"vision": target})
        assert (name in json.loads((out / "qkit.json").read_text())["linears"]) is packed
        experts = qkit.load(out, torch.float32).model.vision_tower.blocks[1].mlp.experts
        if not packed:
            assert torch.equal(experts.down_proj[2], stored[f"{name}.weight"].float())


def test_two_sets_of_experts_in_a_block_have_inputs_of_their_own(tmp_path):
    source = sweep_configs.save("image-text", "ernie4_5_vl_moe", tmp_path / "source")
    text = embedded_text("calibration")
    qkit.quantize(source, out=tmp_path / "out", scheme="w4a16", method="gptq", samples=2, seqlen=32, calib=text)
    linears = json.loads((tmp_path / "out/qkit.json").read_text())["linears"]
    shapes = {linears[f"model.layers.1.mlp.{kind}_moe.experts.0.down_proj"]["shape"][1] for kind in ("text", "vision")}
    assert shapes == {128, 64}
    mlp = qkit.load(tmp_path / "out", torch.float32).model.language_model.layers[1].mlp
    assert len(mlp.text_moe.experts.experts) == len(mlp.vision_moe.experts.experts) == 4
