"""--engine, --gpu and --tp: which plans they allow, and the group sizes that plans get."""

import json

import pytest

from qkit.errors import Unsupported, UsageError
from qkit.kvcache.policy import parse
from qkit.planning.engine_rules import named
from qkit.planning.request import Request
from qkit.sensitivity.candidates import parse_candidates
from qkit.sensitivity.profile import profile_of_shapes
from qkit.tensor.formats import SCHEMES
from qkit.workflows.engine_candidates import loadable_choices
from qkit.workflows.quantize import prepare


def plan(folder, scheme, **options):
    return prepare(Request(model=str(folder), scheme=scheme, method="rtn", **options)).plan


def groups(planned) -> dict[str, int | None]:
    return {name.rpartition(".")[2]: p.weights.group for name, p in planned.linears.items()}


@pytest.mark.parametrize(
    ("scheme", "options", "error", "said"),
    [
        (
            "w4a16_asym",
            {"engine": "transformers"},
            Unsupported,
            (
                "unpacked zero points",
                "inputs in 16 bits: w2a16 to w8a16, nvfp4a16, mxfp4a16, mxfp8a16; in 8 bits: w8a8",
            ),
        ),
        (
            "w4a16",
            {"engine": "vllm", "outliers": 1.0},
            Unsupported,
            ("does not know quant_method 'qkit'", "leave out what asks for qkit's own method"),
        ),
        ("w4a16", {"engine": "llama.cpp"}, UsageError, ("reads GGUF files alone", "q4_k")),
        ("q4_0", {"engine": "vllm"}, UsageError, ("makes a GGUF file", "--engine llama.cpp")),
        (
            "w8a8",
            {"engine": "vllm", "gpu": "sm80,sm120"},
            Unsupported,
            ("on sm120", "no INT8", "w2a16_asym to w8a16_asym"),
        ),
        (
            "w8a16",
            {"engine": "vllm", "gpu": "cpu"},
            Unsupported,
            (
                "on cpu",
                "it has no kernel for weights in int8",
                " and inputs in 16 bits",
                "; it loads on sm75, sm80",
                "; transformers + compressed-tensors and qkit load it: schemes that vLLM loads",
                "inputs in 16 bits: w4a16, w4a16_asym; in 8 bits: w8a8, w4a8, fp8_dynamic",
            ),
        ),
    ],
)
def test_what_an_engine_does_not_load_is_refused(scheme, options, error, said, tiny):
    with pytest.raises(error) as refused:
        plan(tiny("llama"), scheme, **options)
    missing = [part for part in said if part not in str(refused.value)]
    assert not missing and "\n" not in str(refused.value), str(refused.value)


def test_all_schemes_are_named_and_long_runs_in_short():
    names = "W2A16 W3A16 W4A16 W8A16 W2A16_ASYM W3A16_ASYM W8A8 NVFP4A16 NVFP4".split()
    assert named([SCHEMES[name] for name in names]) == (
        "inputs in 16 bits: w2a16 to w4a16, w8a16, w2a16_asym, w3a16_asym, nvfp4a16; in 8 bits: w8a8; in 4 bits: nvfp4"
    )


@pytest.mark.parametrize("gpu", ["sm75", "sm80", "sm89", "sm120"])
def test_a_cache_with_a_scale_for_each_head_needs_its_gpus(gpu, tiny):
    cache = {"kv": parse("fp8_head").to_json(), "samples": 4, "seqlen": 16}
    with pytest.raises(Unsupported, match=f"on {gpu}: a KV cache with a scale for each head .* use --kv fp8"):
        plan(tiny("llama"), "w4a16", engine="vllm", gpu=f"sm90,{gpu}", **cache)
    assert plan(tiny("llama"), "w4a16", engine="vllm", gpu="sm90,sm100", **cache).kv


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--scheme", "w4a16"], None),
        (["--scheme", "q8_0"], None),
        (
            ["--scheme", "w4a16", "--export", "qkit"],
            "no engine loads the result on a GPU: vLLM does not load this plan",
        ),
        (
            ["--scheme", "w4a16", "--outliers", "1"],
            "leave out what asks for qkit's own method (that format has no place",
        ),
        (["--scheme", "w8a8", "--gpu", "sm100"], "warning: vLLM does not load this plan on sm100: its CUTLASS kernel"),
    ],
)
def test_a_plan_that_no_engine_loads_is_told_at_plan_time(options, said, tiny, run):
    code, out, _ = run("plan", "--model", tiny("llama"), *options)
    assert code == 0 and "[]" not in out
    warnings = [line for line in out.splitlines() if line.startswith("warning:")]
    assert len(warnings) == (said is not None) and all(said in line for line in warnings)


