"""Sensitivity on the embedded trained model: the path integral against the true loss change, and what a profile holds."""

import pytest
import qkit_data
import torch

from qkit import loading
from qkit.calibration import calibration_rows
from qkit.formats import FORMATS
from qkit.loading import load_tokenizer
from qkit.parallel import workers
from qkit.pipeline import open_outline
from qkit.qtensor import dequantize, find_params, quantize
from qkit.sensitivity.pqi import mean_gradients, shares
from qkit.sensitivity.subject import Replacement, Subject


@pytest.fixture(scope="module")
def subject():
    outline = open_outline("tiny-llama")
    model = loading.load("tiny-llama", dtype=torch.float32)
    with workers(2) as pool:
        yield Subject(model, outline, pool)


@pytest.fixture(scope="module")
def rows(subject):
    path = qkit_data.text_path("calibration")
    return calibration_rows(path, load_tokenizer("tiny-llama"), 8, 64, 4096).tokens


def rounded(subject, bits: int) -> dict[str, torch.Tensor]:
    fmt = FORMATS[f"int{bits}"].with_group(64)
    found = {}
    for name in subject.where:
        w = subject.weight(name)
        found[name] = dequantize(quantize(w, find_params(w, fmt, torch.bfloat16, search=True), fmt))
    return found


def true_change(subject, targets, rows) -> float:
    before = subject.loss(rows)
    with subject.replaced({n: Replacement(w) for n, w in targets.items()}):
        return subject.loss(rows) - before


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_the_integral_is_the_loss_change(subject, rows, bits):
    """Where the gradient and the diagonal Fisher matrix at the starting point are far off."""
    targets = rounded(subject, bits)
    start = {n: subject.weight(n).clone() for n in targets}
    true = true_change(subject, targets, rows)
    gbar = mean_gradients(subject, targets, rows, 8)
    parts = shares(start, targets, gbar)
    predicted = sum(float(s.double().sum()) for s in parts.values())
    assert true > 0
    assert predicted == pytest.approx(true, rel=0.02)
    _, g = subject.gradients(rows, list(targets))
    first = sum(float((g[n] * (targets[n] - start[n])).double().sum()) for n in targets)
    assert abs(first - true) > 0.5 * true
    _, fisher = subject.gradients(rows, list(targets), squares=True)
    second = 0.5 * sum(float((fisher[n] * (targets[n] - start[n]).square()).double().sum()) for n in targets)
    assert second < true / 10


def test_the_error_of_the_rule(subject, rows):
    """Midpoints: a quarter per doubling of the points; right ends: a half."""
    targets = rounded(subject, 2)
    start = {n: subject.weight(n).clone() for n in targets}
    true = true_change(subject, targets, rows)

    def error(points: int, rule: str) -> float:
        gbar = mean_gradients(subject, targets, rows, points, rule)
        return abs(sum(float(s.double().sum()) for s in shares(start, targets, gbar).values()) - true)

    assert 2.8 < error(2, "midpoint") / error(4, "midpoint") < 5.5
    assert 1.6 < error(2, "right") / error(4, "right") < 2.5


def test_what_is_replaced_comes_back(subject, rows):
    before = {n: subject.weight(n).clone() for n in subject.where}
    name = next(iter(before))
    with pytest.raises(ZeroDivisionError), subject.replaced({name: Replacement(torch.zeros_like(before[name]))}):
        assert not subject.weight(name).any()
        _ = 1 / 0
    assert all(torch.equal(subject.weight(n), w) for n, w in before.items())
    unmoved = mean_gradients(subject, {name: before[name]}, rows[:1], 1)
    assert float((unmoved[name] * (before[name] - before[name])).abs().sum()) == 0


def test_gradients_are_those_of_autograd(subject, rows):
    name = next(iter(subject.where))
    loss, found = subject.gradients(rows, [name])
    parameter = subject.weight(name)
    model = subject.model
    with torch.inference_mode(False), torch.enable_grad():
        leaf = model.get_parameter(f"{name}.weight").requires_grad_(True)
        out = model(input_ids=rows, labels=rows, use_cache=False).loss
        (wanted,) = torch.autograd.grad(out, leaf)
        leaf.requires_grad_(False)
    assert loss == pytest.approx(float(out), rel=1e-5)
    assert parameter.shape == wanted.shape
    assert float((found[name] - wanted).norm() / wanted.norm()) < 1e-4
