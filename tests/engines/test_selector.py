"""What is asked of vLLM's own code and what is made of its answer; where vLLM is named, the table is held against it."""

import json
import os
import sys
from pathlib import Path

import pytest
import transformers

from qkit.engines.process import EngineRefusal
from qkit.engines.selector import ask, parse_gpus
from qkit.errors import UsageError
from qkit.tensor.compressed_tensors import config
from qkit.tensor.formats import SCHEMES, Format, layout
from qkit.tensor.layouts import modelopt
from qkit.verification.engine_types import PLATFORMS
from qkit.verification.vllm_table import choice, format_key
from qkit.workflows.asked_engine import chosen_of

ANSWER = {
    "version": "0.32.0",
    "gpu": "sm90",
    "tp": 2,
    "stand_ins": ["humming"],
    "architectures": ["LlamaForCausalLM"],
    "layers": [{"refused": "ValueError: no kernel"}],
    "models": {
        "model": {
            "refused": "",
            "joined": {"qkv_proj": ["q_proj", "k_proj", "v_proj"]},
            "layers": {
                "model.layers.0.self_attn.qkv_proj": {"class": "QKVParallelLinear", "scheme": "S", "kernel": "K"},
                "model.layers.0.mlp.experts": {"class": "RoutedExperts", "refused": "ValueError: two formats"},
            },
        }
    },
}


@pytest.fixture
def interpreter(tmp_path):
    """``interpreter(answer)``: a program in the place of vLLM's interpreter; it keeps the job that it gets."""

    def make(answer: dict) -> Path:
        file = tmp_path / "python"
        file.write_text(
            f"#!{sys.executable}\nimport sys\n_, flag, script, job, answer = sys.argv\n"
            f"open({str(tmp_path / 'job.json')!r}, 'w').write(open(job).read())\n"
            f"open(answer, 'w').write({json.dumps(answer)!r})\n"
        )
        file.chmod(0o755)
        return file

    return make


def test_the_answer_is_read_by_linear(interpreter, tmp_path):
    answer = ask(interpreter(ANSWER), "sm90", {"model": tmp_path}, tp=2)
    job = json.loads((tmp_path / "job.json").read_text())
    assert job["gpu"] == "sm90" and job["tp"] == 2 and job["models"] == {"model": str(tmp_path.resolve())}
    names = ["model.layers.0.self_attn.k_proj", "model.layers.0.mlp.experts.3.w2", "model.layers.0.mlp.other"]
    chosen = dict(chosen_of(names, answer.models["model"]))
    assert chosen[names[0]][1].kernel == "K" and chosen[names[1]][1].refused == "ValueError: two formats"
    assert names[2] not in chosen and answer.layers[0].refused == "ValueError: no kernel"


def test_half_an_answer_is_none(interpreter, tmp_path):
    with pytest.raises(EngineRefusal, match="no complete answer"):
        ask(interpreter({"version": "1", "models": {}}), "sm90", {"model": tmp_path})
    with pytest.raises(UsageError, match="has no 'vllm'"):
        ask(interpreter({"missing": "vllm"}), "sm90", {"model": tmp_path})


def test_kinds_of_gpu():
    assert parse_gpus(None) == PLATFORMS
    assert parse_gpus("sm90, cpu,sm90") == ("sm90", "cpu")
    with pytest.raises(UsageError, match=r"unknown 'sm91'.*did you mean sm90"):
        parse_gpus("sm91")


# ---- vLLM itself -------------------------------------------------------------------------------------------------

SHAPES = [(256, 256), (576, 576), (4304, 256), (72, 1152), (320, 960), (384, 10944), (200, 2880), (8, 512), (100, 320)]


@pytest.fixture(scope="module")
def vllm_python() -> Path:
    value = os.environ.get("QKIT_VLLM_PYTHON")
    if not value:
        pytest.skip("QKIT_VLLM_PYTHON is not set: 'make engines' sets it")
    return Path(value)


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """A model with experts, of which only config.json is there."""
    folder = tmp_path_factory.mktemp("base")
    made = transformers.MixtralConfig(hidden_size=256, num_hidden_layers=1, num_local_experts=4, vocab_size=512)
    made.architectures = ["MixtralForCausalLM"]
    made.save_pretrained(folder)
    return folder


def questions(weights: Format, activations: Format | None, packing: str) -> list[tuple[str, str, int, int]]:
    def key(k: int) -> str:
        return format_key(weights, activations, packing, k)

    fitting = [(n, k) for n, k in SHAPES if not k % (weights.group or 1)]
    experts = [("experts", format_key(weights, activations, packing), 1536, 2304)] * (not 768 % (weights.group or 1))
    return [("column", key(k), n, k) for n, k in fitting] + experts


@pytest.mark.parametrize("gpu", ["sm75", "sm86", "sm90", "sm120"])
def test_the_table_says_what_vllm_says(gpu, vllm_python, base):
    """Shapes and groups that the table was not made of: those that no power of two divides well, and groups like 24 or 80."""
    formats = [(s.weights, s.activations) for s in SCHEMES.values()]
    formats += [(SCHEMES[name].weights.with_group(g), None) for name in ("W4A16", "W3A16") for g in (24, 80, 120, 512)]
    dtype = "float16" if gpu == "sm75" else "bfloat16"
    asked, layers = [], []
    every = [(w, a, layout(w, a), config({"layer": (w, a)}, [], {})) for w, a in formats]
    for w, a in map(modelopt.pair_of, modelopt.ALGORITHMS):
        every.append((w, a, "modelopt", modelopt.config({"layer": (w, a)}, [], [], cache=False)))
    for weights, activations, packing, quantization in every:
        for kind, key, n, k in questions(weights, activations, packing):
            asked.append((kind, key, n, k))
            layers.append({"quantization": quantization, "kind": kind, "in": k, "out": [n], "dtype": dtype})
    answer = ask(vllm_python, gpu, {}, layers=layers, base=base)
    wrong = []
    for (kind, key, n, k), found in zip(asked, answer.layers, strict=True):
        said = choice(kind, key, gpu, n, k, "bfloat16")
        same = bool(said.refused) == bool(found.refused)
        if not same or (not found.refused and (said.scheme, said.kernel) != (found.scheme, found.kernel)):
            wrong.append((kind, key, n, k, said, found))
    assert len(asked) > 200 and wrong == []


def test_a_plan_is_asked_before_anything_is_quantized(vllm_python, tiny, run, tmp_path):
    report = tmp_path / "plan.json"
    code, _, err = run(
        *("plan", "--model", tiny("mixtral"), "--scheme", "w4a16", "--engine", "vllm", "--python", vllm_python),
        *("--gpu", "sm90", "--json", report),
    )
    assert code == 0, err
    rows = [row for row in json.loads(report.read_text())["engine_rows"] if row["engine"] == "vLLM"]
    assert {row["known"] for row in rows} == {"selected by the engine's code"}
    assert all(row["loads_as"] and row["platforms"] == ["sm90"] for row in rows)
