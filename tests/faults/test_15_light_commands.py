"""What a command says before torch is imported, what it says while it runs, and how wide."""

import io
import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
from rich.console import Console

from qkit.commands import bars as bars_module
from qkit.commands import list as listing
from qkit.commands.bars import Bar, Share
from qkit.commands.measured import show, show_all
from qkit.sensitivity.names import MEASURES
from qkit.solvers.table import SOLVERS
from qkit.transforms.table import TRANSFORMS

ROOT = Path(__file__).parents[2]
# Says when torch or transformers is asked for, in the stream that the command prints to.
WATCHED = """
import sys
class Finder:
    def find_spec(self, name, path=None, target=None):
        if name in ("torch", "transformers", "diffusers", "scipy", "matplotlib"):
            sys.stdout.flush(); sys.stderr.flush()
            print("IMPORT", name, flush=True)
            if "--stop" in sys.argv:
                raise SystemExit(0)
sys.meta_path.insert(0, Finder())
from qkit.commands import main
main([a for a in sys.argv[1:] if a != "--stop"])
"""


def watched(*arguments, stop=False):
    """(exit code, everything printed) of a command in a process of its own, with the imports of heavy libraries in it."""
    path = os.pathsep.join(map(str, (ROOT, ROOT / "calib_data", ROOT / "kernels")))
    command = [sys.executable, "-c", WATCHED, *map(str, arguments), *(["--stop"] if stop else [])]
    found = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env={**os.environ, "PYTHONPATH": path}
    )
    return found.returncode, found.stdout


@pytest.mark.parametrize(
    "arguments",
    [
        ["quantize", "--model", "tiny-llama", "--scheme", "w4a17", "--out", "x"],
        ["quantize", "--model", "tiny-llama", "--scheme", "w4a16", "--method", "gptqq", "--out", "x"],
        ["quantize", "--model", "tiny-llama", "--scheme", "w4a16", "--option", "dampp=1", "--out", "x"],
        ["plan", "--model", "tiny-llama", "--size", "80XB"],
        ["plan", "--model", "tiny-llama", "--bits", "4", "--candidates", "int99"],
        ["plan", "--model", "tiny-llama", "--scheme", "w4a16", "--kv", "kivi7"],
        ["plan", "--model", "no-such-model", "--scheme", "w4a16"],
        ["profile", "--model", "tiny-llama", "--candidates", "int4", "--measures", "none", "--out", "x"],
        ["eval", "tiny-llama", "--text", "no-such-file.txt"],
        ["check", "tiny-llama", "--budget", "no-such-file.yaml"],
        ["bench", "gemv", "--shapes", "12by12"],
        ["verify", "no-such-folder"],
    ],
    ids=lambda arguments: f"{arguments[0]} {arguments[-1]}",
)
def test_mistakes_are_said_without_torch(arguments):
    code, said = watched(*arguments)
    assert code in (2, 3, 5) and "IMPORT" not in said and "qkit: " in said, said


