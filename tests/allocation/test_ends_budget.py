"""Embeddings and output head in a profile, and in the budget that reads it."""

import pytest
from conftest import Quiet

from qkit.allocation.limits import BudgetRequest, parse_budget
from qkit.errors import UsageError
from qkit.planning.request import Request
from qkit.sensitivity.profile import Profile
from qkit.workflows.budget import allocate_budget, allocation_problem
from qkit.workflows.profile import ProfileRequest, profile
from qkit.workflows.quantize import prepare, quantize

TABLE = "model.embed_tokens"
MEASURES = ("weight", "output", "pqi", "first_x", "kl")


def asked(model, calib, **ends):
    return Request(model=str(model), method="rtn", group_size=32, calib=calib, samples=2, seqlen=16, threads=1, **ends)


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "own"])
def measured(request, tiny, calib, tmp_path_factory):
    """(tied, model, folder of its profile with both ends)"""
    model = tiny("llama", tie_word_embeddings=request.param, num_hidden_layers=1)
    folder = tmp_path_factory.mktemp("profile") / "profile"
    base = asked(model, calib, embeddings="auto", head="auto")
    profile(ProfileRequest(base, "int4,int8,bf16,w8a8", MEASURES, points=1), folder, Quiet())
    return request.param, model, folder


def budget_of(folder, bits=None, size=None):
    return BudgetRequest(
        budget=parse_budget(bits, size, None, None),
        profile=folder,
        candidates=None,
        measure="kl",
        floors=(),
        ceilings=(),
        evaluations=0,
        named=True,
        cache=None,
    )


def test_the_ends_are_units_with_bytes_and_costs(measured):
    tied, _, folder = measured
    known = Profile.load(folder)
    units = {u.key: u for u in known.units}
    assert (TABLE in units) and (("lm_head" in units) != tied)
    table = units[TABLE]
    assert set(table.choices) == {"W4A16", "W8A16", "keep"}  # no engine rounds tokens
    assert 0 < table.choices["W4A16"].bytes < table.choices["W8A16"].bytes < table.choices["keep"].bytes
    for measure in ("weight", "output", "kl"):
        four, eight = (table.choices[n].costs[measure] for n in ("W4A16", "W8A16"))
        assert four > eight > 0
    assert table.choices["W4A16"].costs["first_x"] == 0


def test_a_budget_decides_and_the_result_keeps_it(measured, calib, tmp_path):
    tied, model, folder = measured
    request = asked(model, calib, embeddings="auto", head="auto")
    solved = allocate_budget(request, budget_of(folder, bits=4.5), Quiet())
    plan = prepare(solved.request).plan
    assert set(plan.ends) == ({TABLE} if tied else {TABLE, "lm_head"})
    assert plan.packed_bytes == solved.allocation.bytes + solved.profile.fixed_bytes
    assert 8 * solved.allocation.bytes <= 4.5 * sum(u.weights for u in solved.profile.units)
    assert quantize(solved.request, tmp_path / "out", Quiet()).ok


def test_a_named_format_counts_in_the_budget(measured, calib, tiny, tmp_path):
    """The bytes that a format of the ends saves are there for the blocks."""
    tied, model, _ = measured
    folder = tmp_path / "profile"
    profile(ProfileRequest(asked(model, calib), "int4,int8,bf16", ("kl",)), folder, Quiet())
    whole = budget_of(folder, size="10MB")
    saved = [
        allocation_problem(asked(model, calib, **ends), whole).profile.fixed_bytes
        for ends in ({}, {"embeddings": "int8"}, {"embeddings": "int4:32", "head": "int4:32"})
    ]
    assert (
        saved[0] - saved[1] == 4096 * 64 - 4096 * 2 - 16
    )  # of 16 bits a weight 8, a scale for each row, and the shape
    assert saved[1] - saved[2] > (1 if tied else 3) * 100_000
    with pytest.raises(UsageError, match="does not include it"):
        allocate_budget(asked(model, calib, embeddings="auto"), whole, Quiet())


def test_a_format_beside_a_profile_that_decides_is_refused(measured, calib):
    _, model, folder = measured
    with pytest.raises(UsageError, match="the budget decides"):
        allocate_budget(asked(model, calib, head="auto", embeddings="int8"), budget_of(folder, bits=4.5), Quiet())


def test_auto_without_a_budget_is_refused(measured):
    _, model, _ = measured
    with pytest.raises(UsageError, match="a budget decides it"):
        prepare(Request(model=str(model), scheme="w4a16", embeddings="auto"))


def test_candidates_that_suit_no_end_are_refused(measured, calib, tmp_path):
    _, model, _ = measured
    with pytest.raises(UsageError, match="--embeddings auto: expected int2 to int8 or bf16"):
        profile(ProfileRequest(asked(model, calib, embeddings="auto"), "w8a8", ("kl",)), tmp_path / "p", Quiet())
