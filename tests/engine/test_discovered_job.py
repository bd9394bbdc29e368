"""A run on a model that nobody declared can be killed at any moment, and takes no more memory than its forecast says."""

import json
import resource
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from conftest import Quiet
from runs import contents, in_child, killed_after
from tiny_models import add_tokenizer

from qkit.system.machine import resident_bytes
from qkit.system.memory import bound_heap
from qkit.workflows.quantize import Request, prepare, quantize

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))

import sweep_configs


@pytest.fixture(scope="module", params=["gpt_oss", "mamba", "qwen3_next"])
def asked(request, calib, tmp_path_factory) -> Request:
    """Experts in one tensor, state-space blocks, and blocks of two kinds."""
    model = sweep_configs.save("causal", request.param, tmp_path_factory.mktemp("model") / request.param)
    return Request(
        model=str(model), scheme="w4a16", method="awq+gptq", calib=calib, samples=4, seqlen=32, seed=3, threads=1
    )


@pytest.fixture(scope="module")
def undisturbed(asked, tmp_path_factory):
    out = tmp_path_factory.mktemp("undisturbed") / "out"
    assert quantize(asked, out, Quiet()).ok
    return contents(out)


def test_killed_and_continued(asked, undisturbed, tmp_path):
    """Two kills in a row, the second of the continued run; a file beside the result stays."""
    out, foreign = tmp_path / "out", tmp_path / "notes.txt"
    foreign.write_text("mine")
    hits = [killed_after(asked, out, after) for after in (9, 30)]
    assert hits[0] and not out.exists()
    assert quantize(replace(asked, threads=2), out, Quiet()).ok
    assert contents(out) == undisturbed
    assert foreign.read_text() == "mine"


@pytest.fixture(scope="module")
def experts(tmp_path_factory):
    """Three blocks with four experts in one tensor each, 7 MB a block."""
    config = transformers.GraniteMoeConfig(
        vocab_size=4096, hidden_size=512, intermediate_size=512, num_hidden_layers=3, num_attention_heads=8,
        num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2, max_position_embeddings=128,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("experts") / "model"
    transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    add_tokenizer(folder)
    return folder


@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_the_peak_of_memory_is_below_the_forecast_and_near(method, experts, calib, tmp_path):
    request = Request(
        model=str(experts), scheme="w4a16", method=method, calib=calib, samples=4, seqlen=64, threads=1
    )  # fmt: skip
    measured = tmp_path / "peak.json"

    def run() -> None:
        bound_heap()  # as the command does
        prepared, before = prepare(request), resident_bytes()
        quantize(request, tmp_path / "out", Quiet(), prepared=prepared)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        measured.write_text(json.dumps([prepared.forecast.peak_memory - before, peak - before]))

    assert in_child(run) == 0
    forecast, peak = json.loads(measured.read_text())
    assert peak <= forecast < 2 * peak + (64 << 20), (peak, forecast)
    assert sum(p.stat().st_size for p in experts.glob("*.safetensors")) > 20e6
