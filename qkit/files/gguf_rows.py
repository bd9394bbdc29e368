"""Where the rows of every tensor of a checkpoint go in a GGUF file, found by what the converter makes of numbers.

Three times the converter gets tensors whose elements say where they lie: in which tensor, in which row, in which column.
What comes out says what it did. Rows that stay whole, in whatever order and tensor, can be blocks of a quantized type.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from qkit.files.gguf_converter import Converter, Made
from qkit.files.gguf_places import Place
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


@dataclass(frozen=True)
class Rows:
    """The rows of one tensor of the file.

    names: tensors of the checkpoint; index: of each row the one it comes from; rows: and the row there
    added: what is added to every value
    """

    names: tuple[str, ...]
    index: Array
    rows: Array
    added: float = 0.0

    @property
    def held(self) -> list[str]:
        """The tensors of the checkpoint that have a row in it, in their order."""
        return [self.names[i] for i in dict.fromkeys(self.index.tolist())]


def found_rows(converter: Converter, names: Sequence[str], views: Mapping[str, View]) -> dict[str, Rows | None]:
    """{tensor of the file: its rows}; None for one that is no rows of others. names: of the checkpoint, views among them"""
    sources = list(converter.tensors)
    passes = [converter.made(_probe(kind, converter.tensors, sources), exact=True) for kind in range(3)]
    known = _Known(names, views, converter.tensors, sources)
    result: dict[str, Rows | None] = {}
    for made in zip(*passes, strict=True):
        result[made[0].name] = known.match(_images(made), made[0].sources)
    return result


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

    def match(self, images: Images, leaves: Sequence[str]) -> Rows | None:
        """The rows of the checkpoint that these are."""
        if not leaves:
            return None
        added = 0.0
        if len(leaves) == 1:  # every value of one tensor may be shifted
            added = float(images[0].flat[0]) - (_STEP * self.sources.index(leaves[0]) + _FIRST)
            if not np.isfinite(added):
                return None
            if added:
                images = (images[0] - added, images[1] - added, images[2] - added)
        candidates = list(dict.fromkeys(n for leaf in leaves for n in self.of_source.get(leaf, ())))
        known = [self.images(name) for name in candidates]
        if not known or any(k[0].shape[1] != images[0].shape[1] for k in known):
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
        return Rows(tuple(candidates), index, rows, added)


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
    """Where the tensors of the checkpoint lie, those of which every row is in the file."""
    pieces: dict[str, list[tuple[str, Array, Array, float]]] = {}
    for inside, rows in found.items():
        if rows is None:
            continue
        for i, name in enumerate(rows.names):
            mine = np.flatnonzero(rows.index == i)
            if len(mine):
                pieces.setdefault(name, []).append((inside, rows.rows[mine], mine, rows.added))
    result = {}
    for name, entries in pieces.items():
        shape = shapes[name]
        count = int(np.prod(shape[:-1])) if len(shape) > 1 else int(np.prod(shape))
        owner, at = np.full(count, -1), np.zeros(count, dtype=np.int64)
        for i, (_, own, there, _) in enumerate(entries):
            owner[own], at[own] = i, there
        if (owner >= 0).all():
            result[name] = Place(shape, _runs([e[0] for e in entries], owner, at), entries[0][3])
    return result


def _runs(inside: list[str], owner: Array, at: Array) -> list[tuple[str, list[int]]]:
    runs: list[tuple[str, list[int]]] = []
    begin = 0
    while begin < len(at):
        end = begin + 1
        step = int(at[end] - at[begin]) if end < len(at) and owner[end] == owner[begin] else 1
        broken = np.flatnonzero((np.diff(at[begin:]) != step) | (np.diff(owner[begin:]) != 0))
        end = len(at) if not len(broken) else begin + int(broken[0]) + 1
        name = inside[int(owner[begin])]
        if not runs or runs[-1][0] != name:
            runs.append((name, []))
        runs[-1][1].extend((int(at[begin]), end - begin, step if end - begin > 1 else 1))
        begin = end
    return runs
