"""Budgets over types of GGUF: one for every tensor, the embeddings and the head among them, within the bytes of the file."""

import json
from dataclasses import replace

import pytest
from conftest import Quiet

from qkit.allocation.limits import BudgetRequest, parse_budget
from qkit.errors import JobConflict, UsageError
from qkit.families.ends import EMBEDDINGS, HEAD
from qkit.files.gguf_container import MODEL
from qkit.planning.request import Request
from qkit.sensitivity.candidates import are_gguf, for_widths, parse_candidates
from qkit.sensitivity.profile import Profile
from qkit.verification.gguf_header import read_gguf
from qkit.workflows.budget import allocate_budget, allocation_problem
from qkit.workflows.profile import ProfileRequest, audit, plan_measurement, profile
from qkit.workflows.quantize import prepare, quantize

pytest.importorskip("gguf", reason="the gguf package is not installed: pip install 'qkit[gguf]'")
TABLE, DOWN = "model.embed_tokens", "model.layers.0.mlp.down_proj"
CANDIDATES = "q2_k,q4_k,q8_0"
# Of the widths 32 and 256: K types where 256 divides, and what llama.cpp takes elsewhere.
TYPES = {"Q2_K", "Q4_K", "IQ4_NL", "Q5_0", "Q8_0"}


def asked(model, **fields):
    return Request(model=str(model), method="rtn", samples=2, seqlen=16, threads=1, **fields)


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "own"])
def measured(request, tiny, calib, tmp_path_factory):
    """(tied, model, folder of its profile)"""
    model = tiny("llama", tie_word_embeddings=request.param, num_hidden_layers=1, intermediate_size=256)
    folder = tmp_path_factory.mktemp("profile") / "profile"
    measures = ("weight", "output", "fisher", "pqi", "kl")
    profile(ProfileRequest(asked(model, calib=calib), CANDIDATES, measures, points=1), folder, Quiet())
    return request.param, model, folder


def budget_of(folder, bits=None, size=None, **fields):
    return BudgetRequest(budget=parse_budget(bits, size, None, None), profile=folder, named=True, **fields)


def test_every_tensor_is_a_unit_with_the_types_that_its_width_allows(measured):
    tied, _, folder = measured
    known = Profile.load(folder)
    units = {u.key: u for u in known.units}
    assert set(known.candidates) == TYPES and all(len(u.linears) == 1 for u in known.units)
    assert {"model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.k_proj", DOWN, TABLE} <= units.keys()
    assert ("lm_head" in units) != tied
    assert units[DOWN].choices.keys() == TYPES
    assert units[TABLE].choices.keys() == {"IQ4_NL", "Q5_0", "Q8_0"}
    for unit in units.values():
        assert unit.choices["IQ4_NL"].bytes < unit.choices["Q8_0"].bytes
        assert unit.choices["IQ4_NL"].costs["kl"] > unit.choices["Q8_0"].costs["kl"] > 0
        assert unit.choices["IQ4_NL"].costs["weight"] > unit.choices["Q8_0"].costs["weight"] > 0
    assert units[DOWN].choices["Q2_K"].costs["output"] > units[DOWN].choices["Q4_K"].costs["output"] > 0


def test_the_file_has_the_types_and_the_bytes_of_the_allocation(measured, calib, tmp_path):
    _, model, folder = measured
    size = 350_000 if measured[0] else 520_000
    request = asked(model, calib=calib)
    budgeted = allocate_budget(request, budget_of(folder, size=f"{size}B"), Quiet())
    plan = prepare(budgeted.request).plan
    quantize(budgeted.request, tmp_path / "out", Quiet())
    written = (tmp_path / "out" / MODEL).stat().st_size
    assert 0.9 * size < written == plan.packed_bytes <= size
    limit, used = budgeted.allocation.limit, budgeted.allocation.bytes
    assert limit is not None and size - written == limit - used  # not a byte is counted that is not there
    names = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["tensors"]
    tensors = read_gguf(tmp_path / "out" / MODEL).tensors
    picks = budgeted.allocation.picks
    assert {k: tensors[names[f"{k}.weight"][1][0][0]].dtype for k in picks} == picks and len(set(picks.values())) > 1


