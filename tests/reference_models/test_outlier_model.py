"""The model with outliers (reports/outliers) computes what the original computes, and its outliers are there."""

import importlib.util
import json
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import logits, relative, tokens

from qkit.runtime.loading import load

spec = importlib.util.spec_from_file_location(
    "make_model", Path(__file__).parents[2] / "reports" / "outliers" / "make_model.py"
)
make_model = importlib.util.module_from_spec(spec)
spec.loader.exec_module(make_model)


@pytest.fixture(scope="module")
def made(tiny, tmp_path_factory):
    """The original's folder and that of the model made from it."""
    original, out = tiny("llama"), tmp_path_factory.mktemp("outliers") / "made"
    make_model.make(original, out)
    return original, out


def test_the_function_stays(made):
    before, after = (load(folder, dtype=torch.float32) for folder in made)
    x = tokens(3, seed=4)
    assert relative(logits(after, x), logits(before, x)) < 1e-5
    assert after.config.intermediate_size > before.config.intermediate_size


def test_outliers_of_inputs_and_weights(made):
    plain, changed = (make_model.statistics(load(folder, dtype=torch.float32), tokens())[1] for folder in made)
    assert set(plain) == {f"{x}_proj" for x in ("q", "k", "v", "o", "gate", "up", "down")}
    for kind in ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"):
        assert changed[kind][0] > 10 * plain[kind][0], kind
        assert changed[kind][1] > 4 * plain[kind][1], kind
    assert changed["o_proj"][0] > 2 * plain["o_proj"][0]
    assert changed["down_proj"][1] > 10 * plain["down_proj"][1]


def test_pairs_cancel_exactly_and_lie_among_the_others(made):
    weights = load_file(made[1] / "model.safetensors")
    gate, up, down = (weights[f"model.layers.1.mlp.{x}_proj.weight"].float() for x in ("gate", "up", "down"))
    first = [i for i in range(len(up) - 1) if torch.equal(up[i], -up[i + 1])]
    assert len(first) == 8
    assert first[0] > 0 and max(b - a for a, b in pairwise(first)) < len(up) / 4
    for i in first:
        assert torch.equal(gate[i], gate[i + 1]) and torch.equal(down[:, i], down[:, i + 1])
        row = int(down[:, i].abs().argmax())
        ordinary = [c for c in range(len(up)) if c not in first and c - 1 not in first]
        assert float(down[row, i].abs()) >= 8 * float(down[row, ordinary].abs().max())


def test_seed_decides(made, tmp_path):
    """The same seed gives the same bytes, another one other weights."""
    for name, seed in (("same", 0), ("other", 1)):
        make_model.make(made[0], tmp_path / name, seed)
    kept, same, other = (
        (folder / "model.safetensors").read_bytes() for folder in (made[1], tmp_path / "same", tmp_path / "other")
    )
    assert kept == same != other


def test_what_is_no_plain_llama_is_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "opt"}))
    with pytest.raises(SystemExit, match="not a Llama"):
        make_model.make(tmp_path, tmp_path / "out")
