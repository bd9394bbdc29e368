"""Point 6: layers that engines load as one get one format and one group, and what no engine loads is refused at plan time."""

from itertools import pairwise

import pytest
import torch
from conftest import Quiet
from packed_samples import make, raw, sha
from safetensors import safe_open

from qkit.errors import BadRecipe, Unsupported, UsageError
from qkit.families.structure import ModelStructure
from qkit.planning.recipe import make_recipe
from qkit.planning.sizes import linear_bytes
from qkit.sensitivity.candidates import parse_candidates
from qkit.sensitivity.units import unit_bytes, units_of
from qkit.verification.verify import verify
from qkit.workflows.quantize import Request, open_structure, prepare, quantize


def plan(model, **asked):
    """{linear: its plan} of a request that needs no rows."""
    return prepare(Request(model=str(model), **asked)).plan.linears


def recipe_file(tmp_path, text):
    path = tmp_path / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    return path


# ---- group sizes that do not divide ------------------------------------------------------------------------------


@pytest.mark.parametrize(("width", "group"), [(576, 64), (288, 32), (120, None)])
def test_a_group_that_does_not_divide_becomes_64_or_32_or_a_channel(tiny, width, group):
    linears = plan(tiny("llama", intermediate_size=width), scheme="w4a16")
    weights = linears["model.layers.0.mlp.down_proj"].weights
    assert (weights.group, weights.strategy) == (group, "group" if group else "channel")


def test_a_group_that_was_asked_for_and_divides_stays(tiny, tmp_path):
    model = tiny("llama", intermediate_size=192)
    asked = plan(model, scheme="w4a16", group_size=96)
    assert asked["model.layers.0.mlp.down_proj"].weights.group == 96
    recipe = recipe_file(tmp_path, "scheme: w4a16\nrules: [{match: '*.down_proj', group_size: 48}]\n")
    assert plan(model, recipe=recipe)["model.layers.0.mlp.down_proj"].weights.group == 48


# ---- experts -----------------------------------------------------------------------------------------------------


def expert_formats(linears):
    return {(p.weights, p.activations) for name, p in linears.items() if ".experts." in name}


@pytest.mark.parametrize(("inner", "group"), [(320, 64), (96, 32), (72, None)])
def test_experts_share_a_group_that_divides_both_widths(tiny, inner, group):
    model = tiny("qwen3_moe", hidden_size=128, moe_intermediate_size=inner)
    linears = plan(model, scheme="w4a16")
    ((weights, _),) = expert_formats(linears)
    assert weights.group == group
    assert linears["model.layers.0.self_attn.q_proj"].weights.group == 128  # which is no expert
    note = linears["model.layers.0.mlp.experts.0.gate_proj"].note
    assert f"{inner} columns of another projection of the experts are not a multiple of 128" in note


def test_strict_refuses_what_experts_would_share(tiny):
    model = tiny("qwen3_moe", hidden_size=128, moe_intermediate_size=320, head_dim=32)
    with pytest.raises(Unsupported, match=r"experts\.0\.down_proj: 320 input columns are not a multiple"):
        plan(model, scheme="w4a16", strict=True)


TORN = {
    "scheme": "{match: '*.down_proj', scheme: w8a16}",
    "w2": "{match: '*.w2', scheme: w8a16}",
    "group": "{match: ['*.down_proj', '*.w2'], group_size: 16}",
    "one expert": "{match: '*.experts.1.*', scheme: w8a16}",
    "skip": "{match: '*.experts.0.*', skip: it matters}",
}


@pytest.mark.parametrize(
    ("family", "rule"),
    [("qwen3_moe", r) for r in ("scheme", "group", "one expert", "skip")] + [("mixtral", r) for r in ("w2", "group")],
)
def test_experts_of_two_formats_are_refused(tiny, tmp_path, family, rule):
    recipe = recipe_file(tmp_path, f"scheme: w4a16\ngroup_size: 32\nrules: [{TORN[rule]}]\n")
    with pytest.raises(BadRecipe) as refused:
        plan(tiny(family), recipe=recipe)
    said = str(refused.value)
    assert ".experts: the rules give " in said and "run all experts of a layer as one product" in said
    assert "write a rule that covers all of them" in said and "\n" not in said


def test_skipping_some_experts_is_refused_for_any_engine(tiny, tmp_path):
    recipe = recipe_file(tmp_path, f"scheme: w4a16\nengine: any\nrules: [{TORN['skip']}]\n")
    with pytest.raises(BadRecipe, match="no engine loads experts of which some are skipped"):
        plan(tiny("qwen3_moe"), recipe=recipe)


def test_units_of_a_budget_are_counted_with_the_group_that_they_share(tiny):
    structure: ModelStructure = open_structure(str(tiny("qwen3_moe", hidden_size=128, moe_intermediate_size=320)))
    (unit,) = [u for u in units_of(structure) if u.block == 0 and u.groups[0].expert is not None]
    (candidate,) = parse_candidates("int4", None)
    linears = plan(structure.checkpoint.path, scheme="w4a16")
    planned = [linears[x.name] for x in unit.linears]
    assert unit_bytes(unit, candidate, structure) == sum(
        linear_bytes(p.weights, p.activations, p.shape, torch.bfloat16) for p in planned
    )


