"""Point 17: what a recipe says at its top holds wherever a rule says nothing else, and 'engine: any' lifts rules of engines."""

import pytest
from conftest import Quiet
from safetensors.torch import load_file

from qkit.errors import BadRecipe, UsageError
from qkit.planning.recipe import make_recipe
from qkit.workflows.quantize import Request, prepare, quantize


@pytest.fixture
def planned(tiny, tmp_path):
    """``planned(text)``: {last part of a linear's name: its plan} of block 0 of a tiny Llama under that recipe."""

    def plan(text, family="llama"):
        path = tmp_path / "recipe.yaml"
        path.write_text(text, encoding="utf-8")
        linears = prepare(Request(model=str(tiny(family)), recipe=path, samples=8, seqlen=32)).plan.linears
        return {name.rpartition(".")[2]: p for name, p in linears.items() if ".layers.0." in name}

    return plan


def test_group_size_of_the_top_reaches_rules_that_name_a_scheme(planned):
    found = planned("scheme: w4a16\ngroup_size: 16\nrules: [{match: '*.down_proj', scheme: w8a16}]\n")
    assert (found["down_proj"].weights.name, found["down_proj"].weights.group) == ("int8", 16)
    assert found["q_proj"].weights.group == 16


@pytest.mark.parametrize("scheme", ["nvfp4a16", "mxfp4a16", "fp8_dynamic", "w8a8"])
def test_group_size_of_the_top_does_not_apply_to_fixed_layouts(planned, scheme):
    found = planned(f"scheme: w4a16\ngroup_size: 32\nrules: [{{match: '*.down_proj', scheme: {scheme}}}]\n")
    alone = planned(f"scheme: {scheme}\n")
    assert found["down_proj"].weights == alone["down_proj"].weights
    assert found["q_proj"].weights.group == 32


@pytest.mark.parametrize("scheme", ["nvfp4a16", "mxfp4a16", "fp8", "fp8_dynamic"])
def test_a_rules_own_group_size_for_a_fixed_layout_is_an_error(planned, scheme):
    with pytest.raises(UsageError, match="fixed scale layout"):
        planned(f"scheme: w4a16\nrules: [{{match: '*.down_proj', scheme: {scheme}, group_size: 64}}]\n")


def test_a_rules_own_group_size_wins(planned):
    rule = "{match: '*.down_proj', scheme: w8a16, group_size: 32}"
    found = planned(f"scheme: w4a16\ngroup_size: 16\nrules: [{rule}]\n")
    assert found["down_proj"].weights.group == 32


def test_channels_of_the_top_reach_rules(planned):
    found = planned("scheme: w4a16\ngroup_size: -1\nrules: [{match: '*.down_proj', scheme: w8a16}]\n")
    assert found["down_proj"].weights.strategy == "channel"


def test_options_of_the_top_hold_for_the_solvers_that_have_them(planned):
    rules = "rules: [{match: '*.down_proj', solver: rtn}, {match: '*.o_proj', scheme: w8a16, options: {damp: 0.5}}]"
    found = planned(f"scheme: w4a16\nmethod: gptq\noptions: {{damp: 0.02, signed: true}}\n{rules}\n")
    assert found["q_proj"].options["damp"] == 0.02
    assert (found["down_proj"].solver, found["down_proj"].options) == ("rtn", {"search": "mse", "signed": True})
    assert found["o_proj"].options["damp"] == 0.5


def test_options_of_the_top_for_the_solver_of_a_rule(planned):
    found = planned("scheme: w4a16\noptions: {damp: 0.02}\nrules: [{match: '*.down_proj', solver: gptq}]\n")
    assert found["down_proj"].options["damp"] == 0.02
    assert found["q_proj"].solver == "rtn"


@pytest.mark.parametrize(
    "recipe",
    [
        {"scheme": "w4a16", "options": {"damp": 0.02}},
        {"scheme": "w4a16", "method": "gptq", "rules": [{"match": "*", "solver": "rtn", "options": {"damp": 0.02}}]},
        {"scheme": "w4a16", "method": "gptq", "options": {"dampf": 0.02}, "rules": [{"match": "*", "solver": "rtn"}]},
    ],
)
def test_options_that_no_solver_has_are_errors(recipe):
    with pytest.raises(UsageError, match="unknown option"):
        make_recipe(recipe, "command line")


TORN = "{match: '*.k_proj', scheme: w8a16}"


def test_rules_of_engines_hold_by_default(planned):
    for engine in ("", "engine: default\n"):
        with pytest.raises(BadRecipe, match=r"k_proj W8A16 .*one scheme and one group size.*engine: any"):
            planned(f"scheme: w4a16\ngroup_size: 32\n{engine}rules: [{TORN}]\n")


def test_any_engine_lifts_them(planned):
    found = planned(f"scheme: w4a16\ngroup_size: 32\nengine: any\nrules: [{TORN}]\n")
    assert (found["q_proj"].scheme, found["k_proj"].scheme) == ("W4A16", "W8A16")


def test_an_unknown_engine_is_refused():
    with pytest.raises(BadRecipe, match="engine"):
        make_recipe({"scheme": "w4a16", "engine": "tensorrt"}, "command line")


def test_group_size_of_the_top_reaches_the_schemes_of_towers(vlm, tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("scheme: w4a16\ngroup_size: 16\ntargets: {vision: w8a16, projector: w8a8}\n", encoding="utf-8")
    linears = prepare(Request(model=str(vlm("llava")), recipe=path)).plan.linears
    found = {(p.scheme, p.weights.group) for p in linears.values()}
    assert found == {("W4A16", 16), ("W8A16", 16), ("W8A8", None)}


@pytest.mark.parametrize("rule", ["solver: rtn", "options: {damp: 0.5}"])
def test_a_rule_about_one_of_several_layers_that_share_an_input_is_followed(rule, tiny, tmp_path, calib):
    """They were solved together, all as the first of them was."""
    made = {}
    for name, rules in {"plain": "", "rule": f"rules: [{{match: '*.k_proj', {rule}}}]"}.items():
        recipe = tmp_path / f"{name}.yaml"
        recipe.write_text(f"scheme: w4a16\nmethod: gptq\ngroup_size: 32\n{rules}\n", encoding="utf-8")
        request = Request(model=str(tiny("llama")), recipe=recipe, calib=calib, samples=8, seqlen=32, threads=1)
        assert quantize(request, tmp_path / name, Quiet()).problems == []
        made[name] = load_file(tmp_path / name / "model.safetensors")
    first = "model.layers.0.self_attn"
    assert made["plain"][f"{first}.q_proj.weight_packed"].equal(made["rule"][f"{first}.q_proj.weight_packed"])
    assert not made["plain"][f"{first}.k_proj.weight_packed"].equal(made["rule"][f"{first}.k_proj.weight_packed"])


@pytest.mark.parametrize("scheme", ["nvfp4a16", "fp8"])
def test_layers_that_share_a_scale_have_one_solver(planned, scheme):
    with pytest.raises(BadRecipe, match=r"q_proj gptq, k_proj rtn, v_proj gptq.* share a scale"):
        planned(f"scheme: {scheme}\nmethod: gptq\nrules: [{{match: '*.k_proj', solver: rtn}}]\n")
