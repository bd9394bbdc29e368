"""Calibration rows, what is gathered of them, and how a model calls its blocks.

Rows live in a file of the job folder, one hidden state [tokens, hidden] a row, and are read and written in
pieces: resident memory does not grow with their number (the page cache keeps them at hand), and the file is
what a resumed run goes on from.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qkit.errors import BadCalibration, Unsupported
from qkit.parallel import Workers

_PIECE_TOKENS = 512  # tokens, at the least, that one worker runs through the block at a time
_PIECE_VALUES = 1 << 19  # or as many as have this many hidden values: narrow models go in longer pieces
PENDING_BYTES = 16 << 20  # inputs that wait for the Hessian
SAMPLE_TOKENS = 512  # tokens kept per group for scale searches and error figures
_TILE, _DIAGONAL_TILE = 704, 192  # columns of one Hessian tile at most; on the diagonal, where half of a tile is wasted
MAX_BAD_ROWS = 0.1  # share of rows with non-finite activations above which a run is given up


def piece_tokens(hidden: int) -> int:
    """Tokens of one piece, if rows are short enough."""
    return max(_PIECE_TOKENS, _PIECE_VALUES // hidden)


@dataclass
class Rows:
    """Hidden states that enter a block: a file of ``count`` rows [tokens, hidden] in ``dtype``.

    good: rows without a non-finite value so far; the others are left out and counted
    kinds: uint8 [count, tokens], indices of ``calibration.KINDS``; 0 where a shorter row was filled up; None: all is text
    """

    path: Path
    count: int
    tokens: int
    hidden: int
    dtype: torch.dtype
    good: list[bool] = field(default_factory=list)
    kinds: Tensor | None = None

    def counted(self, start: int, stop: int) -> Tensor | None:
        """bool [(stop - start) * tokens]: tokens that statistics are taken of; None: all of them."""
        good = torch.tensor(self.good[start:stop])
        if self.kinds is None:
            return None if bool(good.all()) else good.repeat_interleave(self.tokens)
        mask = ((self.kinds[start:stop] > 0) & good[:, None]).flatten()
        return None if bool(mask.all()) else mask

    @property
    def row_bytes(self) -> int:
        return self.tokens * self.hidden * self.dtype.itemsize

    def read(self, start: int, stop: int) -> Tensor:
        """[stop - start, tokens, hidden]"""
        rows = torch.empty(stop - start, self.tokens, self.hidden, dtype=self.dtype)
        buffer = rows.view(torch.uint8).numpy().reshape(-1).data
        with self.path.open("rb", buffering=0) as f:
            f.seek(start * self.row_bytes)
            if f.readinto(buffer) != len(buffer):
                raise BadCalibration(f"{self.path}: shorter than {self.count} rows: delete the job folder, start again")
        return rows

    def pieces(self) -> Iterator[tuple[int, int]]:
        """(start, stop) of the rows that are worked on as one. Pieces do not depend on the number of workers."""
        step = max(1, piece_tokens(self.hidden) // self.tokens)
        for start in range(0, self.count, step):
            yield start, min(start + step, self.count)


@dataclass(frozen=True)
class Stats:
    """What was seen at the input of a group of linears, over ``tokens`` tokens.

    mean_square: float32 [in]
    sample:      [n, in] inputs spread evenly over the rows, n at most about SAMPLE_TOKENS
    kinds:       uint8 [n] of the sample, and how many tokens of all each stands for, float32 [n] (None: all are text)
    hessian:     float32 [in, in], mean over tokens of x x^T (None: not asked for)
    absmax, mean_abs: float32 [in] (None: not asked for)
    """

    tokens: int
    mean_square: Tensor
    sample: Tensor
    hessian: Tensor | None = None
    absmax: Tensor | None = None
    mean_abs: Tensor | None = None
    kinds: Tensor | None = None
    stands_for: Tensor | None = None

    def divided_by(self, scale: Tensor) -> Stats:
        """The statistics of inputs divided per channel by ``scale`` [in]."""
        return Stats(
            self.tokens,
            self.mean_square / scale.square(),
            (self.sample.float() / scale).to(self.sample.dtype),
            None if self.hessian is None else self.hessian / (scale[:, None] * scale[None, :]),
            None if self.absmax is None else self.absmax / scale,
            None if self.mean_abs is None else self.mean_abs / scale,
            self.kinds,
            self.stands_for,
        )


@dataclass(frozen=True)
class Wanted:
    """What a run needs to know of inputs. Ranges cost as much as a small product, so they are taken on request.

    One of the two is always wanted: the energy of every channel comes from the Hessian's diagonal or with the ranges.
    """

    hessian: bool
    ranges: bool

    def __post_init__(self) -> None:
        assert self.hessian or self.ranges


@dataclass(frozen=True)
class Piece:
    """What one worker saw at the input of one group: x float32 [n, in], and absmax, sum of |x| and of x^2 [in]."""

    x: Tensor
    sums: tuple[Tensor, Tensor, Tensor] | None
    sample: Tensor
    kinds: Tensor | None


def strides(kinds: Tensor) -> list[int]:
    """By kind, how many tokens one of the sample stands for: few answers are not lost among many pieces of pictures."""
    share = SAMPLE_TOKENS // (int(kinds.max()) + 1)
    return [max(1, int(n) // share) for n in kinds.flatten().bincount()]


def piece_of(x: Tensor, stride: int, ranges: bool, kinds: Tensor | None = None, each: Sequence[int] = ()) -> Piece:
    """kinds: uint8 [n] of the inputs; each: ``strides`` of them."""
    wide = x.to(torch.float32)
    if kinds is None:
        sample, of = x[::stride].clone(), None
    else:
        chosen = torch.cat([(kinds == k).nonzero()[::n, 0] for k, n in enumerate(each)]).sort().values
        sample, of = x[chosen], kinds[chosen]
    if not ranges:
        return Piece(wide, None, sample, of)
    magnitude = wide.abs()
    return Piece(wide, (magnitude.amax(0), magnitude.sum(0), magnitude.square_().sum(0)), sample, of)


class Accumulator:
    """Gathers Stats of one group from pieces, always in the order of the rows."""

    def __init__(self, width: int, wanted: Wanted, dtype: torch.dtype) -> None:
        self.tokens = 0
        self.width = width
        self.sums = [torch.zeros(width) for _ in range(3)] if wanted.ranges else None
        # One block for all samples: small pieces kept between large ones that come and go would tear the heap apart.
        self.sample = torch.empty(2 * SAMPLE_TOKENS, width, dtype=dtype)
        self.kinds = torch.zeros(2 * SAMPLE_TOKENS, dtype=torch.uint8)
        self.sampled = 0
        self.pending: list[Tensor] = []
        self.hessian = torch.zeros(width, width) if wanted.hessian else None

    def add(self, p: Piece) -> None:
        """Add a piece; its share of the Hessian is left to ``jobs``."""
        self.tokens += len(p.x)
        room = min(len(p.sample), len(self.sample) - self.sampled)
        self.sample[self.sampled : self.sampled + room] = p.sample[:room]
        if p.kinds is not None:
            self.kinds[self.sampled : self.sampled + room] = p.kinds[:room]
        self.sampled += room
        if self.sums is not None and p.sums is not None:
            torch.maximum(self.sums[0], p.sums[0], out=self.sums[0])
            self.sums[1] += p.sums[1]
            self.sums[2] += p.sums[2]
        if self.hessian is not None:
            self.pending.append(p.x)

    def jobs(self) -> list[Callable[[], object]]:
        """What is left to do for the pieces added so far: independent jobs, one per tile of the Hessian.

        Inputs in bf16 are exact in float32, so only the order of additions rounds, and that is fixed. The lower triangle
        alone is summed: half the work.
        """
        xs, self.pending = self.pending, []
        if self.hessian is None or not xs:
            return []
        return [partial(_add_tile, self.hessian, xs, i, j) for i, j in self._tiles()]

    def _tiles(self) -> list[tuple[slice, slice]]:
        """Tiles of the lower triangle, the large ones first; those on the diagonal whole."""
        found = list(_lower_tiles(0, self.width))
        return sorted(found, key=lambda t: (t[1].start - t[1].stop, t[0].start, t[1].start))

    def finish(self, each: Sequence[int] = ()) -> Stats:
        """each: ``strides``, where tokens are of several kinds."""
        found = self._finish()
        if not each:
            return found
        kinds = self.kinds[: self.sampled]
        return replace(found, kinds=kinds, stands_for=torch.tensor(each, dtype=torch.float32)[kinds.long()])

    def _finish(self) -> Stats:
        n = max(1, self.tokens)
        if self.hessian is not None:
            self.hessian.div_(n)
            for i, j in self._tiles():  # the upper triangle, in place: a copy would double the largest matrix there is
                if i != j:
                    self.hessian[j, i] = self.hessian[i, j].T
        sample = self.sample[: self.sampled]
        if self.sums is None:
            assert self.hessian is not None
            return Stats(self.tokens, self.hessian.diagonal().clone(), sample, self.hessian)
        absmax, total, squares = self.sums
        return Stats(self.tokens, squares / n, sample, self.hessian, absmax, total / n)


def _lower_tiles(start: int, stop: int) -> Iterator[tuple[slice, slice]]:
    """Tiles of the lower triangle of the square [start, stop), by halves."""
    if stop - start <= _DIAGONAL_TILE:
        yield slice(start, stop), slice(start, stop)
        return
    half = (start + stop) // 2
    yield from _lower_tiles(start, half)
    yield from _lower_tiles(half, stop)
    yield from ((i, j) for i in _spans(half, stop) for j in _spans(start, half))


def _spans(start: int, stop: int) -> list[slice]:
    """[start, stop) in equal parts of at most _TILE."""
    count = -(-(stop - start) // _TILE)
    cuts = [start + (stop - start) * i // count for i in range(count + 1)]
    return [slice(a, b) for a, b in pairwise(cuts)]


def _add_tile(h: Tensor, xs: list[Tensor], i: slice, j: slice) -> None:
    for x in xs:
        h[i, j].addmm_(x[:, i].T, x[:, j])


def run_pending(sums: Iterable[Accumulator], pool: Workers, everything: bool) -> None:
    """Bring Hessians up to date, once enough inputs wait for it (or ``everything``)."""
    sums = list(sums)
    if everything or sum(x.nbytes for s in sums for x in s.pending) >= PENDING_BYTES:
        pool.map(lambda job: job(), [job for s in sums for job in s.jobs()])


@dataclass(frozen=True)
class PerRow:
    """An argument that differs from row to row (rotary angles of pictures of several sizes): tensors of one shape that make a
    batch along ``dim``."""

    each: tuple[Tensor, ...]
    dim: int


@dataclass(frozen=True)
class Call:
    """How the model calls a block: the arguments after the hidden states, recorded for one row, or for each (PerRow)."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def to(self, dtype: torch.dtype) -> Call:
        """The same call for a block that runs in ``dtype``: its floating-point arguments are in it too."""

        def cast(value: Any) -> Any:
            if isinstance(value, PerRow):
                return PerRow(tuple(cast(v) for v in value.each), value.dim)
            if isinstance(value, (tuple, list)):
                return type(value)(cast(v) for v in value)
            return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value

        return Call(cast(self.args), {k: cast(v) for k, v in self.kwargs.items()})

    def __call__(self, block: nn.Module, hidden: Tensor, rows: slice = slice(None)) -> Tensor:
        """What the block gives for those rows, [n, tokens, hidden]."""

        def of(value: Any) -> Any:
            if isinstance(value, PerRow):
                return torch.cat(value.each[rows], dim=value.dim)
            return type(value)(of(v) for v in value) if isinstance(value, (tuple, list)) else value

        out = block(hidden, *of(self.args), **{k: of(v) for k, v in self.kwargs.items()})
        first: Tensor = out[0] if isinstance(out, tuple) else out
        return first