# ---- formats that engines have one kernel for --------------------------------------------------------------------

WIDE = {"hidden_size": 128, "intermediate_size": 256}


def test_fp8_blocks_that_a_fused_part_does_not_fill_are_refused(tiny, tmp_path):
    with pytest.raises(Unsupported, match=r"k_proj: its 64 output rows .* multiple of 128, and vLLM .* v_proj"):
        plan(tiny("llama", **WIDE), scheme="fp8_block", samples=2)
    assert plan(tiny("llama", **WIDE, head_dim=64), scheme="fp8_block")
    recipe = recipe_file(tmp_path, "scheme: fp8_block\nengine: any\n")
    assert plan(tiny("llama", **WIDE), recipe=recipe)


@pytest.mark.parametrize("asked", [{}, {"group_size": 64}, {"group_size": -1}])
def test_w4a8_fp8_has_groups_of_128_or_is_refused(tiny, tmp_path, asked):
    model = tiny("llama", **WIDE) if asked else tiny("llama")
    with pytest.raises(Unsupported, match="loads groups of 128 alone"):
        plan(model, scheme="w4a8-fp8", **asked)
    recipe = recipe_file(tmp_path, "scheme: w4a8-fp8\nengine: any\n")
    assert plan(model, recipe=recipe, **asked)
    assert plan(tiny("llama", **WIDE), scheme="w4a8-fp8")


def test_fp8_has_no_groups():
    for scheme in ("fp8", "fp8_dynamic"):
        with pytest.raises(UsageError, match="fixed scale layout"):
            make_recipe({"scheme": scheme, "group_size": 64}, "command line")


# ---- scales that fused parts share -------------------------------------------------------------------------------

GROUPS = (
    [f"self_attn.{part}_proj" for part in "qkv"],
    ["mlp.gate_proj", "mlp.up_proj"],
    ["block_sparse_moe.experts.2.w1", "block_sparse_moe.experts.2.w3"],
)


@pytest.mark.parametrize("method", ["rtn", "gptq", "smoothquant+gptq", "signround"])
@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_fp8_of_one_scale_a_tensor_shares_it(tiny, tmp_path, calib, family, method):
    if (family, method) == ("mixtral", "signround"):
        pytest.skip("learned rounding is refused for experts")
    out = tmp_path / "out"
    asked = Request(model=str(tiny(family)), scheme="fp8", method=method, calib=calib, samples=4, seqlen=32, threads=1)
    report = quantize(asked, out, Quiet())
    assert report.problems == [] and report.checks["fused"] > 0
    with safe_open(out / "model.safetensors", "pt") as f:
        names = set(f.keys())
        for parts in GROUPS:
            for kind in ("weight_scale", "input_scale"):
                stored = [f"model.layers.1.{part}.{kind}" for part in parts]
                values = [f.get_tensor(name) for name in stored if name in names]
                assert len(values) in (0, len(parts)) and all(torch.equal(a, b) for a, b in pairwise(values))


def test_shared_scale_covers_every_member(tiny, tmp_path, calib):
    """The largest weight of the group is the largest code of one member, and no member saturates."""
    model = tiny("llama")
    quantize(
        Request(model=str(model), scheme="fp8", calib=calib, samples=4, seqlen=32, threads=1), tmp_path / "out", Quiet()
    )
    with (
        safe_open(tmp_path / "out" / "model.safetensors", "pt") as f,
        safe_open(model / "model.safetensors", "pt") as g,
    ):
        names = [f"model.layers.0.self_attn.{part}_proj" for part in "qkv"]
        codes = [float(f.get_tensor(f"{name}.weight").float().abs().max()) for name in names]
        peaks = [float(g.get_tensor(f"{name}.weight").float().abs().max()) for name in names]
    assert max(codes) == 448.0 and codes.index(448.0) == peaks.index(max(peaks))


@pytest.mark.parametrize("scalar", ["weight_scale", "input_scale"])
def test_verify_names_scales_that_differ_within_a_fused_group(tmp_path, scalar):
    sample, name = make("fp8-static"), "model.layers.0.self_attn.k_proj"
    tensors = sample.shards["model.safetensors"]
    tensors[f"{name}.{scalar}"] = tensors[f"{name}.{scalar}"] * 2
    weight = tensors[f"{name}.weight"].float() * tensors[f"{name}.weight_scale"].float()
    sample.record["linears"][name]["weight_sha256"] = sha(raw(weight))  # so that nothing else is wrong
    sample.record["plain"][f"{name}.input_scale"]["sha256"] = sha(raw(tensors[f"{name}.input_scale"]))
    sample.write(tmp_path / "out")
    said = {problem.what.partition(":")[0] for problem in verify(tmp_path / "out").problems}
    assert said == {f"{scalar} differs within a fused group"}