def test_bits_count_every_matrix(measured, calib):
    _, model, folder = measured
    budgeted = allocate_budget(asked(model, calib=calib), budget_of(folder, bits=5.0), Quiet())
    weights = sum(u.weights for u in budgeted.profile.units)
    assert 4.5 < 8 * budgeted.allocation.bytes / weights <= 5.0


def test_a_named_head_is_fixed_and_counted(measured, calib, tmp_path):
    tied, model, _ = measured
    request = asked(model, calib=calib, head="q8_0")
    size = 480_000 if tied else 640_000
    budget_request = budget_of(tmp_path / "new", size=f"{size}B", candidates=CANDIDATES)
    budgeted = allocate_budget(request, budget_request, Quiet())
    assert "lm_head" not in budgeted.allocation.picks and (TABLE in budgeted.allocation.picks) != tied
    plan = prepare(budgeted.request).plan
    assert plan.ends[TABLE if tied else "lm_head"].scheme == "Q8_0" and plan.packed_bytes <= size


def test_layers_that_stay_as_they_are_count_too(tiny, calib, tmp_path):
    model = tiny("llama", num_hidden_layers=1, intermediate_size=80)  # 32 does not divide the input of down_proj
    budget_request = budget_of(tmp_path / "new", size="452000B", candidates="q4_0,q8_0,bf16")
    budgeted = allocate_budget(asked(model, calib=calib), budget_request, Quiet())
    assert DOWN not in budgeted.allocation.picks and set(budgeted.profile.candidates) == {"Q4_0", "Q8_0", "keep"}
    assert prepare(budgeted.request).plan.packed_bytes == 452_000 - (
        budgeted.allocation.limit - budgeted.allocation.bytes
    )


def test_plans_and_the_audit_measure_what_a_unit_can_have(measured, calib, tmp_path):
    _, model, folder = measured
    base, known = asked(model, calib=calib), Profile.load(folder)
    with plan_measurement(base, known, folder, Quiet()) as divergence:
        low = divergence({DOWN: "Q2_K", TABLE: "IQ4_NL"})
        assert low > divergence({DOWN: "Q8_0", TABLE: "Q8_0"}) > 0
    request = ProfileRequest(base, CANDIDATES, ("weight", "kl"), points=1)
    found = audit(request, folder, known, calib, Quiet(), plans=1)
    alone = {p["name"]: p["kl"] for p in found["plans"]}
    assert len(alone) == len(TYPES) + 1
    assert alone["all Q2_K"] == known_cost(known, DOWN, "Q2_K")  # which no other width can have


def known_cost(known, unit, name):
    return next(u.choices[name].costs["kl"] for u in known.units if u.key == unit)


def test_a_type_as_scheme_beside_a_budget_asks_for_types_of_gguf(run, tiny, small, tmp_path):
    model = tiny("llama", num_hidden_layers=1)
    common = ("plan", "--model", model, "--method", "gptq", *small)
    code, said, err = run(*common, "--size", "500000B", "--scheme", "Q4_K", "--out", tmp_path / "out")
    assert code == 0 and "a profile of gguf in" in said, err
    code, said, _ = run(*common, "--bits", "6", "--candidates", "q4_k,q6_k", "--out", tmp_path / "out")
    assert code == 0 and "reach 5.500 bits a weight to 8.500" in said


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--candidates", "q4_k,int4"), "Q4_K is a type of GGUF and W4A16 is not"),
        (("--candidates", "q4_k+0.5%"), "no sparse and no low-rank parts"),
        (("--candidates", "q4_k", "--group-size", 32), "have groups of their own"),
        (("--candidates", "q4_k,q6_k", "--method", "rotate+gptq"), "rotate changes the model before it is quantized"),
        (("--candidates", "q4_k", "--export", "qkit"), "--export and scheme"),
        (("--scheme", "q4_k", "--candidates", "int4,int8"), "which are no types of GGUF"),
    ],
    ids=["mixed", "sparse", "group", "rotate", "export", "scheme"],
)
def test_what_does_not_go_together_is_refused_before_measuring(run, tiny, small, tmp_path, options, words):
    model, out = tiny("llama", num_hidden_layers=1), tmp_path / "out"
    code, _, err = run("quantize", "--model", model, "--bits", 5, *options, *small, "--out", out)
    assert code == 2 and words in err, err
    assert not (tmp_path / "out.profile").exists()


