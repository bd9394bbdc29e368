"""Real engines run files that qkit made: 'make engines' installs them and names their interpreters.

QKIT_VLLM_PYTHON, QKIT_STOCK_PYTHON (transformers and compressed-tensors) and QKIT_LLAMA_PYTHON are interpreters. Without one of
them the tests that need it are skipped.
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
from qkit.files.embedded import embedded_text
from qkit.files.locate import find_model
from qkit.workflows.engine_proof import Difference, allowed
from qkit.workflows.own_arithmetic import (
    Q8,
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

# 7 linears in each of eight blocks, two norms in each and one behind them, and the embeddings, which are the head too.
GGUF = {"q4_k": {"Q4_K": 56, "F32": 17, "Q6_K": 1}, "q8_0": {"Q8_0": 57, "F32": 17}}


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
    python = needs("QKIT_VLLM_PYTHON")
    code, found, err = proof(run, packed(kind), "vllm", python, tmp_path / "report.json")
    assert code == 0, err
    assert found["ok"] and found["expected"] and found["unquantized"] == []
    assert found["cache"] == ("fp8" if kind == "kv" else "")
    if found["device"] == "cpu":
        assert {k: n for k, n in found["kernels"].items() if k != "UnquantizedEmbeddingMethod"} == VLLM[kind]


@pytest.mark.skipif(torch.cuda.is_available(), reason="GPUs have a kernel for it")
def test_what_vllm_has_no_kernel_for_is_refused(packed, run, tmp_path):
    python = needs("QKIT_VLLM_PYTHON")
    code, found, err = proof(run, packed("w8a16"), "vllm", python, tmp_path / "report.json")
    assert code == 4 and "Failed to find a kernel" in err and "its output is in" in err
    assert found["expected"] is False


MEASURED = [("vllm", "w4a16", "QKIT_VLLM_PYTHON"), ("llama.cpp", "q8_0", "QKIT_LLAMA_PYTHON")]


@pytest.mark.parametrize(("engine", "kind", "variable"), MEASURED, ids=["vllm", "llama.cpp"])
def test_texts_and_tasks_in_an_engine(engine, kind, variable, packed, run, tmp_path):
    python = needs(variable)
    options = ["--text", embedded_text("evaluation"), "--window", 128, "--windows", 12, "--limit", 16]
    tasks = ["--tasks", "qkit_cloze,qkit_text,next_words", "--task-dir", words_task(tmp_path / "tasks")]
    figures = []
    for more in ([], ["--engine", engine, "--python", python]):
        code, _, err = run("eval", packed(kind), *options, *tasks, *more, "--json", tmp_path / "eval.json")
        assert code == 0, err
        figures.append(json.loads((tmp_path / "eval.json").read_text()))
    texts = [f["texts"]["evaluation"] for f in figures]
    assert texts[0]["tokens"] == texts[1]["tokens"]
    assert texts[1]["perplexity"] == pytest.approx(texts[0]["perplexity"], rel=2e-3)
    assert figures[1]["engine"]["kernels"] and figures[1]["model"] == figures[0]["model"]

    def value(figures: dict, task: str, metric: str) -> float:
        return figures["tasks"][task]["metrics"][metric]["value"]

    bits = [value(f, "qkit_text", "bits_per_byte") for f in figures]
    assert bits[1] == pytest.approx(bits[0], rel=2e-3)
    for task, metric in (("qkit_cloze", "acc"), ("next_words", "exact_match")):
        both = [value(f, task, metric) for f in figures]
        assert both[0] > 0.3 and abs(both[1] - both[0]) <= 0.13  # 2 of 16: an engine rounds, and some answers are close


WORDS = """\
task: next_words
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
output_type: generate_until
test_split: test
doc_to_text: "{{{{text}}}}"
doc_to_target: "{{{{answer}}}}"
generation_kwargs: {{until: ["\\n", "."], max_gen_toks: 16, do_sample: false}}
metric_list:
  - {{metric: exact_match, aggregation: mean, higher_is_better: true, ignore_case: true}}
"""


def words_task(folder: Path) -> Path:
    """A task whose right answers are what tiny-llama itself says."""
    from qkit.runtime.loading import load

    folder.mkdir()
    tiny = find_model("tiny-llama")
    model, tokenizer = load(tiny), load_texts_tokenizer(tiny)
    rows = []
    for ids in proof_texts(tokenizer).repeat(3, 1)[:16, :40].split(1):
        start = ids[:, : 20 + len(rows)]
        made = model.generate(start, do_sample=False, max_new_tokens=16)[0, start.shape[1] :]
        rows.append({"text": tokenizer.decode(start[0], skip_special_tokens=True)})
        rows[-1]["answer"] = tokenizer.decode(made, skip_special_tokens=True).split("\n")[0].split(".")[0]
    (folder / "words.json").write_text("\n".join(map(json.dumps, rows)))
    (folder / "words.yaml").write_text(WORDS.format(data=folder / "words.json"))
    return folder


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


@pytest.mark.parametrize("kind", ["q4_k", "q8_0"])
def test_llama_cpp(kind, packed, run, tmp_path):
    python = needs("QKIT_LLAMA_PYTHON")
    code, found, err = proof(run, packed(kind), "llama.cpp", python, tmp_path / "report.json")
    assert code == 0, err
    assert found["ok"] and found["kernels"] == GGUF[kind]
    assert "it/s" not in err and "?B" not in err  # bars of transformers, and llama.cpp's words for a model


def test_a_file_of_another_scheme_is_noticed_in_llama_cpp(packed, tmp_path):
    """Q4_K is not what qkit computes of Q8_0, by more than the noise of either."""
    python = needs("QKIT_LLAMA_PYTHON")
    files = [packed(kind) / "model.gguf" for kind in ("q8_0", "q4_k")]
    prompts, model = proof_texts(load_texts_tokenizer(files[0])), load_model(files[0], torch.float32)
    own = log_probabilities(model, prompts)
    job = EngineJob(model=files[1], prompts=prompts.tolist(), new_tokens=0, dtype=Q8)
    found = Difference.of(torch.tensor(run_engine(ENGINES["llama.cpp"], python, job).logprobs).double(), own)
    noise = Difference.of(other_rounding(files[0], model, prompts, None, Q8), own)
    assert found.mean > allowed(noise, Q8)[0]
