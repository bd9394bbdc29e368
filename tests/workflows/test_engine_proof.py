"""The judgement of an engine by the noise of the file, the layers that it ran, and the command."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch

from qkit.engines.process import EngineAnswer
from qkit.errors import BadInput, Unsupported
from qkit.workflows.engine_layers import kernels_of, notes_of, unquantized, with_inputs_kept
from qkit.workflows.engine_proof import FLOORS, LARGEST_MARGIN, MEAN_MARGIN, Difference, EngineProof, allowed
from qkit.workflows.own_arithmetic import (
    LENGTH,
    TEXTS,
    engine_dtype,
    input_blocks,
    keep_inputs,
    load_model,
    load_texts_tokenizer,
    log_probabilities,
    other_rounding,
    proof_texts,
    rounded_inputs,
    rounding_layers,
)

BF16 = FLOORS["bfloat16"]


def answer(layers=None, **fields) -> EngineAnswer:
    return EngineAnswer(
        version="1", device="cpu", dtype="bfloat16", logprobs=[], tokens=[], seconds={}, layers=layers or {}, **fields
    )


@pytest.fixture(scope="module")
def packed(tmp_path_factory) -> Path:
    """The reference model in W4A8."""
    from qkit.commands import main

    out = tmp_path_factory.mktemp("packed") / "out"
    with pytest.MonkeyPatch.context() as m:
        m.setattr(sys, "stdout", sys.stderr)
        main(["quantize", "--model", "tiny-llama", "--scheme", "w4a8", "--method", "rtn", "--out", str(out)])
    return out


# ---- differences and limits ---------------------------------------------------------------------------------------


def test_difference():
    d = Difference.of(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([1.5, 2.0, 2.0]))
    assert (d.mean, d.largest) == (0.5, 1.0) and d.bias == pytest.approx(0.5 / 3)


def test_what_is_no_number_is_never_within_limits():
    d = Difference.of(torch.tensor([torch.nan, 0.0]), torch.zeros(2))
    assert d.mean == d.largest == torch.inf
    assert not EngineProof(engine="vLLM", difference=d, limits=(1e9, 1e9)).ok


def test_limits_follow_the_noise_from_a_floor_on():
    assert allowed(Difference(0.0, 0.0, 0.0), "bfloat16") == BF16
    assert allowed(Difference(0.5, 3.0, 0.0), "bfloat16") == (MEAN_MARGIN * 0.5, LARGEST_MARGIN * 3.0)


@pytest.mark.parametrize(
    ("mean", "largest", "ok"),
    [(0.02, 0.4, True), (0.0201, 0.4, False), (0.02, 0.401, False)],
    ids=["at", "mean", "largest"],
)
def test_both_limits_decide(mean, largest, ok):
    proof = EngineProof(engine="vLLM", version="1", difference=Difference(mean, largest, 0.0), limits=(0.02, 0.4))
    assert proof.ok is ok and proof.to_json()["ok"] is ok
    assert ("does NOT compute" in proof.verdict) is not ok


@pytest.mark.parametrize(
    ("expected", "said"),
    [(True, "says that it loads, and is wrong"), (False, "as qkit's table says"), (None, "broken")],
)
def test_a_refusal_is_held_against_the_table(expected, said):
    proof = EngineProof(engine="vLLM", refused="vLLM refused out: broken", expected=expected)
    assert not proof.ok and proof.verdict.endswith(said)


# ---- layers -------------------------------------------------------------------------------------------------------

PLAIN = {"class": "Linear", "method": "UnquantizedLinearMethod"}
PACKED = {"class": "Linear", "method": "M", "scheme": "WNA16", "kernel": "K"}


def test_kernels_are_counted():
    layers = {"a": PACKED, "b": PACKED, "c": PLAIN, "d": {"class": "Linear"}, "e": {"class": "Linear", "scheme": "S"}}
    assert kernels_of(answer(layers)) == {"WNA16: K": 2, "UnquantizedLinearMethod": 1, "Linear": 1, "S": 1}


def test_layers_are_found_under_the_names_of_the_engine():
    layers = {
        "model.layers.0.attn.qkv_proj": PLAIN,
        "model.layers.0.attn.o_proj": PACKED,
        "language_model.model.layers.1.mlp.experts": PLAIN,
        "head": {"class": "Linear"},
    }
    found = answer(layers, joined={"qkv_proj": ["q_proj", "k_proj"]})
    names = [
        "model.layers.0.attn.q_proj",
        "model.layers.0.attn.o_proj",
        "model.layers.1.mlp.experts.3.up_proj",
        "head",
        "x.y",
    ]
    assert unquantized(found, names) == [names[0], names[2], names[3]]


def test_kernels_that_do_not_round_inputs_are_named():
    layers = {
        "a.qkv_proj": {"class": "L", "scheme": "CompressedTensorsWNA8Int", "kernel": "CPUWNA16LinearKernel"},
        "a.o_proj": {"class": "L", "scheme": "CompressedTensorsWNA8Int", "kernel": "HummingLinearKernel"},
        "head": {"class": "L", "method": "UnquantizedLinearMethod"},
    }
    found = answer(layers, joined={"qkv_proj": ["q_proj", "k_proj"]}, unused=["k", "v"])
    kept = with_inputs_kept(found, ["a.q_proj", "a.k_proj", "a.o_proj", "head", "b.q_proj"])
    assert kept == dict.fromkeys(["a.q_proj", "a.k_proj"], "CPUWNA16LinearKernel")
    rounding = {"a.qkv_proj": {**layers["a.qkv_proj"], "inputs": "int8"}}
    assert with_inputs_kept(answer(rounding), ["a.qkv_proj"]) == {}
    assert with_inputs_kept(found, ["a.o_proj"]) == {}  # weights alone are quantized in the others: nothing is kept
    assert notes_of(found, kept) == [
        "CPUWNA16LinearKernel leaves the inputs of 2 layers in 16 bits, and the file says to round them: qkit left them so"
        " too, to compare",
        "it does not use k (and 1 more)",
    ]
    assert notes_of(answer(layers), {}) == []


# ---- qkit's own arithmetic ------------------------------------------------------------------------------------------


def test_texts_are_the_same_ones_every_time(packed):
    tokenizer = load_texts_tokenizer(packed)
    prompts = proof_texts(tokenizer)
    assert prompts.shape == (TEXTS, LENGTH) and torch.equal(prompts, proof_texts(tokenizer))
    with pytest.raises(BadInput, match="the tokenizer makes 0 texts of 96 tokens, expected 6"):
        proof_texts(lambda text, **_: {"input_ids": [1] * 5})


def test_arithmetic_asked_of_engines(packed, tmp_path):
    assert engine_dtype(packed, "vllm") == "bfloat16" and engine_dtype(packed, "transformers") == "float32"
    assert engine_dtype(tmp_path / "m.gguf", "llama.cpp") == "q8_0"
    with pytest.raises(Unsupported, match=r"llama\.cpp runs GGUF files"):
        engine_dtype(packed, "llama.cpp")


def test_inputs_in_8_bits_make_the_last_bit_matter(packed):
    """Why noise is measured and not assumed: one bit of float32 in the embeddings moves W4A8 as far as 16 bits do."""
    model, prompts = load_model(packed, torch.float32), proof_texts(load_texts_tokenizer(packed))[:2]
    own = log_probabilities(model, prompts)
    assert Difference.of(log_probabilities(model, prompts), own).largest == 0
    noise = {d: Difference.of(other_rounding(packed, model, prompts, None, d), own) for d in ("float32", "bfloat16")}
    assert all(0.005 < n.mean < 0.1 for n in noise.values())
    assert not model.get_input_embeddings()._forward_hooks


def test_kept_inputs_are_those_of_a_file_that_rounds_none(packed, tmp_path, run):
    """W4A8 without rounded inputs is W4A16: here of the same weights by rounding."""
    prompts = proof_texts(load_texts_tokenizer(packed))[:2]
    options = ("--model", "tiny-llama", "--scheme", "w4a16", "--method", "rtn", "--out", tmp_path / "w4a16")
    assert run("quantize", *options)[0] == 0
    model = load_model(packed, torch.float32)
    layers = rounding_layers(model)
    assert len(layers) == 56
    rounded = log_probabilities(model, prompts)
    keep_inputs(model, layers)
    assert rounding_layers(model) == []
    kept = log_probabilities(model, prompts)
    plain = log_probabilities(load_model(tmp_path / "w4a16", torch.float32), prompts)
    assert Difference.of(kept, plain).mean < 1e-5 < 0.005 < Difference.of(rounded, plain).mean
    in_16_bits = other_rounding(packed, model, prompts, None, "bfloat16", layers)
    assert Difference.of(in_16_bits, kept).mean < 0.02 < Difference.of(rounded, plain).mean


def test_inputs_share_scales_as_the_type_of_the_weight_says(tiny, tmp_path):
    pytest.importorskip("gguf", reason="the gguf package is not installed: pip install 'qkit[gguf]'")
    from conftest import Quiet

    from qkit.workflows.quantize import Request, quantize

    quantize(Request(model=str(tiny("llama", intermediate_size=256)), scheme="q4_k"), tmp_path / "out", Quiet())
    file = tmp_path / "out" / "model.gguf"
    model = load_model(file, torch.float32)
    blocks = input_blocks(file, model)
    # 64 columns are too few for Q4_K, so that these layers are Q5_0; the head is tied to embeddings in Q5_0.
    assert {path.rpartition(".")[2]: block for path, block in blocks.items()} == {
        **dict.fromkeys(["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "lm_head"], 32),
        "down_proj": 256,
    }
    prompts = torch.arange(64).reshape(2, 32)
    own = log_probabilities(model, prompts)
    assert 0 < Difference.of(other_rounding(file, model, prompts, None, "q8_0"), own).mean < 0.1
    assert torch.equal(log_probabilities(model, prompts), own)  # nothing of it stays


def test_scales_of_rounded_inputs_are_float16_but_in_super_blocks():
    x = torch.linspace(-1.0, 0.9, 256)[None]  # 1 / 127 is no float16 number
    model = torch.nn.Sequential(torch.nn.Linear(256, 256, bias=False))
    model[0].weight.data.copy_(torch.eye(256))
    for block, scale in ((32, torch.tensor(1 / 127).half().float()), (256, torch.tensor(1 / 127))):
        with torch.inference_mode(), rounded_inputs(model, {"0": block}):
            first = model(x)[0, 0]  # of code -127
        assert first == -127 * scale


# ---- the command ----------------------------------------------------------------------------------------------------


def interpreter(folder: Path, logprobs: torch.Tensor) -> Path:
    """A program that answers with these log-probabilities, and says that the engine is there where it is asked nothing else."""
    content = {
        "version": "9.9", "device": "cpu", "dtype": "bfloat16", "logprobs": logprobs.tolist(),
        "tokens": [[0] * 24] * len(logprobs), "seconds": {"load": 1.0, "run": 2.0},
        "layers": {"model.layers.0.mlp.down_proj": PACKED},
    }  # fmt: skip
    (folder / "content.json").write_text(json.dumps(content))
    file = folder / "python"
    here = """if grep -q '"prompts": ..,' "$3"; then echo '{"found": true}' > "$4"; exit; fi"""
    file.write_text(f"#!/bin/sh\n{here}\ncp '{folder}/content.json' \"$4\"\n")
    file.chmod(0o755)
    return file


def test_verify_judges_what_an_engine_gave(packed, run, tmp_path):
    own = log_probabilities(load_model(packed, torch.float32), proof_texts(load_texts_tokenizer(packed)))
    arguments = ["verify", packed, "--engine", "vllm", "--json", tmp_path / "report.json", "--python"]
    code, said, err = run(*arguments, interpreter(tmp_path, own + 0.001))
    report = json.loads((tmp_path / "report.json").read_text())
    assert code == 0, err
    assert "vLLM 9.9 agrees with qkit: mean difference 0.001" in said and "WNA16: K" in said
    assert report["ok"] and report["engine_proof"]["ok"] and report["engine_proof"]["expected"]
    assert report["engine_proof"]["kernels"] == {"WNA16: K": 1} and report["checks"]

    code, _, err = run(*arguments, interpreter(tmp_path, own + 0.5))
    report = json.loads((tmp_path / "report.json").read_text())
    assert code == 4 and "vLLM 9.9 does NOT compute what qkit computes of this file: mean difference 0.5" in err
    assert not report["ok"] and not report["engine_proof"]["ok"]


def test_a_folder_of_another_tool_is_run_and_no_more(packed, run, tmp_path):
    own = log_probabilities(load_model(packed, torch.float32), proof_texts(load_texts_tokenizer(packed)))
    other = shutil.copytree(packed, tmp_path / "other")
    (other / "qkit.json").unlink()
    code, said, err = run("verify", other)
    assert code == 4 and "if another tool wrote this folder, 'qkit doctor FOLDER' checks it" in err
    assert "written before qkit" not in said
    code, said, err = run("verify", other, "--engine", "vllm", "--python", interpreter(tmp_path, own + 0.001))
    assert code == 0 and "no qkit.json beside it, so its bytes were not checked" in said and "agrees with qkit" in said


def test_eval_takes_every_likelihood_from_the_engine(packed, run, tmp_path):
    nll = torch.tensor([[1.0, 2.0, 3.0], [2.0, 2.0, 2.0]])
    python = interpreter(tmp_path, -nll)
    options = ["--window", 4, "--windows", 2, "--engine", "vllm", "--python", python]
    code, said, err = run("eval", packed, *options, "--json", tmp_path / "eval.json")
    found = json.loads((tmp_path / "eval.json").read_text())
    assert code == 0, err
    assert "by vLLM 9.9" in said and found["engine"]["kernels"] == {"WNA16: K": 1}
    engine = {key: found["engine"][key] for key in ("name", "version", "python", "dtype", "cache", "context")}
    assert engine == {
        **{"name": "vLLM", "version": "9.9", "python": str(python), "dtype": "bfloat16"},
        **{"cache": "bfloat16", "context": 5},  # a token after each window of four
    }
    assert "KV cache bfloat16, texts of up to 5 tokens" in said
    assert found["texts"]["evaluation"]["perplexity"] == pytest.approx(float(nll.mean().exp()))
    assert (found["window"], found["texts"]["evaluation"]["windows"]) == (4, 2)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["verify", "--engine", "vllm"], "--engine needs --python VENV/bin/python"),
        (["verify", "--python", "p"], "--python needs --engine NAME"),
        (["verify", "--engine", "llama.cpp", "--python", "p"], "is no GGUF file and has no model.gguf"),
        (["eval", "--engine", "vllm", "--python", "p", "--baseline", "m"], "--baseline does not go with --engine"),
        (["eval", "other", "--engine", "vllm", "--python", "p"], "--engine measures one model at a time"),
    ],
    ids=["no python", "no engine", "gguf", "baseline", "two"],
)
def test_wrong_usage(arguments, said, packed, run):
    code, _, err = run(arguments[0], packed, *arguments[1:])
    assert code == 2 and said in err and len(err.splitlines()) == 1


def test_an_engine_is_not_run_on_a_damaged_file(packed, run, tmp_path):
    import shutil

    damaged = shutil.copytree(packed, tmp_path / "damaged")
    (damaged / "generation_config.json").write_text("{}")
    python = interpreter(tmp_path, torch.zeros(2, 2))
    code, _, err = run("verify", damaged, "--engine", "vllm", "--python", python)
    assert code == 4 and err.rstrip().endswith("; the engine was not run")


def test_a_text_that_is_too_short_for_a_window_is_named(packed, run, tmp_path):
    (tmp_path / "empty.txt").write_text("")
    engine = ["--engine", "vllm", "--python", interpreter(tmp_path, torch.zeros(2, 2))]
    code, _, err = run("eval", packed, "--text", tmp_path / "empty.txt", "--window", 4, *engine)
    said = "text 'empty': the text has 0 tokens, and one window needs 4: use more text, or shorter windows"
    assert code == 3 and said in err
