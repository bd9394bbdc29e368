"""Where the rows of every tensor of a checkpoint go in a GGUF file, found by what the converter makes of numbers.

Three times the converter gets tensors whose elements say where they lie: in which tensor, in which row, in which column.
What comes out says what it did. Rows that stay whole, in whatever order and tensor, can be blocks of a quantized type.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from qkit.files.gguf_converter import Converter, Made
from qkit.files.gguf_places import MINUS_EXP, Change, Place
from qkit.files.safefile import TensorInfo

if TYPE_CHECKING:
    from torch import Tensor

    from qkit.files.checkpoint import View

Array = npt.NDArray[Any]
Images = tuple[
    Array, Array, Array
]  # of the tensor, the row and the column that each element comes from; [rows, columns]
# A place n is the number 8 n + 3: what scales or shifts it leaves these numbers, which are exact in float32.
_STEP, _FIRST = 8, 3
_CHUNK = 1 << 22
_FEW = 1 << 20  # values of tensors that may be followed one by one


@dataclass(frozen=True)
class Rows:
    """The rows of one tensor of the file.

    names: tensors of the checkpoint; index: of each row the one it comes from; rows: and the row there
    change: of every value; unit: values of a row, or 1 where single values went to other places
    """

    names: tuple[str, ...]
    index: Array
    rows: Array
    change: Change
    unit: int

    @property
    def held(self) -> list[str]:
        """The tensors of the checkpoint that have a row in it, in their order."""
        return [self.names[i] for i in dict.fromkeys(self.index.tolist())]


def found_rows(converter: Converter, names: Sequence[str], views: Mapping[str, View]) -> dict[str, Rows | None]:
    """{tensor of the file: its rows}; None for one that is no rows of others. names: of the checkpoint, views among them"""
    sources = list(converter.tensors)
    loads = [_probe(kind, converter.tensors, sources) for kind in range(3)]
    passes = [
        deque(converter.made(load, exact=True)) for load in (*loads, lambda name: _small(converter.tensors[name].shape))
    ]
    known = _Known(names, views, converter.tensors, sources)
    result: dict[str, Rows | None] = {}
    while passes[0]:  # what the converter computed is kept by its lazy tensors: each goes when it was looked at
        *made, small = (each.popleft() for each in passes)
        rows = known.match(_images(made), small.sources)
        result[small.name] = rows or known.exponential(small)
    return result


def _small(shape: tuple[int, ...]) -> Tensor:
    """Values of size one, for what cannot be seen by large numbers."""
    import torch

    return ((torch.arange(int(np.prod(shape))) % 97 - 48) / 64.0).reshape(shape)


def _probe(kind: int, tensors: Mapping[str, TensorInfo], sources: list[str]) -> Callable[[str], Tensor]:
    """Tensors that number their sources (0), rows (1) or columns (2); no memory is used for what is not copied."""
    import torch

    numbers = {name: i for i, name in enumerate(sources)}

    def load(name: str) -> Tensor:
        shape = tensors[name].shape
        lead, last = (shape[:-1], shape[-1]) if len(shape) > 1 else (shape, 1)
        if kind == 0:
            return torch.full((1,) * len(shape), float(_STEP * numbers[name] + _FIRST)).expand(shape)
        count = int(np.prod(lead)) if kind == 1 else last
        numbered = torch.arange(count, dtype=torch.float32) * _STEP + _FIRST
        if kind == 1:
            return numbered.reshape(*lead, *(1,) * (len(shape) - len(lead))).expand(shape)
        return (numbered if len(shape) > 1 else numbered[0]).expand(shape)

    return load


def _images(made: Sequence[Made]) -> Images:
    first, second, third = (_flat(m.values()) for m in made)
    return first, second, third


def _flat(values: Array) -> Array:
    """[rows, columns], without a copy where the values need none."""
    if values.ndim < 2:
        return values.reshape(-1, 1)
    return values.reshape(-1, values.shape[-1]) if values.ndim > 2 else values


class _Known:
    """The tensors of the checkpoint, to be looked up by what the converter was given."""

    def __init__(
        self,
        names: Sequence[str],
        views: Mapping[str, View],
        tensors: Mapping[str, TensorInfo],
        sources: list[str],
    ) -> None:
        self.views, self.tensors, self.sources = views, tensors, sources
        self.of_source: dict[str, list[str]] = {}
        for name in names:
            for source in views[name].sources if name in views else (name,):
                self.of_source.setdefault(source, []).append(name)

    def images(self, name: str) -> Images:
        """What a tensor of the checkpoint is, by the same numbers."""
        first, second, third = (self._image(name, _probe(kind, self.tensors, self.sources)) for kind in range(3))
        return first, second, third

    def _image(self, of: str, load: Callable[[str], Tensor]) -> Array:
        if of not in self.views:
            return _flat(load(of).numpy())

        def read(name: str, index: int | None = None) -> Tensor:
            return load(name) if index is None else load(name)[index]

        return _flat(self.views[of].compute(read).numpy())

    def exponential(self, small: Made) -> Rows | None:
        """The values of a single tensor, if the file has minus their exponentials."""
        names = [n for leaf in small.sources for n in self.of_source.get(leaf, ())]
        if len(names) != 1 or len(small.sources) != 1 or names[0] in self.views:
            return None
        given, found = _small(self.tensors[names[0]].shape).numpy().reshape(-1), small.values().reshape(-1)
        if given.shape != found.shape or not np.allclose(found, -np.exp(given), rtol=1e-6, atol=0):
            return None
        return Rows((names[0],), np.zeros(len(given), dtype=np.int64), np.arange(len(given)), MINUS_EXP, 1)

    def match(self, images: Images, leaves: Sequence[str]) -> Rows | None:
        """The rows of the checkpoint that these are, or the single values of small tensors."""
        change = 0.0
        if len(leaves) == 1:  # every value of one tensor may be shifted
            change = float(images[0].flat[0]) - (_STEP * self.sources.index(leaves[0]) + _FIRST)
        candidates = list(dict.fromkeys(n for leaf in leaves for n in self.of_source.get(leaf, ())))
        if not candidates or not np.isfinite(change) or not all(np.isfinite(i[:, 0]).all() for i in images):
            return None
        if change:
            images = (images[0] - change, images[1] - change, images[2] - change)
        known = [self.images(name) for name in candidates]
        found = _match(images, known)
        unit = images[0].shape[1]
        if found is None and images[0].size <= _FEW and sum(k[0].size for k in known) <= _FEW:
            found, unit = _match(_singly(images), [_singly(k) for k in known]), 1
        return None if found is None else Rows(tuple(candidates), *found, change, unit)


def _singly(images: Images) -> Images:
    first, second, third = (i.reshape(-1, 1) for i in images)
    return first, second, third


def _match(images: Images, known: list[Images]) -> tuple[Array, Array] | None:
    """Of each row the tensor that it comes from, and its row there; None where they are no whole rows of these."""
    if any(k[0].shape[1] != images[0].shape[1] for k in known):
        return None
    firsts = [_keys(k) for k in known]
    order = np.argsort(np.concatenate(firsts), kind="stable")
    keys = np.concatenate(firsts)[order]
    wanted = _keys(images)
    at = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    if not np.array_equal(keys[at], wanted):
        return None
    starts = np.cumsum([0, *(len(f) for f in firsts)])
    place = order[at]
    index = np.searchsorted(starts, place, side="right") - 1
    rows = place - starts[index]
    if not all(_same(images, index == i, rows, k) for i, k in enumerate(known)):
        return None
    return index, rows


def _keys(images: Images) -> Array:
    """A number for the first element of each row."""
    tensor, row, column = (np.asarray(i[:, 0], dtype=np.float64) for i in images)
    whole: Array = (tensor * 2.0**25 + row).astype(np.int64) * 2**17 ^ column.astype(np.int64)
    return whole


def _same(images: Images, mine: Array, rows: Array, known: Images) -> bool:
    """Whether these whole rows are the ones of a tensor."""
    picked = np.flatnonzero(mine)
    for found, expected in zip(images, known, strict=True):
        if found.strides[1] == 0 and expected.strides[1] == 0:  # the first elements, which are equal, stand for all
            continue
        if found.strides[0] == 0 and expected.strides[0] == 0:
            if len(picked) and not np.array_equal(found[0], expected[0]):
                return False
            continue
        step = max(1, _CHUNK // max(1, found.shape[1]))
        for first in range(0, len(picked), step):
            some = picked[first : first + step]
            if not np.array_equal(found[some], expected[rows[some]]):
                return False
    return True


def places(found: Mapping[str, Rows | None], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Place]:
    """Where the tensors of the checkpoint lie, those of which every value is in the file."""
    pieces: dict[str, list[tuple[str, Array, Array, Rows]]] = {}
    for inside, rows in found.items():
        if rows is None:
            continue
        for i, name in enumerate(rows.names):
            mine = np.flatnonzero(rows.index == i)
            if len(mine):
                pieces.setdefault(name, []).append((inside, rows.rows[mine], mine, rows))
    result = {}
    for name, entries in pieces.items():
        units = {rows.unit for *_, rows in entries}
        unit = units.pop() if len(units) == 1 else 1
        count = int(np.prod(shapes[name])) // unit
        owner, at = np.full(count, -1), np.zeros(count, dtype=np.int64)
        for i, (_, own, there, rows) in enumerate(entries):
            spread = np.arange(rows.unit // unit)
            own_units = (own[:, None] * len(spread) + spread).reshape(-1)
            owner[own_units], at[own_units] = i, (there[:, None] * len(spread) + spread).reshape(-1)
        changes = {rows.change for *_, rows in entries}
        if (owner >= 0).all() and len(changes) == 1:
            runs = _runs([e[0] for e in entries], owner, at)
            result[name] = Place(shapes[name], runs, changes.pop(), unit)
    return result


def _runs(inside: list[str], owner: Array, at: Array) -> list[tuple[str, list[int]]]:
    """Places in few numbers: [tensor of the file, [first, count, step, ..]]."""
    steps = np.where(np.diff(owner) == 0, np.diff(at), 0)  # a step of 0, which no tensor has, ends a run
    turns = np.flatnonzero(np.diff(steps)) + 1
    runs: list[tuple[str, list[int]]] = []
    begin = 0
    while begin < len(at):
        count, step = 1, 1
        if begin < len(steps) and steps[begin] != 0:
            turn = np.searchsorted(turns, begin, side="right")
            end = int(turns[turn]) if turn < len(turns) else len(steps)
            count, step = end - begin + 1, int(steps[begin])
        name = inside[int(owner[begin])]
        if not runs or runs[-1][0] != name:
            runs.append((name, []))
        runs[-1][1].extend((int(at[begin]), count, step))
        begin += count
    return runs