def merged(calls: list[dict[int, Call]], lengths: list[int]) -> dict[int, Call]:
    """The calls of rows of several lengths as those of one batch, filled up at the end to the longest.

    Blocks are causal, so that what follows a row's end changes nothing in it. Raises Unsupported for arguments that are
    neither the same for all rows nor one number, or vector, a token.
    """
    longest = lengths.index(max(lengths))
    made: dict[tuple[int, ...], Any] = {}  # blocks share their arguments

    def join(values: list[Any]) -> Any:
        first = values[longest]
        if isinstance(first, (tuple, list)):
            return type(first)(join([v[i] for v in values]) for i in range(len(first)))
        if not isinstance(first, Tensor):
            return first
        key = tuple(map(id, values))
        if key not in made:
            made[key] = _joined(values, lengths, longest)
        return made[key]

    found = {}
    for index, call in calls[longest].items():
        args = join([c[index].args for c in calls])
        found[index] = Call(args, {k: join([c[index].kwargs[k] for c in calls]) for k in call.kwargs})
    return found


def _joined(values: list[Tensor], lengths: list[int], longest: int) -> Any:
    first, most = values[longest], lengths[longest]
    if all(v.shape == first.shape and torch.equal(v, first) for v in values):
        return first
    dim = next((d for d, n in enumerate(first.shape) if n == most), None)
    if dim is None or any(v.dim() != first.dim() or v.shape[dim] != n for v, n in zip(values, lengths, strict=True)):
        raise Unsupported(
            f"calibration rows of several lengths: blocks are called with a tensor {list(first.shape)} that differs between "
            "rows and does not follow their tokens"
        )
    if all(torch.equal(v, first.narrow(dim, 0, n)) for v, n in zip(values, lengths, strict=True)):
        return first
    padded = []
    for v, n in zip(values, lengths, strict=True):
        rest = v.new_zeros(*v.shape[:dim], most - n, *v.shape[dim + 1 :])
        padded.append(torch.cat([v, rest], dim))
    return PerRow(tuple(padded), dim - 1)


