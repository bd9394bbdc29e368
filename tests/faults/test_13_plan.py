"""Plan measures nothing and reads no weight: it says what has to be measured first, and whether a budget can be met at all."""

import json
import re
import shutil

import pytest

from qkit.files.safefile import read_header

BUDGETS = [("--bits", "5"), ("--size", "1.2MB"), ("--memory", "1.3MB@100")]
FORMATS = ("--candidates", "int2,int4,int8", "--group-size", 32)


@pytest.fixture(scope="module")
def hollow(tiny, tmp_path_factory):
    """A model whose weights are all NaN: whatever looks at one fails."""
    folder = tmp_path_factory.mktemp("hollow") / "model"
    shutil.copytree(tiny("llama"), folder)
    file = folder / "model.safetensors"
    data = bytearray(file.read_bytes())
    start = len(data) - sum(i.nbytes for i in read_header(file).values())
    data[start:] = b"\xff" * (len(data) - start)
    file.write_bytes(data)
    return folder


@pytest.fixture
def plan(run, hollow, small, tmp_path, monkeypatch):
    """``plan(*options)``: (exit code, stdout, stderr, the JSON file's content) of a plan of the hollow model."""
    monkeypatch.chdir(tmp_path)

    def go(*options):
        code, said, err = run("plan", "--model", hollow, *small, *options, "--json", "plan.json")
        file = tmp_path / "plan.json"
        data = json.loads(file.read_text()) if file.exists() else None
        file.unlink(missing_ok=True)
        assert not list(tmp_path.iterdir())  # nothing was made on the way
        return code, " ".join(said.split()), err, data

    return go


def test_the_hollow_model_cannot_be_measured(run, hollow, small, tmp_path):
    code, _, err = run("profile", "--model", hollow, *FORMATS, *small, "--measures", "weight", "--out", tmp_path / "p")
    assert code == 4 and "values are NaN" in err


@pytest.mark.parametrize("budget", BUDGETS)
def test_a_budget_without_a_profile(plan, budget):
    code, said, err, data = plan(*budget, *FORMATS)
    assert code == 0, err
    assert f"{budget[0]} " in said and "can be met" in said and "coverage" not in said
    assert "measured when quantize runs: a profile of int2,int4,int8" in said and "solver runs" in said
    assert data["budget"]["least"] <= data["budget"]["asked"] and data["measured_first"][0]["ratio"] > 1


@pytest.mark.parametrize(
    ("budget", "needs"),
    [(("--bits", "1.5"), "--bits 2."), (("--size", "500KB"), "--size "), (("--memory", "500KB@100"), "--memory ")],
)
@pytest.mark.parametrize("verb", ["plan", "quantize"])
def test_what_no_choice_meets(plan, run, hollow, small, tmp_path, budget, needs, verb):
    if verb == "plan":
        code, _, err, _ = plan(*budget, *FORMATS)
    else:
        code, _, err = run("quantize", "--model", hollow, *small, *budget, *FORMATS, "--out", tmp_path / "out")
        assert not list(tmp_path.iterdir())
    assert code == 3 and f"the smallest of W2A16, W4A16, W8A16 need {needs}" in err and "--candidates" in err


def test_the_same_numbers_before_and_after(run, tiny, small, tmp_path, monkeypatch):
    """The least of every budget is what the refusal with a profile says, and what is then met."""
    monkeypatch.chdir(tmp_path)
    model, folder = tiny("llama"), tmp_path / "profile"
    made = ("--model", model, *small, "--candidates", "int2,int3+1%,int4+r4,bf16", "--group-size", 32)
    needed = {}
    for when in ("before", "after"):
        for option, little in (("--bits", "1.5"), ("--size", "10KB"), ("--memory", "10KB@100")):
            code, _, err = run("plan", *made, option, little, "--profile", folder)
            assert code == 3 and err.count("need") == 1, err
            needed[when, option] = err.partition(" need ")[2].partition(":")[0].split()
        if when == "before":
            assert run("profile", *made, "--measures", "weight", "--rows", 2, "--out", folder)[0] == 0
    for option in ("--bits", "--size", "--memory"):
        assert needed["before", option] == needed["after", option]
        code, _, err = run("plan", *made, *needed["after", option], "--profile", folder, "--measure", "weight")
        assert code == 0, err


