"""Each file of examples/ runs as it is."""

import ast
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

import qkit
from qkit.solvers.table import SOLVERS

ROOT = Path(__file__).parents[2]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
SAYS = {
    "quantize_language_model": "against the original",
    "load_and_generate": "The river",
    "budget_in_bytes": "written: 5.1",
    "vision_language_model": "ForConditionalGeneration",
    "video_pipeline": "frames: (1, ",
    "own_solver": "56 quantized layers",
}


IN_A_PROCESS_OF_ITS_OWN = "load_and_generate"  # the others would spend most of their time on importing torch again


@pytest.fixture
def solvers():
    """The table of solvers is afterwards what it was."""
    before = dict(SOLVERS)
    yield
    SOLVERS.clear()
    SOLVERS.update(before)


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_example(path, tmp_path, monkeypatch, capsys, solvers):
    assert called(path) <= set(qkit.__all__)  # what another import may have brought does not count
    if path.stem == IN_A_PROCESS_OF_ITS_OWN:
        said = in_a_process(path, tmp_path)
    else:
        monkeypatch.setattr(sys, "argv", [str(path), str(tmp_path)])
        runpy.run_path(str(path), run_name="__main__")
        said = capsys.readouterr().out
    assert SAYS[path.stem] in said, said


def in_a_process(path, tmp_path):
    paths = [str(ROOT), str(ROOT / "calib_data"), str(ROOT / "kernels")]
    done = subprocess.run(
        [sys.executable, str(path), str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def called(path):
    """The names of qkit that a program uses."""
    nodes = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Attribute)]
    return {node.attr for node in nodes if isinstance(node.value, ast.Name) and node.value.id == "qkit"}


def test_all_are_listed():
    listed = (ROOT / "examples" / "README.md").read_text()
    assert {path.stem for path in EXAMPLES} == set(SAYS) and all(f"({p.name})" in listed for p in EXAMPLES)