# ---- the way into the first block ---------------------------------------------------------------------------


class _Recorder(nn.Module):
    """Stands in a block's place: notes how it is called and hands the hidden states on."""

    def __init__(self, block: nn.Module, calls: dict[int, Call], first: list[Tensor], index: int) -> None:
        super().__init__()
        self.__dict__["_block"] = block
        self.__dict__["_note"] = (calls, first, index)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_block"], name)  # models read attributes such as attention_type from a block

    def forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        calls, first, index = self.__dict__["_note"]
        if index == 0:
            first.append(hidden)
        calls[index] = Call(args, kwargs)
        return hidden


def enter(
    model: nn.Module, blocks: str, samples: Iterable[Mapping[str, Tensor]], cache: Any = None
) -> Generator[tuple[Tensor, dict[int, Call]], None, None]:
    """Hidden states that reach the first block, a row [1, tokens, hidden] at a time, and how each block is called.

    model: everything but the blocks is materialized; samples: what the model is called with for each row;
    cache: the KV cache of these calls
    """
    layers = model.get_submodule(blocks)
    originals = list(layers.children())
    calls: dict[int, Call] = {}
    first: list[Tensor] = []
    base: Any = getattr(model, "base_model", model)
    try:
        for i, block in enumerate(originals):
            layers[i] = _Recorder(block, calls, first, i)  # type: ignore[operator]
        for sample in samples:
            first.clear()
            calls.clear()
            with torch.inference_mode():
                base(**sample, past_key_values=cache, use_cache=cache is not None)
            yield first[0], dict(calls)
    finally:
        for i, block in enumerate(originals):
            layers[i] = block  # type: ignore[operator]
