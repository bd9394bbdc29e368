"""Who names no method gets one that fits schemes and model; what it is, why, and what the next level costs is said."""

import json

import pytest

from qkit.planning.quality import kind_of_request, preferred, with_setting
from qkit.planning.quality_levels import LEVELS, SETTINGS, kind_of_schemes
from qkit.planning.request import Request, recipe_of
from qkit.system.words import times
from qkit.tensor.formats import GGUF_SCHEMES, SCHEMES
from qkit.workflows.quantize import prepare

GROUP = ("--group-size", 32)


def quality_of(run, tmp_path, *options):
    """What plan says of a request, as words and as JSON."""
    code, said, err = run("plan", *options, "--json", tmp_path / "p.json")
    assert code == 0, err
    return " ".join(said.split()), json.loads((tmp_path / "p.json").read_text()).get("quality")


@pytest.mark.parametrize(
    ("scheme", "method", "more"),
    [
        ("w4a16", "gptq", GROUP),
        ("w8a8", "smoothquant+gptq", ()),
        ("nvfp4", "smoothquant+gptq", ()),
        ("fp8", "gptq", ()),
    ],
)
def test_the_plan_says_what_was_chosen_and_what_more_costs(run, tiny, small, calib, tmp_path, scheme, method, more):
    model = tiny("llama")
    said, chosen = quality_of(run, tmp_path, "--model", model, "--scheme", scheme, *small, *more)
    assert f"quality balanced: method {method} with " in said and chosen["chosen"] == method and not chosen["left_out"]
    request = Request(
        model=str(model),
        scheme=scheme,
        group_size=more[1] if more else None,
        calib=calib,
        samples=8,
        seqlen=32,
        threads=1,
    )
    here, above = (sum(prepare(preferred(request, level)).forecast.operations.values()) for level in LEVELS[1:])
    if chosen["next"] is None:
        assert here == above and "--quality best: the same method, for this scheme and model" in said
    else:
        assert f"--quality best: method {SETTINGS[kind_of_request(request)]['best'][0].method} with " in said
        assert f"about {times(above / here)} the operations" in said and chosen["ratio"] == above / here


def test_what_reads_data_is_not_measured_by_what_reads_none(run, tiny, small, tmp_path):
    said, _ = quality_of(
        run, tmp_path, "--model", tiny("llama"), "--scheme", "w4a16", *small, *GROUP, "--quality", "fast"
    )
    assert "--quality balanced: method gptq with " in said and "which runs the model on calibration samples, " in said
    assert "the operations" not in said


def test_a_level_can_be_asked_for(run, tiny, small, tmp_path):
    for level, method in (("fast", "rtn"), ("best", "gptq+signround")):
        options = ("--model", tiny("llama"), "--scheme", "w4a16", *small, *GROUP, "--quality", level)
        said, chosen = quality_of(run, tmp_path, *options)
        assert f"quality {level}: method {method} with " in said and chosen["chosen"] == method


def test_quantize_does_what_the_plan_says(run, tiny, small, tmp_path):
    asked = ("--model", tiny("llama"), "--scheme", "w4a16", *small, *GROUP)
    code, said, err = run("quantize", *asked, "--out", tmp_path / "out")
    assert code == 0 and said.count("quality balanced: method gptq with ") == 1, err
    options = [
        x for o in ("signed=true", "sweeps=4", "compensate=0.5", "guided=true", "e2e_steps=16") for x in ("--option", o)
    ]
    options += ["--synthetic-samples", "3"]  # for 8 samples of a text; 48 for 128
    assert run("quantize", *asked, "--method", "gptq", *options, "--out", tmp_path / "named")[0] == 0
    one, two = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("out", "named"))
    assert one == two
    assert "already complete" in run("quantize", *asked, "--out", tmp_path / "out")[1]


def test_synthetic_samples_of_a_level_can_be_left_out(run, tiny, small):
    asked = ("plan", "--model", tiny("llama"), "--scheme", "w4a16", *GROUP, *small)
    assert "synthetic samples of" in run(*asked)[1]
    code, printed, _ = run(*asked, "--synthetic-samples", "0")
    assert code == 0 and "synthetic samples" not in printed.partition("--quality best")[0]
    assert "6 synthetic samples of" in run(*asked, "--synthetic-samples", "6")[1]


def test_nothing_is_chosen_where_a_method_is_named(run, tiny, small, tmp_path):
    named, plain = tmp_path / "named.yaml", tmp_path / "plain.yaml"
    named.write_text("scheme: w4a16\nmethod: rtn\ngroup_size: 32\n")
    plain.write_text("scheme: w4a16\ngroup_size: 32\n")
    for options, told in (
        (("--scheme", "w4a16", *GROUP, "--method", "rtn"), False),
        (("--recipe", named), False),
        (("--recipe", plain), True),
        (("--recipe", plain, "--method", "gptq"), False),
    ):
        said, chosen = quality_of(run, tmp_path, "--model", tiny("llama"), *small, *options)
        assert ("quality balanced" in said) == told == (chosen is not None)


def test_a_level_and_a_method_exclude_each_other(run, tiny, tmp_path):
    named = tmp_path / "named.yaml"
    named.write_text("scheme: w4a16\nmethod: rtn\n")
    for options, where in (
        (("--scheme", "w4a16", "--method", "gptq"), "--method gptq names one"),
        (("--recipe", named), f"the method in {named} names one"),
    ):
        code, _, err = run("plan", "--model", tiny("llama"), *options, "--quality", "fast")
        assert code == 2 and where in " ".join(err.split())


def test_what_a_model_cannot_have_is_said_and_rounding_is_used(run, tiny, tmp_path):
    """Without samples nothing can be calibrated: rounding reads none."""
    said, chosen = quality_of(run, tmp_path, "--model", tiny("llama"), "--scheme", "w4a16", *GROUP, "--samples", 0)
    assert chosen["chosen"] == "rtn" and "not used: gptq with " in said and "--samples 0" in chosen["left_out"][0]


def test_what_is_wrong_with_the_request_is_not_hidden_by_another_method(run, tiny, tmp_path):
    for options, what in (
        (("--calib", tmp_path / "missing.txt"), "missing.txt"),
        (("--group-size", 48, "--strict"), "48"),
        (("--option", "sweep=4"), "unknown option 'sweep' for gptq"),
    ):
        code, said, err = run("plan", "--model", tiny("llama"), "--scheme", "w4a16", "--seqlen", 32, *options)
        assert code in (2, 3) and what in " ".join(err.split()), (said, err)


def test_options_go_over_those_of_the_level(run, tiny, small, tmp_path):
    asked = ("--model", tiny("llama"), "--scheme", "w4a16", *small, *GROUP, "--option", "sweeps=1")
    code, _, err = run("plan", *asked, "--json", tmp_path / "p.json")
    assert code == 0, err
    linears = json.loads((tmp_path / "p.json").read_text())["linears"]
    assert {x["options"]["sweeps"] for x in linears.values()} == {1}


def test_every_level_can_be_had_for_every_scheme():
    for s in (*SCHEMES.values(), *GGUF_SCHEMES.values()):
        for level in LEVELS:
            for setting in SETTINGS[kind_of_schemes([s])][level]:
                request = with_setting(Request(model="m", scheme=s.name), setting)
                assert recipe_of(request).method == setting.method
