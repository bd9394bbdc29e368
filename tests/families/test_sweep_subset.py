"""A few classes of the sweep in the tests, one of every kind of structure; the whole sweep is slow."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))

import sweep_configs
import sweep_models
import sweep_worker

# Fused projections and positions as a bias; latent attention and experts; state spaces beside attention; experts in
# one tensor; blocks that run several times, with projections that are stored as one; an encoder.
SUBSET = [
    ("causal", "bloom"),
    ("causal", "deepseek_v3"),
    ("causal", "bamba"),
    ("causal", "dbrx"),
    ("causal", "hrm_text"),
    ("encoders", "bert:masked"),
]


def test_one_class_of_every_structure(tmp_path):
    results = [sweep_worker.run_class(kind, name, tmp_path / name) for kind, name in SUBSET]
    sweep_worker.stock(results, tmp_path)
    wrong = [sweep_models.line(result) for result in results if not sweep_models.complete(result)]
    assert not wrong, "\n".join(wrong)
    assert all(result["quantized"] > 90 for result in results)


def test_sizes_are_small_and_every_kind_of_layer_stays():
    config = sweep_configs.config("causal", "qwen3_next")
    assert set(config.layer_types) == {"linear_attention", "full_attention"}
    assert config.num_hidden_layers < 6 and config.hidden_size == 128


def test_a_class_that_cannot_be_built_says_why(tmp_path):
    result = sweep_worker.run_class("causal", "musicgen", tmp_path)
    assert not result["built"] and "MusicgenConfig" in sweep_models.line(result)
    assert sweep_models.totals("causal", [result])["built"] == 0


def test_a_traceback_and_a_lost_weight_are_no_success():
    good = {
        "type": "x",
        "built": True,
        "rtn": "ok",
        "gptq": "ok",
        "covered": 100.0,
        "stock": 0.0,
        "inputs": ["input_ids"],
    }
    assert sweep_models.complete(good)
    for change in ({"rtn": "TRACEBACK"}, {"gptq": "refused"}, {"covered": 99.0}, {"stock": "fails"}, {"stock": 0.1}):
        assert not sweep_models.complete({**good, **change})
    assert sweep_models.complete({**good, "gptq": "refused", "inputs": ["input_features"]})


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["causal", "image-text", "encoders"])
def test_the_whole_sweep(kind, tmp_path):
    script = [sys.executable, sweep_models.HERE / "sweep_models.py", kind, "--json", tmp_path / "sweep.json"]
    done = subprocess.run(script, capture_output=True, text=True)
    total = json.loads((tmp_path / "sweep.json").read_text())["total"]
    assert done.returncode == 0 and total["met"] and not total["tracebacks"], done.stdout[-3000:]
