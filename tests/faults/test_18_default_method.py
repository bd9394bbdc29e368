"""Who names no method is told which one is taken, and what the better one costs, by the forecast of that one."""

import json

import pytest

from qkit.planning.recipe import parse_method
from qkit.planning.request import Request
from qkit.tensor.formats import SCHEMES
from qkit.workflows.advice import BETTER, times
from qkit.workflows.quantize import prepare

GROUP = ("--group-size", 32)


@pytest.mark.parametrize(
    ("scheme", "better", "more"),
    [("w4a16", "gptq", GROUP), ("w8a8", "smoothquant+gptq", ()), ("nvfp4", "residual+gptq", ()), ("fp8", "gptq", ())],
)
def test_the_plan_says_it(run, tiny, small, calib, tmp_path, scheme, better, more):
    model = tiny("llama")
    options = ("--model", model, "--scheme", scheme, *small, *more)
    code, said, err = run("plan", *options, "--json", tmp_path / "p.json")
    assert code == 0, err
    group = more[1] if more else None
    asked = [
        Request(
            model=str(model), scheme=scheme, method=m, group_size=group, calib=calib, samples=8, seqlen=32, threads=1
        )
        for m in (None, better)
    ]
    one, two = (sum(prepare(r).forecast.operations.values()) for r in asked)
    wanted = f"method: rtn (no --method is given): {better} is more accurate and takes about {times(two / one)} the operations"
    line = "method: " + " ".join(said.split()).partition(" method: ")[2].partition(" forecast: ")[0]
    assert line.startswith(wanted) and f"add --method {better}" in line
    assert ("loads only where qkit is imported" in line) == (scheme == "nvfp4")
    assert json.loads((tmp_path / "p.json").read_text())["method"]["better"] == better


def test_quantize_says_it_too(run, tiny, small, tmp_path):
    options = ("--model", tiny("llama"), "--scheme", "w4a16", *small, *GROUP)
    code, said, err = run("quantize", *options, "--out", tmp_path / "out")
    assert code == 0 and said.count("method: rtn (no --method is given)") == 1, err


def test_nothing_is_said_where_it_was_chosen(run, tiny, small, tmp_path):
    named, plain = tmp_path / "named.yaml", tmp_path / "plain.yaml"
    named.write_text("scheme: w4a16\nmethod: rtn\ngroup_size: 32\n")
    plain.write_text("scheme: w4a16\ngroup_size: 32\n")
    for options, told in (
        (("--scheme", "w4a16", *GROUP, "--method", "rtn"), False),
        (("--recipe", named), False),
        (("--recipe", plain), True),
        (("--recipe", plain, "--method", "gptq"), False),
    ):
        code, said, err = run("plan", "--model", tiny("llama"), *small, *options)
        assert code == 0 and ("no --method is given" in said) == told, err


def test_what_a_model_cannot_have_is_no_advice(run, tiny, tmp_path):
    """A calibration text that is too short for any better method does not spoil rounding, which reads none."""
    options = ("--model", tiny("llama"), "--scheme", "w4a16", *GROUP, "--samples", 100_000, "--seqlen", 128)
    code, said, err = run("plan", *options)
    assert code == 0 and "method: rtn (no --method is given): it rounds to nearest" in said, err


def test_every_scheme_has_an_answer():
    for s in SCHEMES.values():
        parse_method(BETTER[None if s.activations is None else s.activations.kind])
