"""Where the tensors of a checkpoint lie in a GGUF file, as config.json of a result has it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

SCALE = ".scale"  # behind the name of a linear: what the products of its NVFP4 weight are multiplied with


@dataclass(frozen=True)
class Place:
    """Where a tensor of the checkpoint lies in the file.

    shape: of the tensor; runs: [tensor of the file, [first row, rows, step, first row ..]] in the order of its own rows
    added: what is to be taken from every value
    """

    shape: tuple[int, ...]
    runs: list[tuple[str, list[int]]]
    added: float = 0.0

    def to_json(self) -> list[Any]:
        """As config.json has it."""
        return [list(self.shape), [list(run) for run in self.runs], self.added]


def read_place(entry: object) -> Place | None:
    """A place as config.json has it; None where it is none."""
    if not (isinstance(entry, list) and len(entry) == 3 and isinstance(entry[1], list) and entry[1]):
        return None
    shape, runs, added = entry
    sound = isinstance(shape, list) and all(type(n) is int and n > 0 for n in shape) and type(added) in (int, float)
    for run in runs:
        sound &= isinstance(run, list) and len(run) == 2 and isinstance(run[0], str) and isinstance(run[1], list)
        sound = sound and bool(run[1]) and len(run[1]) % 3 == 0 and all(type(n) is int for n in run[1])
        if not sound:
            return None
    return Place(tuple(shape), [(name, numbers) for name, numbers in runs], float(added))
