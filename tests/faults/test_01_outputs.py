"""No option that names an output takes the place of an input, of a file in a model or a result, or of another output."""

import json
import os
import shutil
from types import SimpleNamespace

import pytest
from rich.console import Console

from qkit.commands.plan import write_figures
from qkit.errors import UsageError


@pytest.fixture
def made(run, tiny, tmp_path):
    """A model, a result, a text and a budget of the user's own."""
    shutil.copytree(tiny("llama"), tmp_path / "m")
    (tmp_path / "text.txt").write_text("The sea was calm and the wind was low. " * 200)
    (tmp_path / "budget.yaml").write_text("size: 0.9x\n")
    code, _, err = run(
        "quantize", "--model", tmp_path / "m", "--scheme", "w4a16", "--group-size", 32, "--out", tmp_path / "o"
    )
    assert code == 0, err
    return tmp_path


def contents(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


QUANTIZE = ("quantize", "--model", "m", "--scheme", "w8a16", "--group-size", 32, "--out")
EVAL = ("eval", "o", "--baseline", "m", "--text", "text.txt", "--windows", 2, "--window", 32)


@pytest.mark.parametrize(
    "command",
    [
        (*QUANTIZE, "new", "--json", "m/model.safetensors"),
        (*QUANTIZE, "new", "--json", "m/figures.json"),
        (*QUANTIZE, "o", "--overwrite", "--json", "o/config.json"),
        (*QUANTIZE, "new", "--calib", "text.txt", "--json", "text.txt"),
        (*EVAL, "--json", "m/model.safetensors"),
        (*EVAL, "--json", "link.json"),
        (*EVAL, "--report", "text.txt"),
        (*EVAL, "--json", "z", "--report", "./z"),
        ("inspect", "o/model.safetensors", "--json", "o/model.safetensors"),
        ("inspect", "o", "--json", "o/x.json"),
        ("verify", "o", "--json", "o/config.json"),
        ("check", "o", "--baseline", "m", "--budget", "budget.yaml", "--junit", "budget.yaml"),
        ("check", "o", "--baseline", "m", "--budget", "budget.yaml", "--junit", "z", "--json", "z"),
        ("plan", "--model", "m", "--scheme", "w4a16", "--json", "m/config.json"),
    ],
    ids=lambda c: " ".join(map(str, c)),
)
def test_inputs_are_not_replaced(command, made, run, monkeypatch):
    monkeypatch.chdir(made)
    os.symlink("text.txt", "link.json")
    before = contents(made)
    code, _, err = run(*command)
    assert code == 2 and len(err.strip().splitlines()) == 1, err
    assert contents(made) == before


def test_outputs_elsewhere_are_written(made, run, monkeypatch):
    monkeypatch.chdir(made)
    code, _, err = run("inspect", "o", "--json", "inspect.json")
    assert code == 0 and json.loads((made / "inspect.json").read_text()), err
    assert run("inspect", "o", "--json", "inspect.json")[0] == 0  # the same command again


@pytest.mark.parametrize("content", [b"\xff garbage", b"{}", b'{"made_by": "me"}'])
def test_a_mark_is_that_of_check_or_a_problem(content, made, run):
    (made / "o" / "qkit-rejected.json").write_bytes(content)
    code, _, err = run("verify", made / "o")
    assert code == 4 and "qkit-rejected.json" in err


def test_a_pipe_in_the_place_of_the_mark(made, run):
    os.mkfifo(made / "o" / "qkit-rejected.json")
    code, _, err = run("verify", made / "o")
    assert code == 4 and "qkit-rejected.json" in err


def test_figures_replace_no_file(tmp_path, monkeypatch):
    monkeypatch.setattr("qkit.report.allocation.allocation_files", lambda *_: {"allocation.png": b"new"})
    allocated = SimpleNamespace(profile=None, allocation=None)
    (tmp_path / "allocation.png").write_bytes(b"mine")
    with pytest.raises(UsageError, match=r"another allocation\.png is there already"):
        write_figures(allocated, tmp_path, Console())
    assert (tmp_path / "allocation.png").read_bytes() == b"mine"
    write_figures(allocated, tmp_path / "new", Console())
    write_figures(allocated, tmp_path / "new", Console())  # the same ones again
    assert (tmp_path / "new" / "allocation.png").read_bytes() == b"new"


def test_an_empty_name_is_refused(run, tiny):
    code, _, err = run("quantize", "--model", tiny("llama"), "--scheme", "w4a16", "--out", "")
    assert code == 2 and "--out" in err