def test_without_an_engine_the_same_plans_stand(tiny):
    assert plan(tiny("llama"), "w4a16_asym").recipe["engine"] == "default"
    assert plan(tiny("llama"), "w8a16").linears


def test_groups_that_ranks_do_not_cut(tiny):
    """96 columns of down_proj are 48 on each of two ranks, which neither 64 nor 32 divides."""
    assert groups(plan(tiny("llama"), "w4a16"))["down_proj"] == 32
    two = plan(tiny("llama"), "w4a16", tp=2)
    assert groups(two)["down_proj"] is None and groups(two)["o_proj"] == 32 and groups(two)["q_proj"] == 64
    note = next(p.note for name, p in two.linears.items() if name.endswith("o_proj"))
    assert "32 on each of 2 ranks" in note or "64 columns are not a multiple of 128" in note


def test_a_group_that_was_asked_for_stays(tiny):
    assert groups(plan(tiny("llama"), "w4a16", group_size=24, tp=2))["down_proj"] == 24


def test_the_warning_is_there_at_plan_time(tiny, run):
    code, out, _ = run("plan", "--model", tiny("llama", hidden_size=96), "--scheme", "w4a16", "--group-size", "96")
    assert code == 0 and "does not fit Humming's tiles, and the result may be wrong" in " ".join(out.split())


def test_a_width_that_a_fixed_group_does_not_divide_stays_in_16_bits(tiny):
    narrow = tiny("llama", intermediate_size=80)
    with pytest.raises(Unsupported, match="not a multiple of the group size 32"):
        plan(narrow, "mxfp4")
    kept = plan(narrow, "mxfp4", engine="vllm")
    assert {n.rpartition(".")[2] for n in kept.skipped if "layers" in n} == {"down_proj"}
    assert "stays in 16 bits" in next(why for n, why in kept.skipped.items() if n.endswith("down_proj"))


def test_experts_have_one_group_and_stay_or_go_together(tiny):
    """64 columns into an expert and 32 out of it: one group for all, 32; on two ranks 16 each, so one scale per channel."""
    assert {
        g for name, g in groups(plan(tiny("qwen3_moe"), "w4a16")).items() if name in ("gate_proj", "down_proj")
    } == {32}
    kept = plan(tiny("qwen3_moe", moe_intermediate_size=48), "mxfp4", engine="vllm")
    assert not any("experts" in name for name in kept.linears)


def test_a_mixture_keeps_the_group_of_fused_layers(tiny, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("rules:\n  - {match: '*.self_attn.*', scheme: w8a16}\n  - {match: '*.mlp.*', scheme: w3a16}\n")
    made = plan(tiny("llama", hidden_size=96), "w4a16", recipe=recipe, tp=1)
    found = groups(made)
    assert len({found[x] for x in ("q_proj", "k_proj", "v_proj")}) == 1 and found["gate_proj"] == found["up_proj"]


def test_a_budget_offers_what_the_engine_loads(tiny):
    folder = tiny("llama")
    request = Request(model=str(folder), engine="vllm", gpu="cpu")
    structure = prepare(Request(model=str(folder), scheme="w4a16", method="rtn")).structure
    candidates = parse_candidates("int3,int4,int4+1%,w8a8,bf16", None)
    asked = {"parts": ("language",), "group_sizes": {}}
    profile = profile_of_shapes(structure, candidates, ("kl",), asked)
    offered = loadable_choices(profile, structure, request)
    assert all(set(u.choices) == {"W4A16", "W8A8", "keep"} for u in offered.units)
    assert loadable_choices(profile, structure, Request(model=str(folder))) is profile
    with pytest.raises(UsageError, match="in none of W3A16"):
        loadable_choices(profile_of_shapes(structure, candidates[:1], ("kl",), asked), structure, request)


def test_rows_say_how_they_are_known(tiny, run, tmp_path):
    report = tmp_path / "plan.json"
    code, _, _ = run(
        "plan", "--model", tiny("llama"), "--scheme", "w4a16", "--tp", 2, "--gpu", "sm80,sm90", "--json", report
    )
    rows = json.loads(report.read_text())["engine_rows"]
    assert code == 0 and all(row["known"] for row in rows)
    vllm = next(row for row in rows if row["engine"] == "vLLM")
    assert vllm["known"] == "from a table (vLLM 0.32)" and set(vllm["kernels"]) == {"sm80", "sm90"}


def test_an_interpreter_needs_vllm(tiny, run):
    code, _, err = run("plan", "--model", tiny("llama"), "--scheme", "w4a16", "--python", "/bin/true")
    assert code == 2 and "add --engine vllm" in err
