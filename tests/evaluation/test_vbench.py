"""Videos for VBench: their names and prompts, and a run of it in another interpreter.

The runner is seen with a small package that reads and writes what VBench 0.1.5 does, and, where QKIT_VBENCH_PYTHON names an
interpreter with VBench itself, with that: temporal flickering is a dimension that needs no model.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest
import torch
from tiny_dits import make_pipeline

from qkit.diffusion.trajectory import Sampling
from qkit.errors import UsageError
from qkit.evaluation.request import dimensions_of
from qkit.evaluation.vbench import PER_PROMPT, check_dimensions, mp4, own_prompts, standard_prompts

pytest.importorskip("diffusers")
imageio = pytest.importorskip("imageio.v3", reason="videos need qkit[video]")

ENTRIES = [
    {"prompt_en": "a cat", "dimension": ["temporal_flickering", "motion_smoothness"]},
    {"prompt_en": "a dog", "dimension": ["motion_smoothness"]},
    {"prompt_en": "a bird", "dimension": ["temporal_flickering"]},
    {"prompt_en": "a fish", "dimension": ["temporal_flickering"]},
]
PACKAGE = """
import json, os
import imageio.v3 as imageio
import numpy as np

class VBench:
    def __init__(self, device, info, out):
        assert json.load(open(info)) and str(device) == "cpu"
        self.out = out

    def evaluate(self, videos, name, dimension_list, mode, **more):
        if dimension_list == ["motion_smoothness"]:
            raise RuntimeError("no network, no model")
        found = []
        for file in sorted(os.listdir(videos), reverse=True):
            if file.endswith(".mp4"):
                path = os.path.join(videos, file)
                x = imageio.imread(path, plugin="FFMPEG").astype(float)
                found.append({"video_path": path, "video_results": 1 - abs(np.diff(x, axis=0)).mean() / 255})
        score = float(np.mean([f["video_results"] for f in found]))
        with open(os.path.join(self.out, name + "_eval_results.json"), "w") as f:
            json.dump({dimension_list[0]: [score, found]}, f)
