"""Where the tensors of a checkpoint lie in a GGUF file, as config.json of a result has it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

SCALE = ".scale"  # behind the name of a linear: what the products of its NVFP4 weight are multiplied with


MINUS_EXP = "-exp"  # a change: the file has minus the exponential of every value
Change = float | str  # what is added to every value, or MINUS_EXP


@dataclass(frozen=True)
class Place:
    """Where a tensor of the checkpoint lies in the file.

    shape: of the tensor; unit: values that stay together: a row, or a single one
    runs: [tensor of the file, [first unit, units, step, first unit ..]] in the order of its own units
    """

    shape: tuple[int, ...]
    runs: list[tuple[str, list[int]]]
    change: Change
    unit: int

    @property
    def in_rows(self) -> bool:
        """Whether it is a matrix of which the file has whole rows, unchanged, so that they may be blocks."""
        return len(self.shape) == 2 and self.unit == self.shape[1] and self.change == 0

    def to_json(self) -> list[Any]:
        """As config.json has it."""
        return [list(self.shape), [list(run) for run in self.runs], self.change, self.unit]


def read_place(entry: object) -> Place | None:
    """A place as config.json has it; None where it is none."""
    if not (isinstance(entry, list) and len(entry) == 4 and isinstance(entry[1], list) and entry[1]):
        return None
    shape, runs, change, unit = entry
    sound = isinstance(shape, list) and all(type(n) is int and n > 0 for n in shape) and type(unit) is int and unit > 0
    sound = sound and (type(change) in (int, float) or change == MINUS_EXP)
    for run in runs:
        sound = (
            sound and isinstance(run, list) and len(run) == 2 and isinstance(run[0], str) and isinstance(run[1], list)
        )
        sound = sound and bool(run[1]) and len(run[1]) % 3 == 0 and all(type(n) is int for n in run[1])
        if not (sound and min(run[1][1::3]) > 0):
            return None
    return Place(tuple(shape), [(name, numbers) for name, numbers in runs], change, unit)
