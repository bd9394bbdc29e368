"""What --calib names, and how sources share the samples."""

import pytest

from qkit.calibration.sources import CalibSource, interleaved, parse_source, shares
from qkit.errors import UsageError


def test_paths_columns_and_weights(tmp_path):
    file = tmp_path / "a.csv"
    file.touch()
    odd = tmp_path / "b:2"
    odd.touch()
    assert parse_source(file) == CalibSource(str(file))
    assert parse_source(f"{file}:2.5") == CalibSource(str(file), None, 2.5)
    assert parse_source(f"{file}:said") == CalibSource(str(file), "said")
    assert parse_source(f"{file}:said:3") == CalibSource(str(file), "said", 3)
    assert parse_source(odd) == CalibSource(str(odd))  # a file of that name
    assert parse_source("missing.txt:2") == CalibSource("missing.txt", None, 2)


@pytest.mark.parametrize(
    "given, expected",
    [
        ("dataset:a/b", ("a/b", None, "train", None, 1)),
        ("dataset:a/b:c:test:said", ("a/b", "c", "test", "said", 1)),
        ("dataset:a/b::train[:100]:said:0.5", ("a/b", None, "train[:100]", "said", 0.5)),
        ("dataset:a/b:2", ("a/b", None, "train", None, 2)),
    ],
)
def test_data_sets(given, expected):
    source = parse_source(given)
    assert (*source.dataset, source.column, source.weight) == expected


@pytest.mark.parametrize("given", ["chat.jsonl:0", "chat.jsonl:-1", "chat.jsonl:nan", "dataset:", "dataset:a:b:c:d:e"])
def test_what_says_nothing_is_refused(given):
    with pytest.raises(UsageError, match=f"--calib {given}"):
        parse_source(given)


def test_shares_are_in_proportion_and_spread():
    assert shares([2, 1], 64) == [43, 21] and shares([1, 1, 1], 4) == [2, 1, 1] and sum(shares([0.1, 7, 3], 17)) == 17
    order = interleaved([6, 3])
    assert len({*order}) == 9
    for part in (3, 6):
        assert sum(source == 0 for source, _ in order[:part]) == part * 2 // 3


def test_bad_usage_is_told_before_the_model_is_read(run):
    code, _, err = run("quantize", "--model", "m", "--scheme", "w4a16", "--calib", "x.jsonl:0", "--out", "o")
    assert code == 2 and "the weight is 0, expected a number above 0" in err
