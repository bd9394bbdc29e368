"""Measurements that are kept: believed while everything that they depend on is what it was, and otherwise refused untouched."""

import pytest

from qkit.errors import BadInput, JobConflict
from qkit.sensitivity.result_cache import ResultCache

IDENTITY = {"model": "a", "rows": 32}


@pytest.fixture
def kept(tmp_path):
    """A file with one measurement."""
    file = tmp_path / "work" / "measured.jsonl"
    ResultCache(file, IDENTITY).put("x", {"kl": 0.5})
    return file


def test_a_measurement_is_found_again(kept):
    again = ResultCache(kept, dict(reversed(IDENTITY.items())))
    assert again.get("x") == {"kl": 0.5} and again.get("y") is None


@pytest.mark.parametrize(
    ("identity", "message"),
    [
        ({"model": "b", "rows": 32}, "another model: a there, b now"),
        ({"model": "a", "rows": 16}, "another rows: 32 there, 16 now"),
        ({"model": "a"}, "another rows: 32 there, None now"),
        ({**IDENTITY, "seed": 1}, "another seed: None there, 1 now"),
    ],
)
def test_another_identity_is_refused(identity, message, kept):
    before = kept.read_bytes()
    with pytest.raises(JobConflict, match=message):
        ResultCache(kept, identity)
    assert kept.read_bytes() == before


def test_a_torn_line_is_dropped_and_a_damaged_one_refused(kept):
    whole = kept.read_bytes()
    kept.write_bytes(whole + b'{"key": "y", "val')
    assert ResultCache(kept, IDENTITY).get("y") is None and kept.read_bytes() == whole
    kept.write_bytes(whole.replace(b"value", b"valve"))
    with pytest.raises(BadInput, match="damaged"):
        ResultCache(kept, IDENTITY)
