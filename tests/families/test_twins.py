"""An encoder and a decoder of the same weights, which the file has once: they are rounded once, and both get them."""

import json
import sys
from pathlib import Path

import pytest
import torch
from transformers import DiffusionGemmaForBlockDiffusion

import qkit
from qkit.errors import Unsupported

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))

import sweep_configs

INPUTS = {"input_ids": torch.arange(3, 15)[None], "decoder_input_ids": torch.arange(5, 13)[None]}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return sweep_configs.save("image-text", "diffusion_gemma", tmp_path_factory.mktemp("twins") / "source")


def test_what_a_decoder_shares_with_an_encoder_is_quantized_once_and_loaded_for_both(source, tmp_path):
    out = tmp_path / "out"
    qkit.quantize(source, out=out, scheme="w4a16", method="rtn")
    record = json.loads((out / "qkit.json").read_text())
    assert "model.decoder.layers.0.experts.0.down_proj" in record["linears"]
    assert not any("encoder.language_model" in name for name in (*record["linears"], *record["skipped"]))
    packed = qkit.load(out, torch.float32)
    expected = DiffusionGemmaForBlockDiffusion.from_pretrained(source, dtype=torch.float32).eval()
    with torch.inference_mode():
        original = expected(**INPUTS).logits
        for i, block in enumerate(packed.model.decoder.layers):
            twin = packed.model.encoder.language_model.layers[i]
            assert block.mlp.up_proj is twin.mlp.up_proj
            assert block.input_layernorm.weight is twin.input_layernorm.weight
            experts = expected.model.decoder.layers[i].experts  # tied to those of the encoder
            for e, expert in enumerate(block.experts.experts):
                experts.gate_up_proj[e] = torch.cat([x.weight for x in expert["first"]])
                experts.down_proj[e] = expert["down"].weight
            for name, module in block.named_modules():
                if type(module).__name__ == "QuantLinear" and "experts" not in name:
                    expected.model.decoder.layers[i].get_submodule(name).weight.copy_(module.weight)
        for name, module in packed.model.encoder.vision_tower.named_modules():
            if type(module).__name__ == "QuantLinear":
                expected.model.encoder.vision_tower.get_submodule(name).weight.copy_(module.weight)
        found, wanted = packed(**INPUTS).logits, expected(**INPUTS).logits
    assert (found - wanted).abs().max() < 1e-3 < (original - wanted).abs().max()


def test_what_two_blocks_of_the_same_weights_read_is_not_measured_as_if_it_were_one(source, tmp_path):
    with pytest.raises(
        Unsupported, match=r"decoder\.layers\.0 and .*encoder.* have the same weights .* use method rtn"
    ):
        qkit.quantize(source, out=tmp_path / "out", scheme="w4a16", method="gptq")
