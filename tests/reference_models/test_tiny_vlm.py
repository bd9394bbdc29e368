"""The vision-language reference model: what its card says, and the commands of the README on it."""

import json

import pytest
import qkit_data
import torch

from qkit.calibration.image_text import load_processor
from qkit.calibration.options import DRAWN
from qkit.evaluation.image_text import evaluate_image_text
from qkit.runtime.loading import load

MODEL = qkit_data.model_path("tiny-vlm")
QUESTIONS = 60


@pytest.fixture(scope="module")
def original():
    return load("tiny-vlm", dtype=torch.float32)


def test_it_answers(original):
    """It is small, and right on scenes that it was not trained on."""
    assert sum(f.stat().st_size for f in MODEL.iterdir()) <= 12e6
    found = evaluate_image_text(original, load_processor(MODEL), DRAWN, QUESTIONS)
    assert found["accuracy"]["percent"] >= 85


@pytest.mark.parametrize(
    ("options", "least"),
    [
        (("--scheme", "w3a16", "--group-size", 64), 80),
        pytest.param(("--scheme", "w4a8"), 80, marks=pytest.mark.slow),
        pytest.param(("--scheme", "w2a16", "--group-size", 64), 25, marks=pytest.mark.slow),
    ],
)
def test_balanced_quantization(run, original, tmp_path, options, least):
    out = tmp_path / "out"
    command = ("quantize", "--model", "tiny-vlm", "--method", "mbq", "--samples", 32, *options, "--out", out)
    code, _, err = run(*command)
    assert code == 0 and run("verify", out)[0] == 0, err
    figures = tmp_path / "figures.json"
    asked = ("--baseline", "tiny-vlm", "--image-text", "drawn", "--questions", QUESTIONS, "--json", figures)
    code, _, err = run("eval", out, *asked)
    assert code == 0, err
    found = json.loads(figures.read_text())["pairs"]["drawn"]
    assert found["accuracy"]["percent"] >= least and found["kl"]["mean"] > 0
