"""GGUF beyond Llama: stacks of experts, shifted norms, transposed and split tensors, and no code of a model's folder."""

import json
import shutil
from pathlib import Path

import in_llama_cpp
import numpy as np
import pytest
import tiny_models
import torch
from conftest import Quiet

from qkit.errors import Unsupported, UsageError
from qkit.families.structure import ModelStructure
from qkit.files.checkpoint import Checkpoint
from qkit.files.gguf_container import MODEL
from qkit.files.gguf_places import MINUS_EXP, read_place
from qkit.verification.gguf_header import read_gguf
from qkit.verification.verify import verify
from qkit.workflows.quantize import Request, prepare
from qkit.workflows.quantize import quantize as run_quantize

pytest.importorskip("conversion", reason="llama.cpp's converter is not installed: pip install 'qkit[gguf]'")
# Options with which llama.cpp computes what transformers does, and widths that 32 divides.
OPTIONS = {
    "gemma3": {"query_pre_attn_scalar": 16, "layer_types": ["sliding_attention"] * 2, "sliding_window": 32},
    "qwen3_moe": {"norm_topk_prob": True},
    "mixtral": {},
    "gpt_neox": {"intermediate_size": 256},
    "phi3": {},
}
ROUTED = ("qwen3_moe", "mixtral")  # to experts


def _made(model: Path, out: Path, scheme: str = "q4_0", **fields: object) -> Path:
    assert run_quantize(Request(model=str(model), scheme=scheme, **fields), out, Quiet()).ok
    return out


def _places(out: Path) -> dict:
    return json.loads((out / "config.json").read_text())["quantization_config"]["tensors"]


def test_a_norm_that_the_file_has_shifted_is_read_back(tiny, tmp_path):
    source = tiny("gemma3", **OPTIONS["gemma3"])
    out = _made(source, tmp_path / "out")
    name = "model.layers.1.input_layernorm.weight"
    place = read_place(_places(out)[name])
    assert place is not None and place.change == 1.0
    stored = read_gguf(out / MODEL).tensors["blk.1.attn_norm.weight"].float32()
    original = Checkpoint.open(source).read(name).float()
    assert torch.equal(torch.from_numpy(stored.copy()), original + 1)
    assert torch.allclose(Checkpoint.open(out).read(name), original, rtol=0, atol=1e-6)


def test_experts_are_one_tensor_and_each_is_read_from_its_rows(tiny, tmp_path):
    source = tiny("mixtral")
    out = _made(source, tmp_path / "out", "q8_0")
    stack = read_gguf(out / MODEL).tensors["blk.1.ffn_down_exps.weight"]
    assert (stack.dtype, stack.shape) == ("Q8_0", (4, 64, 96))
    names = sorted(n for n, e in _places(out).items() if e[1][0][0] == "blk.1.ffn_down_exps.weight")
    original, loaded = Checkpoint.open(source), Checkpoint.open(out)
    for i, name in enumerate(names):
        assert _places(out)[name][1] == [["blk.1.ffn_down_exps.weight", [64 * i, 64, 1]]]
        found, wanted = loaded.read(name), original.read(name).float()
        assert 0 < float((found - wanted).norm() / wanted.norm()) < 0.01  # Q8_0 of this expert, and of no other
    assert verify(out).problems == []


def test_experts_of_one_tensor_with_two_types_are_refused(tiny):
    rules = {"model.layers.0.*experts.1.*": "q8_0"}
    recipe = {"rules": [{"match": match, "scheme": kind} for match, kind in rules.items()]}
    with pytest.raises(UsageError, match=r"in one tensor, blk\.0\.ffn_"):
        prepare(Request(model=str(tiny("mixtral")), scheme="q4_0", **recipe))


def test_two_rows_exchanged_in_the_file_or_in_the_places_are_found(tiny, tmp_path):
    out = _made(tiny("gpt_neox", **OPTIONS["gpt_neox"]), tmp_path / "out", "q8_0")
    name = "gpt_neox.layers.0.attention.query_key_value.weight"
    config = json.loads((out / "config.json").read_text())
    numbers = config["quantization_config"]["tensors"][name][1][0][1]
    assert len(numbers) > 3  # heads by heads
    numbers[0], numbers[3] = numbers[3], numbers[0]
    (out / "config.json").write_text(json.dumps(config))
    assert any("decoded weight" in str(p) for p in verify(out).problems)


