"""Point 16, E6: folders that earlier versions of qkit wrote load and verify, and say what they do not cover.

tests/golden has them: v1-* were written at commit c183a5d, format version 1, from a random Llama of one layer.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch

import qkit
from qkit.verification.verify import verify

GOLDEN = Path(__file__).parents[1] / "golden"
EXPECTED = json.loads((GOLDEN / "expected.json").read_text())


@pytest.mark.parametrize("name", EXPECTED)
def test_loads_and_computes_what_it_did(name):
    model = qkit.load(GOLDEN / name, dtype=torch.float32)
    with torch.inference_mode():
        made = model(torch.tensor([[1, 5, 9, 33, 60, 2]])).logits[0, -1, :8]
    assert torch.allclose(made, torch.tensor(EXPECTED[name]), atol=2e-3)


@pytest.mark.parametrize("name", EXPECTED)
def test_verifies_with_a_note(name, run):
    report = verify(GOLDEN / name)
    assert report.problems == [] and "not covered" in report.notes[0]
    code, said, _ = run("verify", GOLDEN / name)
    assert code == 0 and "note: written before qkit kept the sha256 of every file" in said


@pytest.mark.parametrize("name", EXPECTED)
def test_what_it_covered_it_covers(name, tmp_path):
    shutil.copytree(GOLDEN / name, tmp_path / "out")
    data = bytearray((tmp_path / "out" / "model.safetensors").read_bytes())
    data[-7] ^= 1
    (tmp_path / "out" / "model.safetensors").write_bytes(data)
    assert not verify(tmp_path / "out").ok


def test_a_newer_one_says_which_version_to_use(tmp_path, run):
    name = next(iter(EXPECTED))
    shutil.copytree(GOLDEN / name, tmp_path / "out")
    record = json.loads((tmp_path / "out" / "qkit.json").read_text())
    (tmp_path / "out" / "qkit.json").write_text(json.dumps({**record, "format_version": 99, "qkit_version": "9.0.0"}))
    code, _, err = run("verify", tmp_path / "out")
    assert code == 4 and 'was written by qkit "9.0.0"' in err and "or newer" in err
