"""eval of several models in one table, and the page of a language model."""

import json
import shutil

import pytest

from qkit.evaluation import continuations as continuing
from qkit.report.text import text_page, top_layers

COMMON = ["--window", 32, "--windows", 4]


@pytest.fixture(scope="module")
def packed(tmp_path_factory, tiny):
    """{name: folder} of two results of one model."""
    from conftest import Quiet

    from qkit.workflows.quantize import Request, quantize

    folder = tmp_path_factory.mktemp("packed")
    for name in ("w4a16", "w8a16"):
        quantize(Request(model=str(tiny("llama")), scheme=name, group_size=32), folder / name, Quiet())
    return folder


def test_two_models_against_one_baseline(packed, tiny, run, calib, tmp_path, monkeypatch):
    from qkit.runtime import loading

    loaded, real = [], loading.load
    monkeypatch.setattr(loading, "load", lambda path, *a, **k: loaded.append(path.name) or real(path, *a, **k))
    file = tmp_path / "eval.json"
    arguments = ["--baseline", tiny("llama"), "--text", calib, *COMMON, "--json", file]
    code, said, err = run("eval", packed / "w4a16", packed / "w8a16", *arguments)
    assert code == 0, err
    assert loaded == ["w4a16", "w8a16", "llama"]  # the baseline once
    both = json.loads(file.read_text())
    assert list(both) == ["models"] and [m["model"] for m in both["models"]] == ["w4a16", "w8a16"]
    rows = [line.split() for line in said.splitlines() if line.startswith((" llama", " w4a16", " w8a16"))]
    assert [row[0] for row in rows] == ["llama", "w4a16", "w8a16"] and said.count("perplexity") == 1
    for name, found in zip(("w4a16", "w8a16"), both["models"], strict=True):
        code, _, err = run("eval", packed / name, *arguments)
        assert code == 0, err
        assert json.loads(file.read_text()) == found  # of one model the file is what it was


def test_without_a_baseline(packed, run, calib, tmp_path):
    code, said, err = run("eval", packed / "w4a16", packed / "w8a16", "--text", calib, *COMMON)
    assert code == 0 and "w4a16" in said and "w8a16" in said and "change" not in said, err


@pytest.mark.parametrize(
    "options", [["--kv", "int8"], ["--retrieval"], ["--image-text", "drawn"], ["--videos", 1], ["--tasks", "vbench:x"]]
)
def test_what_is_measured_of_one_model(options, packed, run):
    code, _, err = run("eval", packed / "w4a16", packed / "w8a16", *options)
    assert code == 2 and options[0] in err and "use one OUT" in err


def test_models_that_split_a_text_in_different_ways(packed, tiny, run, calib, tmp_path):
    other = shutil.copytree(tiny("llama"), tmp_path / "other")
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    tokenizer["model"]["merges"] = tokenizer["model"]["merges"][:100]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    code, _, err = run("eval", packed / "w4a16", other, "--text", calib, *COMMON)
    assert code == 2 and "different tokens" in err


def test_a_model_of_another_vocabulary(packed, run, tiny, calib):
    code, _, err = run("eval", packed / "w4a16", "--baseline", tiny("llama", vocab_size=5000), "--text", calib, *COMMON)
    assert code == 2 and "cannot be compared token by token" in err


# ---- the page --------------------------------------------------------------------------------------------------


def test_the_page_of_a_language_model(packed, tiny, run, calib, tmp_path, monkeypatch):
    monkeypatch.setattr(continuing, "NEW_TOKENS", 4)
    page = tmp_path / "eval.html"
    hostile = shutil.copytree(packed / "w4a16", tmp_path / "<script>alert(1)<b>")
    text = shutil.copy(calib, tmp_path / "<img src=x>.txt")
    arguments = ["--baseline", tiny("llama"), "--text", text, *COMMON, "--report", page]
    code, _, err = run("eval", hostile, packed / "w8a16", *arguments)
    assert code == 0, err
    said = page.read_text()
    assert "<script" not in said and "<img" not in said and "&lt;script&gt;alert(1)&lt;b&gt;" in said
    assert "&lt;img src=x&gt;" in said and "http" not in said.replace("http-equiv", "")
    assert "Layers of w8a16 that rounding changed most" in said and "model.layers.0.mlp.down_proj" in said
    assert f"{len(continuing.PROMPTS)} fixed prompts" in said and "no defence" in said


def test_layers_with_the_largest_errors_come_first(packed):
    record = json.loads((packed / "w4a16" / "qkit.json").read_text())
    record["linears"]["model.layers.1.mlp.up_proj"]["error"] = 0.75
    found = top_layers(packed / "w4a16", 3)
    assert len(found) == 3 and found[0]["error"] >= found[1]["error"] >= found[2]["error"]
    most = max(record["linears"].items(), key=lambda kv: kv[1]["error"] if kv[1]["error"] != 0.75 else 0)
    assert found[0]["name"] == most[0]


def test_continuations_that_differ_are_marked_and_come_first(tmp_path):
    entries = [
        {"prompt": "one", "said": "same", "baseline_said": "same", "same": 4},
        {"prompt": "two", "said": "the attack", "baseline_said": "the cat", "same": 1},
    ]
    measured = [{"model": "m", "baseline": "b", "continuations": entries}]
    page = text_page(measured, [tmp_path], [])
    assert page.index("the attack") < page.index(">one<") and "1 differ" in page
    assert page.count('class="left chosen"') == 1


def test_a_page_of_a_model_without_a_record(tiny, run, calib, tmp_path, monkeypatch):
    monkeypatch.setattr(continuing, "NEW_TOKENS", 2)
    code, _, err = run("eval", tiny("llama"), "--text", calib, *COMMON, "--report", tmp_path / "e.html")
    assert code == 0, err
    assert "rounding changed most" not in (tmp_path / "e.html").read_text()


def test_no_false_reason_for_the_page(tiny, run, tmp_path):
    code, _, err = run("eval", tiny("llama"), "--kv", "int8", "--report", tmp_path / "e.html")
    assert code == 2 and "--report is for texts" in err and "image-text drawn" not in err