"""


@pytest.fixture
def interpreter(tmp_path: Path) -> Path:
    """An interpreter that has a package called vbench."""
    package = tmp_path / "site" / "vbench"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(PACKAGE)
    (package / "VBench_full_info.json").write_text(json.dumps(ENTRIES))
    python = tmp_path / "python"
    code = f"import sys; sys.path.insert(0, {str(package.parent)!r}); assert sys.argv[1:3] == ['-E', '-c']; exec(sys.argv[3])"
    (tmp_path / "main.py").write_text(code)
    python.write_text(f'#!/bin/sh\nexec {sys.executable} {tmp_path / "main.py"} "$@"\n')
    python.chmod(0o755)
    return python


def test_dimensions_and_prompts() -> None:
    """Of two dimensions, the first prompt of each: one prompt may serve both."""
    assert dimensions_of(["arc_easy"]) == [] and dimensions_of(["vbench:a", "b"]) == ["a", "b"]
    with pytest.raises(UsageError, match="cannot be measured together"):
        dimensions_of(["arc_easy", "vbench:a"])
    with pytest.raises(UsageError, match="did you mean temporal_flickering"):
        check_dimensions(["temporal_flicker"], ENTRIES)
    found = standard_prompts(["temporal_flickering", "motion_smoothness"], ENTRIES, 2)
    assert [w.name for w in found[:6]] == ["a cat-0", "a cat-1", "a cat-2", "a cat-3", "a cat-4", "a dog-0"]
    assert {w.prompt for w in found} == {"a cat", "a dog", "a bird"}
    assert len({w.seed for w in found}) == len(found) == 3 * PER_PROMPT
    assert {w.prompt for w in standard_prompts(["temporal_flickering"], ENTRIES, None)} == {"a cat", "a bird", "a fish"}
    names = [w.name for w in own_prompts(Sampling(("a/b", "c"), {}), 4)]
    assert names == ["c-0", "a b-0", "c-1", "a b-1"]


def test_a_video_comes_back() -> None:
    """A moving square, after the codec: within a fiftieth."""
    frames = torch.full((6, 32, 32, 3), 0.1)
    for i in range(6):
        frames[i, 8:20, 2 + 4 * i : 10 + 4 * i] = torch.tensor([0.8, 0.7, 0.6])
    back = torch.as_tensor(imageio.imread(mp4(frames), extension=".mp4", plugin="FFMPEG")) / 255
    assert back.shape == frames.shape and (back - frames).abs().mean() < 0.02


@pytest.mark.parametrize("real", [False, True])
def test_tasks_of_vbench(run, tmp_path: Path, interpreter: Path, real: bool) -> None:
    """Both pipelines' videos are judged and compared in pairs; a second run makes no video anew."""
    if real and "QKIT_VBENCH_PYTHON" not in os.environ:
        pytest.skip("QKIT_VBENCH_PYTHON names no interpreter with VBench")
    python = Path(os.environ["QKIT_VBENCH_PYTHON"]) if real else interpreter
    source, out, kept = make_pipeline(tmp_path / "wan", steps=3), tmp_path / "out", tmp_path / "videos"
    assert run("quantize", "--model", source, "--scheme", "w4a8", "--out", out)[0] == 0
    given = ["eval", out, "--vbench-python", python, "--videos-dir", kept, "--videos", 3, "--json", tmp_path / "f.json"]
    code, _, err = run(*given, "--baseline", source, "--tasks", "vbench:temporal_flickering")
    assert code == 0, err
    entry = json.loads((tmp_path / "f.json").read_text())["tasks"]["vbench:temporal_flickering"]
    score = entry["metrics"]["score"]
    assert (
        entry["samples"] == 3
        and 0.5 < score["value"] < 1
        and score["change_ci"][0] <= score["change"] <= score["change_ci"][1]
    )
    assert score["change"] != 0  # two sets of videos were judged
    files = {f: f.stat().st_mtime_ns for f in kept.rglob("*.mp4")}
    assert len(files) == 6
    assert run(*given, "--tasks", "vbench:temporal_flickering")[0] == 0
    assert {f: f.stat().st_mtime_ns for f in kept.rglob("*.mp4")} == files
    code, _, err = run(*given[:-4], "--videos", 2, "--tasks", "vbench:temporal_flickering")
    assert code == 2 and "another model, call or prompts" in err
    if not real:
        code, _, err = run(*given, "--tasks", "vbench:motion_smoothness")
        assert code == 3 and "could not judge motion_smoothness: 'RuntimeError: no network, no model'" in err


def test_bad_input_of_vbench(run, tmp_path: Path, interpreter: Path) -> None:
    source = make_pipeline(tmp_path / "wan", steps=3)
    for given, said in (
        (("--tasks", "vbench:temporal_flickering"), "add --vbench-python"),
        (("--tasks", "vbench:temporal_flickering", "--vbench-python", sys.executable), "-m pip install vbench"),
        (("--tasks", "vbench:temporal_flickering", "--vbench-python", tmp_path / "none"), "cannot be run"),
        (("--tasks", "vbench:flickering", "--vbench-python", interpreter), "no such dimension"),
        (("--tasks", "arc_easy,vbench:color", "--vbench-python", interpreter), "cannot be measured together"),
        (("--videos", 2, "--vbench-python", interpreter), "leave them out"),
    ):
        code, _, err = run("eval", source, *given)
        assert code == 2 and said in err, (given, err)
    (tmp_path / "mine" / "model").mkdir(parents=True)
    (tmp_path / "mine" / "model" / "notes.txt").write_text("mine")
    code, _, err = run(
        "eval", source, "--tasks", "vbench:temporal_flickering", "--vbench-python", interpreter, "--videos", 1,
        "--videos-dir", tmp_path / "mine",
    )  # fmt: skip
    assert code == 2 and "that qkit did not make" in err