def test_places_that_take_rows_twice_or_outside_the_file_are_found(tiny, tmp_path):
    out = _made(tiny("llama"), tmp_path / "out", "q8_0")
    config = json.loads((out / "config.json").read_text())
    places = config["quantization_config"]["tensors"]
    places["model.layers.0.mlp.up_proj.weight"] = places["model.layers.0.mlp.gate_proj.weight"]
    places["model.layers.1.mlp.up_proj.weight"][1][0][1] = [1, 96, 1]
    (out / "config.json").write_text(json.dumps(config))
    problems = [str(p) for p in verify(out).problems]
    assert any("two tensors have the same row" in p for p in problems)
    assert any("names rows that are not in the file" in p for p in problems)


def test_no_code_of_a_folder_is_imported(tiny, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(tiny("llama"), folder)
    mark = tmp_path / "imported"
    (folder / "code.py").write_text(f"open({str(mark)!r}, 'w')\nTokenizer = Config = None\n")
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings["auto_map"] = {"AutoTokenizer": ["code.Tokenizer", None]}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    assert ModelStructure(Checkpoint.open(folder)).gguf.fields["tokenizer.ggml.pre"] == "gpt-2"
    assert not mark.exists()


@pytest.mark.parametrize(
    ("family", "changes", "words"),
    [
        ("gemma3", {"query_pre_attn_scalar": 256}, "query_pre_attn_scalar 256, and llama.cpp has 16"),
        ("gemma3", {**OPTIONS["gemma3"], "layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
        ("qwen3_moe", {"norm_topk_prob": False}, "norm_topk_prob False"),
        ("gpt_neox", {}, None),
    ],
    ids=["scale", "windows", "shares", "known"],
)
def test_what_llama_cpp_has_fixed_is_refused_by_the_config(tiny, family, changes, words):
    structure = ModelStructure(Checkpoint.open(tiny(family, **changes)))
    if words is None:
        assert structure.gguf.architecture == "gptneox"
        return
    with pytest.raises(Unsupported, match=words):
        _ = structure.gguf


def test_a_window_that_llama_cpp_does_not_apply_is_its_context(tiny):
    structure = ModelStructure(Checkpoint.open(tiny("mistral", sliding_window=32)))
    assert structure.gguf.fields["llama.context_length"] == 32
    assert ModelStructure(Checkpoint.open(tiny("mistral"))).gguf.fields["llama.context_length"] == 128


def test_values_that_the_file_has_as_exponentials_are_read_back(tmp_path):
    import transformers

    config = transformers.MambaConfig(
        vocab_size=tiny_models.VOCABULARY,
        hidden_size=64,
        num_hidden_layers=1,
        state_size=4,
        expand=2,
        time_step_rank=32,
    )
    transformers.MambaForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path / "model")
    tiny_models.add_tokenizer(tmp_path / "model")
    out = _made(tmp_path / "model", tmp_path / "out", "q8_0")
    name = "backbone.layers.0.mixer.A_log"
    assert _places(out)[name][2] == MINUS_EXP
    original = Checkpoint.open(tmp_path / "model").read(name).float()
    stored = read_gguf(out / MODEL).tensors["blk.0.ssm_a"].float32()
    assert np.allclose(stored, -np.exp(original.numpy()), rtol=1e-6)
    assert torch.allclose(Checkpoint.open(out).read(name), original, rtol=1e-5, atol=1e-6)


@in_llama_cpp.needed
@pytest.mark.parametrize("family", list(OPTIONS))
def test_llama_cpp_computes_what_qkit_computes_for(tiny, tmp_path, family):
    from gguf_floats import as_floats

    # llama.cpp does more for files whose name has that of a well-known model
    source = shutil.copytree(tiny(family, **OPTIONS[family]), tmp_path / "model")
    out = _made(source, tmp_path / "out", "q8_0")
    as_floats(out / MODEL, tmp_path / "floats.gguf")
    found, wanted = in_llama_cpp.likelihoods(out, tiny_models.tokens(2, 24), tmp_path, tmp_path / "floats.gguf")
    # The same numbers, and no rounding of inputs. A router near a tie chooses another expert for some token, never for half.
    assert float((found - wanted).abs().median() / wanted.std()) < 0.005
    if family not in ROUTED:
        assert in_llama_cpp.error(found, wanted) < 0.01
