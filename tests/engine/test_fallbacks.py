"""A solver that is worse than plain rounding: rounding's codes are kept, and the record says so and what these cost."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from qkit.calibration.statistics import Stats
from qkit.engine import solving
from qkit.engine.fallbacks import check_fallbacks
from qkit.errors import NumericFailure
from qkit.families.blocks import Group, Linear, LinearGroup
from qkit.planning.linear_plan import LinearPlan
from qkit.solvers import rtn
from qkit.solvers.table import SOLVERS, Solver
from qkit.solvers.task import ZERO_INPUTS, Solved
from qkit.tensor import lowrank
from qkit.tensor.formats import FORMATS
from qkit.tensor.input_transform import PLAIN
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
    """``solved(rule, method, **fields)``: the folder of a model of 7 linears a layer, quantized with a rule about one."""

    def go(rule: dict, method: str, layers: int = 3, **fields):
        out = tmp_path / str(len(list(tmp_path.iterdir())))
        request = Request(
            model=str(tiny("llama", num_hidden_layers=layers)),
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


def test_one_linear_in_twenty_may_fall_back(registered, solved):
    """One of 21 may, and one of 14 may not."""
    registered(flipped, {"hessian"})
    solved({"solver": "bad"}, "gptq")
    with pytest.raises(
        NumericFailure, match=r"1 of 14 linears fell back .*, more than 5%: .*bad was worse than rounding"
    ):
        solved({"solver": "bad"}, "gptq", layers=2)


@pytest.mark.parametrize(("silent", "message"), [(10, None), (11, "11 of 20 linears saw nothing but zeros")])
def test_half_of_all_linears_may_be_silent(silent, message):
    """Zero inputs are no failure of a solver, up to half of a model."""
    names = [f"linear.{i}" for i in range(20)]
    reasons = {name: {"fallback": ZERO_INPUTS if i < silent else None} for i, name in enumerate(names)}
    plan, job = SimpleNamespace(linears=dict.fromkeys(names)), SimpleNamespace(records=lambda: reasons, path="job")
    if message is None:
        check_fallbacks(plan, job)
    else:
        with pytest.raises(NumericFailure, match=message):
            check_fallbacks(plan, job)


# ---- experts that few tokens reach -----------------------------------------------------------------------------


@pytest.mark.parametrize(("tokens", "expert", "solver"), [(31, 0, "rtn"), (32, 0, "gptq"), (31, None, "gptq")])
def test_an_expert_with_fewer_than_32_tokens_is_rounded(tokens, expert, solver):
    """What others see is enough however little it is: all rows reach them."""
    linear = Linear(name="a", param="a.weight", shape=(8, 32), expert=expert)
    planned = LinearPlan(
        name="a", shape=(8, 32), scheme="w4a16", weights=FORMATS["int4"].with_group(32), activations=None, solver="gptq"
    )
    state = SimpleNamespace(
        inputs=lambda group, rotation: PLAIN,
        weight=lambda x: torch.randn(8, 32),
        structure=SimpleNamespace(dtype=torch.bfloat16),
    )
    plan = SimpleNamespace(
        linears={"a": replace(planned, options={"damp": 0.01, "order": "none"})}, export="compressed-tensors"
    )
    work = solving._make_work(state, plan, LinearGroup((linear,), Group(("a",)), "a", expert), few(tokens))
    assert work.solver is SOLVERS[solver] and work.task.tokens == tokens


def few(tokens: int) -> Stats:
    x = torch.randn(tokens, 32, generator=torch.Generator().manual_seed(tokens))
    return Stats(tokens=tokens, mean_square=x.square().mean(0), sample=x, hessian=x.T @ x / tokens)


@pytest.mark.parametrize(("tokens", "weighted"), [(31, False), (32, True)])
def test_a_branch_follows_the_inputs_of_32_tokens(tokens, weighted):
    """With fewer it fits the error of the weight itself."""
    error = torch.randn(24, 32, generator=torch.Generator().manual_seed(0))
    task = SimpleNamespace(stats=few(tokens), dtype=torch.float32)
    found = solving._branch(SimpleNamespace(task=task), 0, 2, error)
    expected = lowrank.find(error, few(tokens).hessian if weighted else None, 2, torch.float32)
    other = lowrank.find(error, None if weighted else few(tokens).hessian, 2, torch.float32)
    dense, same, different = (lowrank.add_(torch.zeros(24, 32), b) for b in (found, expected, other))
    assert torch.equal(dense, same) and not torch.allclose(dense, different)
