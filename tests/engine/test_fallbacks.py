"""A solver that is worse than plain rounding: rounding's codes are kept, and the record says so and what these cost."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
from safetensors.torch import load_file

from qkit.engine import fallbacks
from qkit.errors import NumericFailure
from qkit.solvers import rtn
from qkit.solvers.table import SOLVERS, Solver
from qkit.solvers.task import Solved
from qkit.workflows.quantize import Request, quantize

LAYER = "model.layers.1.mlp.down_proj"  # alone in its group


def flipped(q):
    """All codes in the place of others: many times worse than rounding."""
    return replace(q, codes=q.codes.flip(1))


def one_off(q):
    """The largest error that one code can add: far less than 2 percent of all."""
    codes = q.codes.clone()
    codes[0, 0] += 1 if codes[0, 0] <= 0 else -1
    return replace(q, codes=codes)


@pytest.fixture
def registered(monkeypatch):
    """``registered(change, needs)``: a solver 'bad' that rounds over the full range and changes the result."""

    def go(change, needs: set[str]) -> None:
        def solve(task):
            plain = rtn.solve(replace(task, options={"search": "none"}))
            return Solved([change(q) for q in plain.qtensors])

        made = Solver(summary="worse", options={}, module=lambda: SimpleNamespace(solve=solve), needs=frozenset(needs))
        monkeypatch.setitem(SOLVERS, "bad", made)

    return go


@pytest.fixture
def solved(tiny, calib, tmp_path, quiet):
    """``solved(rule, method, **fields)``: the folder of a quantized model of 21 linears, of which the rule is about one."""

    def go(rule: dict, method: str, **fields):
        out = tmp_path / str(len(list(tmp_path.iterdir())))
        request = Request(
            model=str(tiny("llama", num_hidden_layers=3)),
            scheme="w4a16",
            method=method,
            group_size=32,
            rules=({"match": LAYER, **rule},),
            calib=calib,
            samples=8,
            seqlen=32,
            threads=1,
            **fields,
        )
        assert quantize(request, out, quiet).ok
        return out

    return go


def record(out):
    return json.loads((out / "qkit.json").read_text())["linears"]


@pytest.mark.parametrize(
    ("method", "needs", "fields"),
    [
        ("gptq", {"hessian"}, {}),
        ("rtn", set(), {}),  # without rows errors are those of the weights
        ("gptq", set(), {}),
        ("gptq", {"hessian"}, {"outliers": 2.0}),
        ("gptq", {"hessian"}, {"rank": 4}),
    ],
)
def test_a_worse_solver_ends_as_rounding(method, needs, fields, registered, solved):
    """Everything in the record is that of the same model whose layer was rounded, but for the solver and the reason."""
    registered(flipped, needs)
    found = solved({"solver": "bad"}, method, **fields)
    rounded = solved({"solver": "rtn", "options": {"search": "none"}}, method, **fields)
    codes, expected = (load_file(out / "model.safetensors") for out in (found, rounded))
    assert codes.keys() == expected.keys() and all(codes[n].equal(expected[n]) for n in codes)
    bad, plain = record(found), record(rounded)
    assert bad[LAYER].pop("fallback") == "bad was worse than rounding" and plain[LAYER].pop("fallback") is None
    assert bad[LAYER]["error"] > 0 and bad[LAYER]["baseline_error"] > 0
    for entry in (bad[LAYER], plain[LAYER]):
        entry.pop("solver")
        entry.pop("options", None)
    assert bad == plain
    assert bad[LAYER]["error"] == bad[LAYER]["baseline_error"] or "rank" in fields


def test_a_solver_that_is_hardly_worse_is_replaced_without_a_word(registered, solved):
    registered(one_off, {"hessian"})
    found = solved({"solver": "bad"}, "gptq")
    rounded = solved({"solver": "rtn", "options": {"search": "none"}}, "gptq")
    entry = record(found)[LAYER]
    assert entry["fallback"] is None and entry["error"] == entry["baseline_error"]
    assert entry["weight_sha256"] == record(rounded)[LAYER]["weight_sha256"]


def test_a_better_solver_is_kept(registered, solved):
    """Its codes, and the error of its codes."""
    found = record(solved({"solver": "rtn"}, "gptq"))[LAYER]  # with the search of scales
    rounded = record(solved({"solver": "rtn", "options": {"search": "none"}}, "gptq"))[LAYER]
    assert found["error"] < found["baseline_error"] == rounded["error"]
    assert found["weight_sha256"] != rounded["weight_sha256"] and found["fallback"] is None


def test_one_fallback_of_twenty_is_the_most(registered, solved, monkeypatch):
    """One of 21 is within MAX_FALLBACKS, and of 19 it would not be."""
    registered(flipped, {"hessian"})
    solved({"solver": "bad"}, "gptq")
    assert fallbacks.MAX_FALLBACKS == 0.05
    monkeypatch.setattr(fallbacks, "MAX_FALLBACKS", 1 / 22)
    with pytest.raises(NumericFailure, match=r"1 of 21 linears fell back .*bad was worse than rounding"):
        solved({"solver": "bad"}, "gptq")