def test_other_refusals_come_before_measuring(plan):
    for options, code, words in (
        (("--bits", 4, *FORMATS, "--measure", "taste"), 2, "--measure taste"),
        (("--bits", 4, *FORMATS, "--floor", "*.none=int8"), 2, "matches no layer"),
        (("--bits", 4, *FORMATS, "--floor", "*=int8"), 3, "lower --floor"),
        (("--bits", 17, "--candidates", "int4,bf16"), 2, "keeps every layer in full precision"),
        (("--bits", 4, *FORMATS, "--explain"), 2, "qkit profile"),
        (("--bits", 4, "--candidates", "bf16"), 2, "no format that quantizes"),
        (("--bits", 4, "--method", "awq", "--profile", "none"), 2, "no profile there"),
        (("--scheme", "w4a16", "--method", "requant", "--outliers", 50), 2, "--outliers 50"),
        (("--scheme", "w4a16", "--method", "requant+rtn", "--significant", 0), 2, "--significant"),
    ):
        found, _, err, _ = plan(*options)
        assert found == code and words in err and len(err.strip().splitlines()) == 1, err


def test_requant_says_what_it_searches(plan):
    options = (
        "--scheme",
        "w4a16",
        "--method",
        "requant+gptq",
        "--outliers",
        1,
        "--significant",
        0.5,
        "--group-size",
        32,
    )
    code, said, err, data = plan(*options)
    assert code == 0 and "measured when quantize runs: the share of outliers of every layer: 5 runs" in said, err
    assert "linears quantized" in said and data["hash"] is None and data["measured_first"][0]["ratio"] > 5


def test_the_plan_of_requant_has_the_size_of_its_result(run, tiny, small, tmp_path):
    options = ("--model", tiny("llama"), "--scheme", "w4a16", "--method", "requant+gptq", "--significant", 0.5, *small)
    assert run("plan", *options, "--group-size", 32, "--json", tmp_path / "p.json")[0] == 0
    code, said, err = run("quantize", *options, "--group-size", 32, "--out", tmp_path / "out")
    assert code == 0 and "measured first: the share of outliers" in said, err
    planned = json.loads((tmp_path / "p.json").read_text())["coverage"]["bytes_after"]
    packed = sum(i.nbytes for i in read_header(tmp_path / "out" / "model.safetensors").values())
    assert packed == pytest.approx(planned, rel=0.005)


CACHE = ("--scheme", "w4a16", "--method", "gptq", "--group-size", 32, "--kv", "pm-kvq:4-2", "--max-length", 1000)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ((*CACHE, "--kv-memory", "200KB"), ["cost of the widths of --kv pm-kvq:4-2"]),
        ((*CACHE, "--kv-memory", "200KB", "--kv-scale-keys"), ["cost of the widths of", "scales of keys"]),
        (("--kv", "pm-kvq:4-2", "--memory", "2MB@1000", *FORMATS), ["a profile of", "cost of the widths of"]),
        (("--bits", 4, "--refine", 5, *FORMATS), ["a profile of", "5 plans at most, 7 forward passes"]),
    ],
)
def test_whatever_has_to_be_measured_is_said(plan, options, words):
    code, said, err, data = plan(*options)
    assert code == 0, err
    assert len(data["measured_first"]) == len(words) == said.count("measured when quantize runs: ")
    profiles = [m for m in data["measured_first"] if m["what"].startswith("a profile of")]
    times = re.findall(r"tokens; about \d[^;]* on this machine|tokens; \d[^;]* on this machine", said)
    assert all(m["seconds"] > 0 for m in profiles) and len(times) == len(profiles)
    others = len(words) - len(profiles)
    assert all(w in said for w in words) and said.count("times the operations of the quantization itself") == others


def test_too_little_memory_for_the_cache(plan):
    code, _, err, _ = plan(*CACHE, "--kv-memory", "10KB")
    assert code == 3 and "at its smallest width" in err


def test_a_budget_with_its_profile_is_solved_as_before(run, tiny, small, tmp_path):
    """Nothing is left to measure, so the plan is whole, and its hash is that of the run."""
    model, folder = tiny("llama"), tmp_path / "profile"
    assert run("profile", "--model", model, *FORMATS, *small, "--measures", "kl", "--rows", 2, "--out", folder)[0] == 0
    options = ("--model", model, "--bits", 5, "--profile", folder, *small)
    code, said, err = run("plan", *options, "--json", tmp_path / "p.json")
    assert code == 0 and "allocation" in said and "measured" not in said.partition("allocation")[0], err
    assert run("quantize", *options, "--out", tmp_path / "out", "--json", tmp_path / "q.json")[0] == 0
    p, q = (json.loads((tmp_path / f"{n}.json").read_text()) for n in "pq")
    assert p["hash"] == q["hash"] and p["allocation"]["picks"] == q["allocation"]["picks"]
    assert "measured_first" not in p
