"""What ``--calib`` names: a file or a data set, a column of it, and its weight among the others.

``PATH[:COLUMN][:WEIGHT]`` or ``dataset:NAME[:config][:split][:column][:weight]``. A last part that is a number is the weight;
a path that exists with all its colons is taken as it is. This file imports no torch, so that a wrong command fails at once.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from qkit.errors import UsageError

DATASET = "dataset:"
_FORM = "dataset:NAME[:config][:split][:column]"
_COLON = re.compile(r":(?![^\[]*\])")  # not that of train[:100]
_FIELDS = 4  # of a data set: name, config, split, column

Given = str | Path | Sequence[str | Path] | None


@dataclass(frozen=True)
class CalibSource:
    """One source of calibration data.

    place: a path, or ``dataset:NAME[:config][:split]``; column: None where none is named; weight: its share of the samples,
    in proportion to the weights of the others
    """

    place: str
    column: str | None = None
    weight: float = 1.0

    @property
    def is_dataset(self) -> bool:
        """Whether it is a data set of the ``datasets`` package."""
        return self.place.startswith(DATASET)

    @property
    def path(self) -> Path:
        """The file or folder (of a data set, its name as a path)."""
        return Path(self.place)

    @property
    def name(self) -> str:
        """A short name: that of the file, or the data set as it was given."""
        return self.place if self.is_dataset else self.path.name or self.place

    @property
    def dataset(self) -> tuple[str, str | None, str]:
        """(name, config, split) of a data set; the split is 'train' where none is given."""
        name, config, split = [*_COLON.split(self.place)[1:], "", ""][:3]
        return name, config or None, split or "train"


def parse_sources(given: Given) -> tuple[CalibSource, ...]:
    """The sources of an option that may be repeated; none for None. Raises UsageError for one that says nothing."""
    if given is None:
        return ()
    return tuple(map(parse_source, [given] if isinstance(given, (str, Path)) else given))


def parse_source(given: str | Path) -> CalibSource:
    """One source. Raises UsageError for a weight that is none, and for a data set without a name."""
    text = str(given)
    if text.startswith(DATASET):
        return _dataset(text)
    if Path(text).exists():
        return CalibSource(text)
    rest, weight = _weighted(text, text)
    if Path(rest).exists():
        return CalibSource(rest, weight=weight)
    place, colon, column = rest.rpartition(":")
    if colon and place and column and Path(place).exists():
        return CalibSource(place, column, weight)
    return CalibSource(rest, weight=weight)


def _dataset(text: str) -> CalibSource:
    fields = _COLON.split(text)[1:]
    weight = 1.0
    if len(fields) > 1 and _number(fields[-1]) is not None:
        weight = _checked(fields.pop(), text)
    if not fields[0] or len(fields) > _FIELDS:
        raise UsageError(f"--calib {text}: that is not a data set: write {_FORM}, and a weight behind it if you like")
    column = fields.pop() if len(fields) == _FIELDS else ""
    return CalibSource(DATASET + ":".join(fields), column or None, weight)


def _weighted(text: str, given: str) -> tuple[str, float]:
    rest, colon, last = text.rpartition(":")
    if not colon or not rest or _number(last) is None:
        return text, 1.0
    return rest, _checked(last, given)


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _checked(number: str, given: str) -> float:
    weight = float(number)
    if not (math.isfinite(weight) and weight > 0):
        raise UsageError(f"--calib {given}: the weight is {number}, expected a number above 0")
    return weight


def shares(weights: Sequence[float], total: int) -> list[int]:
    """How many of ``total`` samples each source gives, in proportion to its weight; the largest remainders get the rest."""
    exact = [total * w / sum(weights) for w in weights]
    counts = [int(x) for x in exact]
    by_remainder = sorted(range(len(exact)), key=lambda i: (counts[i] - exact[i], i))
    for i in by_remainder[: total - sum(counts)]:
        counts[i] += 1
    return counts


def interleaved(counts: Sequence[int]) -> list[tuple[int, int]]:
    """(source, its row) in an order in which every beginning has each source in about its share."""
    places = [((row + 0.5) / count, source, row) for source, count in enumerate(counts) for row in range(count)]
    return [(source, row) for _, source, row in sorted(places)]
