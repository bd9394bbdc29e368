"""Point 10: mutated files of nine kinds, with a fixed seed; ``tools/fuzz.py --count 100000`` is the slow run."""

import json
import os
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))

import fuzz
import fuzz_targets

EACH = 120


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fuzz")
    return fuzz.campaign(EACH * len(fuzz_targets.KINDS), 20, folder, list(fuzz_targets.KINDS), lambda text: None)


def test_no_fault_hang_memory_or_wrong_success(found):
    assert found["inputs"] == EACH * 9 and found["failures"] == 0, json.dumps(found["places"], indent=1)


def test_both_ends_are_reached(found):
    """Of every kind, some mutants are refused, and some change nothing that matters."""
    for kind, outcomes in found["kinds"].items():
        assert outcomes["refused"] > 10 and outcomes["success"] > 0, kind


@pytest.mark.parametrize("what", fuzz.FAILURES)
def test_the_campaign_sees_it(tmp_path, monkeypatch, what):
    """Each kind of failure is counted as what it is."""
    bodies = {
        "hang": lambda: [None for _ in iter(int, 1)],
        "memory": lambda: bytearray(3 << 30) and None,
        "crash": lambda: os._exit(7),
        "fault": lambda: None.x,
        "wrong": lambda: "told",
    }
    monkeypatch.setattr(fuzz, "SECONDS", 1)
    (tmp_path / "a").mkdir()
    file = tmp_path / "a" / "f"
    file.write_bytes(b"sound")
    target = fuzz_targets.Target("a", tmp_path / "a", lambda rng: (file, b"mutated", bodies[what]))
    seen = []
    fuzz.in_child(target, 1, range(2), seen.append)
    assert [s.what for s in seen] == [what, what] and file.read_bytes() == b"sound"
