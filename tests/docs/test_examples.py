"""Each file of examples/ runs as it is."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

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


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_example(path, tmp_path):
    paths = [str(ROOT), str(ROOT / "calib_data"), str(ROOT / "kernels")]
    done = subprocess.run(
        [sys.executable, str(path), str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
    )
    assert done.returncode == 0, done.stderr
    assert SAYS[path.stem] in done.stdout, done.stdout


def test_all_are_listed():
    listed = (ROOT / "examples" / "README.md").read_text()
    assert {path.stem for path in EXAMPLES} == set(SAYS) and all(f"({p.name})" in listed for p in EXAMPLES)
