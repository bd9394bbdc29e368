"""Experts of models that nobody declared, as the file has them: in towers, of two kinds, stacked under other names."""

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import Step3p7ForConditionalGeneration

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


def test_stacked_experts_under_other_names_in_the_file_are_rounded_as_each_loader_multiplies_by_them(tmp_path):
    source, out = sweep_configs.save("image-text", "step3p7", tmp_path / "source"), tmp_path / "out"
    qkit.quantize(source, out=out, scheme="w4a16", method="rtn")
    names = [n for n in json.loads((out / "qkit.json").read_text())["linears"] if ".experts." in n]
    assert len(names) == 8
    packed = qkit.load(out, torch.float32)
    stock, missed = Step3p7ForConditionalGeneration.from_pretrained(out, dtype=torch.float32, output_loading_info=True)
    assert not any(missed.values())
    expected = Step3p7ForConditionalGeneration.from_pretrained(source, dtype=torch.float32)
    tokens = torch.arange(3, 15)[None]
    with torch.inference_mode():
        original = expected.eval()(input_ids=tokens).logits
        for name, module in expected.named_modules():
            found = packed.get_submodule(name) if name in dict(packed.named_modules()) else None
            for leaf, p in module.named_parameters(recurse=False):
                p.copy_(getattr(found, leaf))
        wanted = expected(input_ids=tokens).logits
        assert torch.equal(packed(input_ids=tokens).logits, wanted)
        assert torch.equal(stock.eval()(input_ids=tokens).logits, wanted)
    assert (original - wanted).abs().max() > 0.1
    weight = expected.model.language_model.layers[2].mlp.experts.gate_up_proj
    stored = load_file(source / "model.safetensors")
    parts = [stored[f"model.layers.2.moe.{half}_proj.weight"].float() for half in ("gate", "up")]
    error = (weight - torch.cat(parts, 1)).norm() / weight.norm()
    assert error < 0.2  # each expert's matrix in its place
