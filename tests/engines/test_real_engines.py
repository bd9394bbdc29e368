"""Real engines run files that qkit made: 'make engines' installs them and names their interpreters.

QKIT_VLLM_PYTHON, QKIT_STOCK_PYTHON (transformers and compressed-tensors) and QKIT_LLAMA_PYTHON are interpreters, QKIT_GGUF is a
GGUF file. Without one of them the tests that need it are skipped.
"""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from qkit.commands import main
from qkit.engines.process import ENGINES, EngineJob, run_engine
from qkit.workflows.engine_proof import Difference, allowed
from qkit.workflows.own_arithmetic import (
    load_model,
    load_texts_tokenizer,
    log_probabilities,
    other_rounding,
    proof_texts,
)

MIXED = """
scheme: w4a16
group_size: 64
rules:
  - {match: "*.layers.0.*", skip: "stays as it is"}
  - {match: "*.layers.1.*", scheme: fp8_dynamic}
  - {match: "*.down_proj", scheme: w8a8}
"""
WNA16, INT8 = "CompressedTensorsWNA16: CPUWNA16LinearKernel", "CompressedTensorsW8A8Int8: CPUInt8ScaledMMLinearKernel"
FP8 = "CompressedTensorsW8A8Fp8: ChannelWiseTorchFP8ScaledMMLinearKernel"
# vLLM runs q, k and v as one layer, and gate and up: four layers in each of eight blocks.
VLLM = {
    "w4a16": {WNA16: 32},
    "w8a8": {INT8: 32},
    "fp8_dynamic": {FP8: 32},
    "mixed": {WNA16: 18, FP8: 4, INT8: 6, "UnquantizedLinearMethod": 4},
    "kv": {WNA16: 32},
}


def needs(variable: str) -> Path:
    """The path in an environment variable."""
    value = os.environ.get(variable)
    if not value:
        pytest.skip(f"{variable} is not set: 'make engines' sets it")
    return Path(value)


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    """``packed(kind)``: tiny-llama in a scheme, in several of them, or with an FP8 KV cache."""
    folder = tmp_path_factory.mktemp("engines")
    recipe = folder / "mixed.yaml"
    recipe.write_text(MIXED)
    options = {"mixed": ["--recipe", str(recipe)], "kv": ["--scheme", "w4a16", "--kv", "fp8"]}

    def get(kind: str) -> Path:
        out = folder / kind
        if not out.is_dir():
            main(["quantize", "--model", "tiny-llama", "--out", str(out), *options.get(kind, ["--scheme", kind])])
        return out

    return get


def proof(run, out: Path, engine: str, python: Path, report: Path) -> tuple[int, dict, str]:
    code, _, err = run("verify", out, "--engine", engine, "--python", python, "--json", report)
    return code, json.loads(report.read_text())["engine_proof"], err


@pytest.mark.parametrize("kind", VLLM)
def test_vllm_computes_what_qkit_computes(kind, packed, run, tmp_path):
    code, found, err = proof(run, packed(kind), "vllm", needs("QKIT_VLLM_PYTHON"), tmp_path / "report.json")
    assert code == 0, err
    assert found["ok"] and found["expected"] and found["unquantized"] == []
    assert found["cache"] == ("fp8" if kind == "kv" else "")
    if found["device"] == "cpu":
        assert {k: n for k, n in found["kernels"].items() if k != "UnquantizedEmbeddingMethod"} == VLLM[kind]


@pytest.mark.skipif(torch.cuda.is_available(), reason="GPUs have a kernel for it")
def test_what_vllm_has_no_kernel_for_is_refused(packed, run, tmp_path):
    code, found, err = proof(run, packed("w8a16"), "vllm", needs("QKIT_VLLM_PYTHON"), tmp_path / "report.json")
    assert code == 4 and "Failed to find a kernel" in err and "its output is in" in err
    assert found["expected"] is False


def test_perplexity_in_vllm(packed, run, tmp_path):
    python = needs("QKIT_VLLM_PYTHON")
    options = ["--window", 256, "--windows", 20, "--json", tmp_path / "eval.json"]
    figures = []
    for more in ([], ["--engine", "vllm", "--python", python]):
        code, _, err = run("eval", packed("w4a16"), *options, *more)
        assert code == 0, err
        figures.append(json.loads((tmp_path / "eval.json").read_text())["texts"]["evaluation"])
    assert figures[0]["tokens"] == figures[1]["tokens"]
    assert figures[1]["perplexity"] == pytest.approx(figures[0]["perplexity"], rel=2e-3)


@pytest.mark.parametrize(("engine", "variable"), [("vllm", "QKIT_VLLM_PYTHON"), ("transformers", "QKIT_STOCK_PYTHON")])
def test_one_wrong_layer_is_noticed(engine, variable, packed, tmp_path):
    """The engine gets a file in which the scales of one projection of 56 are 1.25 times too large."""
    python, sound = needs(variable), packed("w4a16")
    wrong = shutil.copytree(sound, tmp_path / "wrong")
    tensors = load_file(wrong / "model.safetensors")
    tensors["model.layers.3.mlp.down_proj.weight_scale"] *= 1.25
    save_file(tensors, wrong / "model.safetensors", metadata={"format": "pt"})
    dtype = "float32" if engine == "transformers" else "bfloat16"
    prompts, model = proof_texts(load_texts_tokenizer(sound)), load_model(sound, torch.float32)
    own = log_probabilities(model, prompts)
    answer = run_engine(
        ENGINES[engine], python, EngineJob(model=wrong, prompts=prompts.tolist(), new_tokens=0, dtype=dtype)
    )
    found = Difference.of(torch.tensor(answer.logprobs, dtype=torch.float64), own)
    assert found.mean > allowed(Difference.of(other_rounding(sound, model, prompts, None, dtype), own), dtype)[0]


@pytest.mark.parametrize("kind", ["w4a16", "w8a16", "w8a8", "fp8_dynamic", "mixed", "w4a16_asym"])
def test_transformers(kind, packed, run, tmp_path):
    python = needs("QKIT_STOCK_PYTHON")
    code, found, err = proof(run, packed(kind), "transformers", python, tmp_path / "report.json")
    if kind == "w4a16_asym":
        assert code == 4 and found["expected"] is False and "weight_zero_point (mismatched keys)" in found["refused"]
    else:
        assert code == 0, err
        assert found["ok"] and found["expected"]


def test_llama_cpp(run, tmp_path):
    python, file = needs("QKIT_LLAMA_PYTHON"), needs("QKIT_GGUF")
    code, _, err = run("verify", file, "--engine", "llama.cpp", "--python", python, "--json", tmp_path / "report.json")
    assert code == 0, err
    assert json.loads((tmp_path / "report.json").read_text())["engine_proof"]["ok"]