def test_widths_decide_which_types_are_measured():
    found = for_widths(parse_candidates("q2_k,q6_k,bf16", None), [576, 1536])
    assert [c.name for c in found] == ["Q2_K", "IQ4_NL", "Q6_K", "Q8_0", "keep"] and are_gguf(found)
    assert for_widths(found, [576, 1536]) == found
    assert [c.name for c in for_widths(found, [576])] == ["IQ4_NL", "Q8_0", "keep"]


def test_a_profile_of_another_kind_is_told_from_one_of_gguf(measured, calib):
    _, model, folder = measured
    with pytest.raises(JobConflict, match="measured with another --embeddings"):
        profile(ProfileRequest(asked(model, calib=calib), "int4", ("weight", "kl"), points=1), folder, Quiet())


def test_ends_of_a_profile_may_be_named(measured, calib):
    tied, model, folder = measured
    for option in (EMBEDDINGS,) if tied else (EMBEDDINGS, HEAD):
        with pytest.raises(UsageError, match="the budget decides"):
            allocate_budget(asked(model, calib=calib, **{option: "q8_0"}), budget_of(folder, bits=5.0), Quiet())


def test_the_cost_of_a_tied_matrix_is_that_of_the_weights_that_the_solver_gives(tiny, calib, tmp_path):
    model = tiny("llama", num_hidden_layers=1, tie_word_embeddings=True)
    options = {"method": "gptq", "calib": calib, "samples": 2, "seqlen": 16, "threads": 1}
    profile(
        ProfileRequest(Request(model=str(model), **options), "q4_0", ("weight", "kl")), tmp_path / "profile", Quiet()
    )
    quantize(Request(model=str(model), scheme="q4_0", head="q4_0", **options), tmp_path / "out", Quiet())
    journal = (tmp_path / "profile" / "probes" / "q4_0" / "journal.jsonl").read_text().splitlines()
    (probed,) = (found for line in journal if (found := json.loads(line)["linears"].get(TABLE)) is not None)
    written = json.loads((tmp_path / "out" / "qkit.json").read_text())["linears"][TABLE]
    assert probed["weight_sha256"] == written["weight_sha256"] and written["solver"] == "gptq"


@pytest.mark.parametrize(
    ("candidates", "most", "expected"),
    [
        ("q4_0,q8_0", 1e14, ("weight", "output", "pqi", "kl")),
        ("q4_0,q8_0", 1.0, ("fisher",)),
        ("int4,w8a8", 1.0, ("weight", "output", "pqi", "kl")),  # fisher does not see quantized inputs
    ],
    ids=["small model", "large model", "quantized inputs"],
)
def test_a_budget_measures_what_does_not_take_hours(candidates, most, expected, tiny, calib, tmp_path, monkeypatch):
    from qkit.workflows import profile as workflow

    model = tiny("llama", num_hidden_layers=1)
    monkeypatch.setattr(workflow, "KL_OPERATIONS", most)
    budget_request = budget_of(tmp_path / "new", bits=7.0, candidates=candidates)
    request = replace(asked(model, calib=calib), method="gptq")
    problem = allocation_problem(request, budget_request)
    assert problem.profile_request.measures == expected and problem.measure == expected[-1]
    assert problem.profile_request.method == ("rtn" if expected == ("fisher",) else "gptq")
    budgeted = allocate_budget(request, budget_request, Quiet())
    assert budgeted.profile.measures == expected and budgeted.allocation.measure == expected[-1]
    assert budgeted.request.method == "gptq"
    # Once it is there, the profile decides: the same command gives the same plan.
    monkeypatch.setattr(workflow, "KL_OPERATIONS", 1e14)
    assert allocate_budget(request, budget_request, Quiet()).allocation == budgeted.allocation


def test_a_quick_measure_is_the_only_one_that_a_budget_takes(tiny, calib, tmp_path):
    model = tiny("llama", num_hidden_layers=1)
    budget_request = budget_of(tmp_path / "new", bits=5.0, candidates="q4_0,q8_0", measure="fisher")
    budgeted = allocate_budget(asked(model, calib=calib), budget_request, Quiet())
    assert budgeted.profile.measures == ("fisher",) and budgeted.allocation.cost > 0
    with pytest.raises(UsageError, match="taste"):
        allocate_budget(
            asked(model, calib=calib), replace(budget_request, profile=tmp_path / "b", measure="taste"), Quiet()
        )