def test_help_lists_and_inspect_need_no_torch():
    code, said = watched("inspect", _model())
    assert code == 0 and "IMPORT" not in said
    found = subprocess.run(
        [sys.executable, "-c", _ALL], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    assert found.returncode == 0, found.stderr


def _model() -> str:
    import qkit_data

    return str(qkit_data.model_path("tiny-llama"))


_ALL = """
import sys
from pathlib import Path
import qkit
root = Path(qkit.__file__).parents[1]
sys.path += [str(root / "calib_data"), str(root / "kernels")]
from qkit.commands import VERBS, main
from qkit.commands.list import TABLES
for arguments in (*([v, "--help"] for v in VERBS), *(["list", t] for t in TABLES)):
    try:
        main(arguments)
    except SystemExit as e:
        assert not e.code, arguments
assert not {"torch", "transformers", "scipy", "matplotlib"} & sys.modules.keys()
"""


@pytest.mark.parametrize("verb", ["quantize", "eval"])
def test_the_first_line_comes_before_torch(verb, tmp_path):
    options = ["--model", "tiny-llama", "--scheme", "w4a16", "--out", tmp_path / "out"]
    code, said = watched(verb, *(options if verb == "quantize" else ["tiny-llama"]), stop=True)
    lines = said.splitlines()
    assert lines[0] == f"qkit {verb}: reading tiny-llama" and lines[1].startswith("IMPORT"), said
    assert code == 0


def test_names_and_what_they_run_belong_together():
    from qkit.sensitivity import measures

    assert all(callable(solver.solve) for solver in SOLVERS.values())
    assert all(callable(t.function()) for t in TRANSFORMS.values() if t.function is not None)
    assert tuple(measures.MEASURES) == MEASURES


# ---- the bar ---------------------------------------------------------------------------------------------------


def shares(share, phases):
    """What the share is after every step of the phases: [(name, steps)]."""
    found = []
    for name, steps in phases:
        found.append(share.start(name, steps))
        found += [share.step(1) for _ in range(steps)]
    return found


def test_the_bar_is_that_of_the_whole_run():
    blocks = [(f"block {i + 1}/4, {part}", 5) for i in range(4) for part in ("layers 1 of 2", "layers 2 of 2", "rows")]
    found = shares(Share([("", [1.0] * 4)]), [("embed the calibration rows", 8), *blocks, ("export and verify", 2)])
    assert found == sorted(found) and found[0] == 0 and 0.97 < found[-1] <= 1
    after = 9 + 3 * 6  # embedding and one block
    assert found[after - 1] < found[after] <= 0.95 / 4 + 1e-9 or found[after] == pytest.approx(0.95 / 4)


def test_a_run_that_goes_on_begins_where_it_was():
    found = shares(Share([("vision", [1.0, 1.0]), ("", [2.0, 2.0])], finished=3), [("block 2/2", 4), ("export", 1)])
    assert found[0] == pytest.approx(0.95 * 4 / 6) and found[4] == pytest.approx(0.95)
    assert found == sorted(found)


def test_blocks_of_towers_and_of_the_language_model_are_told_apart():
    share = Share([("vision", [1.0]), ("", [3.0])])
    assert shares(share, [("vision block 1/1", 2)])[-1] == pytest.approx(0.95 / 4)
    assert shares(share, [("block 1/1", 2)])[-1] == pytest.approx(0.95)


def test_passes_before_the_blocks_count_by_their_work():
    phases = [("embed the calibration rows", 2), ("gradients", 4), ("block 1/1", 4)]
    of_run = shares(Share([("", [3.0])], ahead={"gradients": 1.0}), phases)
    assert of_run[:3] == [0, 0, 0] and of_run[3:8] == pytest.approx([0.95 / 4 * i / 4 for i in range(5)])
    assert of_run[-1] == pytest.approx(0.95)
    of_rest = shares(
        Share([("", [1.5, 1.5])], finished=1, ahead={"gradients": 1.0}), [("gradients", 4), ("block 2/2", 2)]
    )
    assert of_rest[:5] == pytest.approx([0.95 * 2.5 / 4] * 5) and of_rest[-1] == pytest.approx(0.95)


def test_learning_after_the_blocks_counts_by_its_work():
    phases = [("block 1/1", 2), ("what is outside the blocks", 1), ("learning", 4), ("export", 1)]
    of_run = shares(Share([("", [3.0])], behind={"learning": 1.0}), phases)
    assert of_run[2:5] == pytest.approx([0.95 * 3 / 4] * 3)  # the block, and what nobody counted
    assert of_run[5:10] == pytest.approx([0.95 * (3 + i / 4) / 4 for i in range(5)]) and of_run[-1] > 0.95


def test_phases_that_nobody_counted_have_no_share():
    assert shares(Share(), [("probes", 2)]) == [None] * 3


@pytest.mark.parametrize("screen", [False, True])
def test_time_left(screen, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(bars_module.time, "monotonic", lambda: now[0])
    file = io.StringIO()
    bar = Bar(Console(file=file, width=80, force_terminal=screen))
    for second in range(0, 101, 5):
        now[0] = float(second)
        bar.show(second / 200, "block [3]/30")
    bar.stop()
    said = file.getvalue()
    assert "50 %" in said and "0:01:40" in said and "left" in said and "block [3]/30" in said
    if not screen:
        assert "50 %, 0:01:40, 0:01:40 left: block [3]/30" in said


# ---- widths, bytes, warnings -----------------------------------------------------------------------------------

FIGURES = {
    "model": "SmolLM2-135M-w4a16-g64",
    "baseline": "SmolLM2-135M-Instruct",
    "window": 512,
    "size": {"bytes": 112_070_000, "baseline_bytes": 269_060_000},
    "texts": {
        "wikitext2-test": {
            "perplexity": 31.42, "ci": [29.11, 33.9], "windows": 200, "tokens": 102_200, "nonfinite": 0,
            "baseline_perplexity": 22.04, "baseline_ci": [21.0, 23.1], "change_percent": 42.55,
            "change_ci": [40.1, 45.02], "kl": {"mean": 0.31234, "ci": [0.3, 0.32], "p99": 2.345}, "same_top1": 0.7654,
        }
    },
}  # fmt: skip


@pytest.mark.parametrize("several", [1, 3])
def test_tables_fit_a_screen_of_80_columns(several):
    file = io.StringIO()
    console = Console(file=file, width=80, force_terminal=True, color_system=None)
    if several == 1:
        show(FIGURES, console)
    else:
        show_all([FIGURES] * several, console)
    lines = [line.rstrip() for line in file.getvalue().splitlines()]
    assert max(map(len, lines)) <= 80
    for whole in ("31.42 [29.11, 33.90]", "+42.55 [+40.10, +45.02]", "0.3123", "2.345", "0.7654", "22.04"):
        assert any(whole in line for line in lines), whole


def test_bytes_of_a_budget_are_megabytes(run, tmp_path):
    (tmp_path / "b.yaml").write_text("size: 15MB\n")
    code, said, err = run("check", "tiny-llama", "--budget", tmp_path / "b.yaml", "--json", tmp_path / "c.json")
    assert code == 0, err
    size = json.loads((tmp_path / "c.json").read_text())["size"]["bytes"]
    assert "<= 15 MB" in said and f"{size / 1e6:.6f} MB".replace("0 MB", " MB") in said and "e+0" not in said


def test_warnings_of_libraries_do_not_reach_the_user(run, monkeypatch):
    def warns():
        for category in (FutureWarning, UserWarning, DeprecationWarning):
            warnings.warn("a library has something to say", category, stacklevel=1)
        return [{"a": 1}]

    monkeypatch.setitem(listing.TABLES, "models", warns)
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        _, _, err = run("list", "models")
        assert "something to say" not in err
        before = list(warnings.filters)
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            run("--debug", "list", "models")
        assert {w.category for w in said} >= {FutureWarning, UserWarning}
        assert warnings.filters == before
