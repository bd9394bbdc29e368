"""qkit report: figures go to the weights they were measured on, and what cannot be shown is refused in one sentence."""

import json

import pytest

from qkit.errors import BadInput, UsageError
from qkit.workflows.api import quantize
from qkit.workflows.report import measured_of

WEIGHTS = {"model.safetensors": "a" * 64}


def entry(model: str, weights: dict | None = None, **more) -> dict:
    suite = {} if weights is None else {"suite": {"weights": weights}}
    return {"model": model, "baseline": "m", "window": 512, "size": {"bytes": 1}, "texts": {"t": {}}, **suite, **more}


def result(model: str, weights: dict | None = None) -> dict:
    return {"model": model, "weights": weights or {}}


@pytest.fixture
def file(tmp_path):
    def write(*entries, name="eval.json"):
        path = tmp_path / name
        path.write_text(json.dumps({"models": entries} if len(entries) != 1 else entries[0]))
        return path

    return write


def test_figures_go_to_their_weights(file):
    other = {"model.safetensors": "b" * 64}
    path = file(entry("a", other), entry("b", WEIGHTS))
    (found,) = measured_of([result("renamed", WEIGHTS)], [path])
    assert found["suite"]["weights"] == WEIGHTS and found["model"] == "renamed"
    with pytest.raises(
        UsageError, match="the figures of a are of other weights than the folder has now: measure it again"
    ):
        measured_of([result("a", {"model.safetensors": "c" * 64})], [path])
    with pytest.raises(
        UsageError, match=r"eval\.json: no figures of x: measure it with 'qkit eval', or leave --eval out"
    ):
        measured_of([result("x")], [path])


def test_figures_without_sums_go_to_their_name(file):
    path = file(entry("a"))
    assert measured_of([result("a", WEIGHTS)], [path])[0]["model"] == "a"
    newer = file(entry("a", window=64), name="newer.json")
    assert measured_of([result("a")], [path, newer])[0]["window"] == 64  # the last file that has it
    assert measured_of([result("a")], []) == []


@pytest.mark.parametrize(
    ("change", "what"), [({"baseline": "n"}, "baseline"), ({"texts": {"u": {}}}, "texts"), ({"window": 64}, "window")]
)
def test_figures_that_do_not_compare_are_refused(file, change, what):
    path = file(entry("a"), {**entry("b"), **change})
    with pytest.raises(
        UsageError, match=f"b and a were measured with different {what}: .*; measure them in one 'qkit eval'"
    ):
        measured_of([result("a"), result("b")], [path])


def test_the_suite_of_some_is_refused(file):
    path = file(entry("a", WEIGHTS), entry("b"))
    with pytest.raises(UsageError, match="only some of the results were measured with --suite"):
        measured_of([result("a"), result("b")], [path])


@pytest.mark.parametrize(
    "bad", [{}, [], {"models": []}, {"models": [3]}, {"models": 3}, {"model": "a"}, entry("a", [])]
)
def test_other_files_are_refused(tmp_path, bad):
    path = tmp_path / "other.json"
    path.write_text(json.dumps(bad))
    with pytest.raises(BadInput, match=r"other\.json: .*: use the file that 'qkit eval --json' writes"):
        measured_of([result("a")], [path])


def test_the_command(tiny, tmp_path, run):
    """A result with two schemes shows where they are; a folder of another tool shows what can be read."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("scheme: w4a16\ngroup_size: 32\nrules: [{match: '*.down_proj', scheme: w8a16}]\n")
    out, page, data = tmp_path / "mixed", tmp_path / "page.html", tmp_path / "page.json"
    quantize(model=str(tiny("llama")), recipe=str(recipe), out=str(out))
    code, shown, err = run("report", out, tiny("llama"), "--out", page, "--json", data)
    assert code == 0 and "page.html: the page of 2 results" in shown, err
    mixed, plain = json.loads(data.read_text())["results"]
    assert [(s["scheme"], s["matrices"]) for s in mixed["schemes"]] == [("W4A16", 12), ("W8A16", 2)]
    assert mixed["hashes"]["model.safetensors"] == mixed["weights"]["model.safetensors"]
    assert {e["engine"] for e in mixed["engines"] if e["loads"]} >= {"qkit"}
    assert plain["schemes"] == plain["engines"] == [] and plain["summary"]["format"] == "not quantized"
    text = page.read_text()
    assert (
        "Bits by layer" in text
        and "Nothing was measured for this page" in text
        and "http" not in text.replace("http-equiv", "")
    )
    bad = tmp_path / "bad.json"
    bad.write_text(json.dumps({**entry("mixed"), "suite": {"chat": {}}}))
    code, _, err = run("report", out, "--eval", bad, "--out", page)
    assert code == 3 and "not the figures that this version of qkit writes" in err
    code, _, err = run("report", tmp_path / "none", "--out", page)
    assert code == 3 and page.read_text() == text
