"""qkit.load opens a result; the demo compares two of them and keeps what it did not make."""

import json
import shutil
from pathlib import Path

import pytest
import tiny_models
import torch

import qkit
from qkit.commands import demo, main
from qkit.files.locate import find_model, recorded_source
from qkit.workflows.quantize import Request, quantize


def test_load(tmp_path: Path, quiet) -> None:
    quantize(Request(model="tiny-llama", scheme="w8a16"), tmp_path / "out", quiet)
    ids = torch.arange(20)[None]
    original, packed = (qkit.load(path, dtype=torch.float32)(ids).logits for path in ("tiny-llama", tmp_path / "out"))
    assert 0 < (original - packed).norm() < 0.02 * original.norm()


def test_check_finds_the_original_by_itself(tmp_path: Path, quiet) -> None:
    """By the note in the job folder, by the name of a reference model, and only where the fingerprint agrees."""
    mine, out, budget = tmp_path / "mine", tmp_path / "out", tmp_path / "budget.yaml"
    tiny_models.make("llama", mine)
    quantize(Request(model=str(mine), scheme="w8a16"), out, quiet)
    assert recorded_source(out) == mine
    budget.write_text("kl.mean: 1\nsize: 1x\nwindow: 16\nwindows: 2\n", encoding="utf-8")
    main(["check", str(out), "--budget", str(budget)])
    shutil.rmtree(mine)
    assert recorded_source(out) is None
    with pytest.raises(SystemExit) as stop:
        main(["check", str(out), "--budget", str(budget)])
    assert stop.value.code == 2
    shutil.copytree(find_model("tiny-llama"), mine)  # another model in its place
    assert recorded_source(out) is None

    quantize(Request(model="tiny-llama", scheme="w8a16"), tmp_path / "reference", quiet)
    shutil.rmtree(tmp_path / "reference.job")
    assert recorded_source(tmp_path / "reference") == find_model("tiny-llama")


def test_demo_leaves_a_folder_alone(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "mine.txt").write_text("kept", encoding="utf-8")
    with pytest.raises(SystemExit) as stop:
        main(["demo", "--work", str(tmp_path)])
    assert stop.value.code == 2
    assert "not empty" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    """The whole of it on two windows; a second time it replaces its own results and nothing else."""
    monkeypatch.setattr(demo, "WINDOWS", 2)
    monkeypatch.setattr(demo, "METHOD", "rtn")
    work, figures = tmp_path / "a" / "work", tmp_path / "demo.json"
    main(["demo", "--work", str(work), "--json", str(figures)])
    (work / "mine.txt").write_text("kept", encoding="utf-8")
    (work / "W4A16" / "config.json").unlink()
    first = json.loads(figures.read_text(encoding="utf-8"))["rows"]
    main(["demo", "--work", str(work), "--json", str(figures), "--overwrite"])
    again = json.loads(figures.read_text(encoding="utf-8"))["rows"]
    for row in (*first, *again):
        row.pop("seconds", None)
    assert first == again
    assert (work / "mine.txt").exists() and (work / "W4A16" / "config.json").exists()
    original, *quantized = again
    assert [row["model"] for row in again] == ["original", "W4A16", "W4A8"]
    assert all(0 < row["kl_mean"] < 0.1 and row["same_top1"] > 0.8 and row["checks"] > 1000 for row in quantized)
    assert all(0.3 < row["bytes"] / original["bytes"] < 0.4 for row in quantized)
    printed = capsys.readouterr().out
    assert all(row["model"] in printed and demo.PROMPT + row["text"][:20] in printed for row in again)
