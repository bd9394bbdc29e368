"""The pages for those who build qkit: their code runs, and a method is one new file and one line in one table."""

import json
import re
import sys
import types
from importlib import import_module
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from qkit.solvers.table import SOLVERS, Solver
from qkit.solvers.task import Task
from qkit.system.option import Option
from qkit.tensor.formats import FORMATS
from qkit.transforms.table import TRANSFORMS, Transform

ROOT = Path(__file__).parents[2]
DEVELOP = ROOT / "docs" / "develop"


def block(page: str, first: str) -> str:
    """The code block of a page whose first line is that comment, without it."""
    text = (DEVELOP / page).read_text(encoding="utf-8")
    (found,) = [
        t for t in re.findall(r"^```py(?:thon)?\n(.*?)^```$", text, re.M | re.S) if t.startswith(f"# {first}\n")
    ]
    return found.partition("\n")[2]


def new_module(monkeypatch: pytest.MonkeyPatch, name: str, source: str) -> None:
    """The source as the module of that name, for one test: what one new file is."""
    module = types.ModuleType(name)
    exec(compile(source, f"{name}.py", "exec"), module.__dict__)
    monkeypatch.setitem(sys.modules, name, module)


def new_entry(page: str, first: str) -> tuple[str, Solver | Transform]:
    """(name, entry) of a table, from the line that a page shows."""
    names = {"Solver": Solver, "Transform": Transform, "Option": Option, "import_module": import_module}
    ((name, entry),) = eval(f"{{{block(page, first)}}}", names).items()
    return name, entry


@pytest.fixture
def clip(monkeypatch):
    """The solver of add-a-solver.md, registered."""
    page = "add-a-solver.md"
    new_module(monkeypatch, "qkit.solvers.clip", block(page, "qkit/solvers/clip.py"))
    monkeypatch.setitem(SOLVERS, *new_entry(page, "qkit/solvers/table.py, in SOLVERS"))


@pytest.fixture
def equalize(monkeypatch):
    """The transform of add-a-transform.md, registered."""
    page = "add-a-transform.md"
    new_module(monkeypatch, "qkit.transforms.equalize", block(page, "qkit/transforms/equalize.py"))
    monkeypatch.setitem(TRANSFORMS, *new_entry(page, "qkit/transforms/table.py, in TRANSFORMS"))


def quantized(run, out: Path, *options) -> dict:
    """qkit.json of a run on tiny-llama."""
    code, _, err = run("quantize", "--model", "tiny-llama", "--scheme", "w4a16", "--out", out, "--threads", 1, *options)
    assert code == 0, err
    return json.loads((out / "qkit.json").read_text())


# ---- a solver ----------------------------------------------------------------------------------------------------


def test_a_new_solver_runs_through_the_command_line(clip, run, tmp_path) -> None:
    records = {
        share: quantized(run, tmp_path / share, "--method", "clip", "--option", f"share={share}")
        for share in ("1", "0.8")
    }
    for share, record in records.items():
        assert record["recipe"]["options"] == {"share": float(share)}
        assert {x["solver"] for x in record["linears"].values()} == {"clip"}
    # Nothing is clipped by a share of 1, and a share of 0.8 is seen in every layer: the option reaches the solver.
    one, less = (records[share]["linears"] for share in ("1", "0.8"))
    assert all(x["error"] == x["baseline_error"] for x in one.values())
    assert all(less[n]["error"] < x["error"] and less[n]["weight_sha256"] != x["weight_sha256"] for n, x in one.items())
    assert run("verify", tmp_path / "0.8")[0] == 0


def test_its_default_is_taken(clip, run, tmp_path) -> None:
    default, given = tmp_path / "default", tmp_path / "given"
    quantized(run, default, "--method", "clip")
    quantized(run, given, "--method", "clip", "--option", "share=0.9")
    first, second = (load_file(folder / "model.safetensors") for folder in (default, given))
    assert first.keys() == second.keys() and all(torch.equal(first[n], second[n]) for n in first)


@pytest.mark.parametrize(
    ("option", "said"),
    [
        ("share=2", "option 'share': expected more than 0.5, to 1, found 2.0"),
        ("share=0.5", "option 'share': expected more than 0.5, to 1, found 0.5"),
        ("share=wide", "option 'share': expected float, found 'wide'"),
        ("shar=0.8", "unknown option 'shar' for clip; did you mean share?"),
    ],
)
def test_options_out_of_range_are_refused(clip, run, tmp_path, option: str, said: str) -> None:
    code, _, err = run(
        "quantize", "--model", "tiny-llama", "--scheme", "w4a16", "--method", "clip", "--option", option,
        "--out", tmp_path / "out",
    )  # fmt: skip
    assert code == 2 and said in err
    assert not (tmp_path / "out").exists()


def test_it_is_listed(clip, run) -> None:
    code, out, _ = run("list", "methods")
    (line,) = [line for line in out.splitlines() if line.split()[:2] == ["clip", "solver"]]
    assert code == 0 and "share=0.9" in line


def test_without_its_line_it_is_unknown(run, tmp_path) -> None:
    code, _, err = run("quantize", "--model", "tiny-llama", "--scheme", "w4a16", "--method", "clip", "--out", tmp_path)
    assert code == 2 and "unknown method 'clip'" in err


def test_the_test_of_the_page(clip) -> None:
    names: dict = {}
    exec(block("add-a-solver.md", "tests/solvers/test_clip.py"), names)
    names["test_clipping_helps_rows_with_a_long_tail"]()


def test_the_message_of_the_page(clip) -> None:
    assert "option 'share': expected more than 0.5, to 1, found 2.0" in (DEVELOP / "add-a-solver.md").read_text()


@pytest.mark.parametrize("name", FORMATS)
def test_the_solver_of_the_page_works_on_every_format(clip, name: str) -> None:
    weight = torch.randn(128, 256, generator=torch.Generator().manual_seed(0))
    amax = weight.abs().amax().reshape(1)
    task = Task(weights=[weight], fmt=FORMATS[name], dtype=torch.bfloat16, amax=amax, options={"share": 0.9})
    assert SOLVERS["clip"].solve(task).qtensors[0].shape == (128, 256)


# ---- a transform -------------------------------------------------------------------------------------------------


def test_a_new_transform_runs_through_the_command_line(equalize, run, tmp_path, calib) -> None:
    rows = ["--calib", calib, "--samples", 8, "--seqlen", 32]
    record = quantized(run, tmp_path / "out", "--method", "equalize+rtn", *rows)
    assert record["transforms"] == ["equalize"] and record["calibration"]["samples"] == 8
    plain = quantized(run, tmp_path / "plain", "--method", "rtn")
    changed = [n for n, p in record["plain"].items() if p != plain["plain"][n]]
    assert any(n.endswith("input_layernorm.weight") for n in changed)  # a scale was folded into a norm
    assert run("verify", tmp_path / "out")[0] == 0
    code, out, _ = run("list", "methods")
    assert code == 0 and re.search(r"^\s*equalize\s+transform ", out, re.M)
