"""Calibration rows on the disk, and statistics of the inputs of linears.

Rows live in a file of the job folder, one hidden state [tokens, hidden] a row, and are read and written in
pieces: resident memory does not grow with their number (the page cache keeps them at hand), and the file is
what a resumed run goes on from.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

from qkit.errors import BadCalibration
from qkit.system.parallel import Workers

CPU = torch.device("cpu")
_PIECE_TOKENS = 512  # tokens, at the least, that one worker runs through the block at a time
_PIECE_VALUES = 1 << 19  # or as many as have this many hidden values: narrow models go in longer pieces
PENDING_BYTES = 16 << 20  # inputs that wait for the Hessian
SAMPLE_TOKENS = 512  # tokens kept per group for scale searches and error figures
_TILE, _DIAGONAL_TILE = 704, 192  # columns of one Hessian tile at most; on the diagonal, where half of a tile is wasted
MAX_BAD_ROWS = 0.1  # share of rows with non-finite activations above which a run is given up


def piece_tokens(hidden: int) -> int:
    """Number of tokens in one piece, if rows are short enough."""
    return max(_PIECE_TOKENS, _PIECE_VALUES // hidden)


@dataclass(kw_only=True)
class Rows:
    """Hidden states that enter a block: a file of ``count`` rows [tokens, hidden] in ``dtype``.

    good: which rows have had only finite values so far; the others are left out and counted
    kinds: uint8 [count, tokens], indices of ``dataset.KINDS``; 0 for padding; None: all tokens are text
    lead_shapes: shapes of rows that differ in shape, each [*lead, hidden] (the images of a sample in a vision tower). Such rows
           are read one by one, and ``tokens`` is that of the longest
    original: a file of the same rows in the original model, where a transform or a solver needs them
    times: the timestep of each row of a diffusion transformer; such rows have lead_shapes
    device: where rows are read to, and what is computed of them
    largest: largest value of the checkpoint's dtype; rows that exceed it in the wider dtype of a run are counted
    """

    path: Path
    count: int
    tokens: int
    hidden: int
    dtype: torch.dtype
    good: list[bool] = field(default_factory=list)
    kinds: Tensor | None = None
    lead_shapes: tuple[tuple[int, ...], ...] = ()
    original: Path | None = None
    times: tuple[float, ...] = ()
    device: torch.device = CPU
    largest: float = torch.finfo(torch.float32).max

    def __post_init__(self) -> None:
        self.kinds = None if self.kinds is None else self.kinds.to(self.device)

    def without(self, bad: Iterable[int]) -> Rows:
        """The rows with the indices ``bad`` marked as left out."""
        out = set(bad)
        return replace(self, good=[g and i not in out for i, g in enumerate(self.good)]) if out else self

    def part_of(self, row: int) -> int:
        """0 for a row whose timestep is in the lower half of all timesteps, else 1."""
        return int(bool(self.times) and 2 * self.times[row] > max(self.times))

    @property
    def total(self) -> int:
        """Number of tokens of all rows."""
        return sum(map(math.prod, self.lead_shapes)) if self.lead_shapes else self.count * self.tokens

    def valid(self, start: int, stop: int) -> Tensor | None:
        """bool [(stop - start) * tokens], True for tokens that count in statistics; None: all of them."""
        good = torch.tensor(self.good[start:stop], device=self.device)
        if self.kinds is None:
            tokens = math.prod(self.lead_shapes[start]) if self.lead_shapes else self.tokens
            return None if bool(good.all()) else good.repeat_interleave(tokens)
        mask = ((self.kinds[start:stop] > 0) & good[:, None]).flatten()
        return None if bool(mask.all()) else mask

    @property
    def row_bytes(self) -> int:
        return self.tokens * self.hidden * self.dtype.itemsize

    def read(self, start: int, stop: int) -> Tensor:
        """Rows [stop - start, tokens, hidden]; for rows of different shapes, the one at ``start``, [*lead, hidden]."""
        offset = start * self.row_bytes
        shape: tuple[int, ...] = (stop - start, self.tokens)
        if self.lead_shapes:
            shape = self.lead_shapes[start]
            offset = sum(map(math.prod, self.lead_shapes[:start])) * self.hidden * self.dtype.itemsize
        rows = torch.empty(*shape, self.hidden, dtype=self.dtype)
        buffer = rows.view(torch.uint8).numpy().reshape(-1).data
        with self.path.open("rb", buffering=0) as f:
            f.seek(offset)
            if f.readinto(buffer) != len(buffer):
                raise BadCalibration(f"{self.path}: shorter than {self.count} rows: delete the job folder, start again")
        return rows.to(self.device)

    def pieces(self) -> Iterator[tuple[int, int]]:
        """Yield (start, stop) of the rows of each piece. Pieces do not depend on the number of workers."""
        step = 1 if self.lead_shapes else max(1, piece_tokens(self.hidden) // self.tokens)
        for start in range(0, self.count, step):
            yield start, min(start + step, self.count)


@dataclass(frozen=True, kw_only=True)
class Stats:
    """Statistics of the inputs of a group of linears, over ``tokens`` tokens.

    mean_square: float32 [in]
    sample:      [n, in] inputs spread evenly over the rows, n at most about SAMPLE_TOKENS
    kinds:       uint8 [n], kinds of the sampled tokens (None: all are text)
    sample_weight: float32 [n], how many tokens each sampled one represents (None: all are text)
    hessian:     float32 [in, in], mean over tokens of x x^T (None: not asked for)
    absmax, mean_abs: float32 [in] (None: not asked for)
    by_time:     float32 [2, in], absmax of the lower and of the upper half of timesteps (None: there are none)
    drift:       float32 [in, in], mean over tokens of (x' - x) x^T, x' being x in the original model (None: not asked for)
    """

    tokens: int
    mean_square: Tensor
    sample: Tensor
    hessian: Tensor | None = None
    absmax: Tensor | None = None
    mean_abs: Tensor | None = None
    kinds: Tensor | None = None
    sample_weight: Tensor | None = None
    by_time: Tensor | None = None
    drift: Tensor | None = None

    def divided_by(self, scale: Tensor) -> Stats:
        """The statistics of inputs divided per channel by ``scale`` [in]."""
        return Stats(
            tokens=self.tokens,
            mean_square=self.mean_square / scale.square(),
            sample=(self.sample.float() / scale).to(self.sample.dtype),
            hessian=None if self.hessian is None else self.hessian / (scale[:, None] * scale[None, :]),
            absmax=None if self.absmax is None else self.absmax / scale,
            mean_abs=None if self.mean_abs is None else self.mean_abs / scale,
            kinds=self.kinds,
            sample_weight=self.sample_weight,
            by_time=None if self.by_time is None else self.by_time / scale,
            drift=None if self.drift is None else self.drift / (scale[:, None] * scale[None, :]),
        )


@dataclass(frozen=True)
class StatsRequest:
    """Statistics that a run needs. Ranges cost as much as a small product, so they are computed only on request.

    At least one of the two is needed: the energy of every channel comes from the Hessian's diagonal or with the ranges.
    expert_share: of all tokens, on which each routed expert is measured beside those that are sent to it.
    """

    hessian: bool
    ranges: bool
    expert_share: float = 0.0

    def __post_init__(self) -> None:
        assert self.hessian or self.ranges


@dataclass(frozen=True)
class PieceStats:
    """Inputs of one group in one piece of rows.

    x:      float32 [n, in], what products are of: quantized where the layer quantizes its inputs, times roots of weights
    sums:   absmax, sum of |x| and sum of x^2, each [in], before that; None without ranges
    sample: [m, in], some of the rows of x; kinds: uint8 [m] of them
    away:   [n, in], the inputs in the original model minus those before quantization; None where these are not needed. Of
            bf16 the products of the drift are in bf16
    """

    x: Tensor
    sums: tuple[Tensor, Tensor, Tensor] | None
    sample: Tensor
    kinds: Tensor | None
    away: Tensor | None = None


def strides(kinds: Tensor) -> list[int]:
    """For each kind, how many tokens one sampled token represents. Few answer tokens are sampled as often as many
    image ones.
    """
    highest = int(kinds.max())
    share = SAMPLE_TOKENS // (highest + 1 if highest > 1 else 1)  # with text alone, all are samples of it
    return [max(1, int(n) // share) for n in kinds.flatten().bincount()]


def piece_of(
    x: Tensor,
    stride: int,
    ranges: bool,
    kinds: Tensor | None = None,
    strides_by_kind: Sequence[int] = (),
    entering: Tensor | None = None,
) -> PieceStats:
    """Inputs and sums of one piece. x: [n, in]; kinds: uint8 [n]; strides_by_kind: ``strides`` of all rows; entering: [n, in],
    what products are of (None: of x)."""
    entering = x if entering is None else entering
    if kinds is None:
        sample, sample_kinds = entering[::stride].clone(), None
    else:
        chosen = torch.cat([(kinds == k).nonzero()[::n, 0] for k, n in enumerate(strides_by_kind)]).sort().values
        sample, sample_kinds = entering[chosen], kinds[chosen]
    if not ranges:
        return PieceStats(entering.to(torch.float32), None, sample, sample_kinds)
    magnitude = x.to(torch.float32).abs()
    sums = magnitude.amax(0), magnitude.sum(0), magnitude.square_().sum(0)
    return PieceStats(entering.to(torch.float32), sums, sample, sample_kinds)


class Accumulator:
    """Accumulates Stats of one group from pieces, always in the order of the rows."""

    def __init__(self, width: int, request: StatsRequest, dtype: torch.dtype, device: torch.device = CPU) -> None:
        self.tokens, self.device = 0, device
        self.width = width
        # absmax of either half of the timesteps (without them all is in the first), sum of |x| and of x^2
        self.sums = [self._zeros(2, width), self._zeros(width), self._zeros(width)] if request.ranges else None
        # One block for all samples: small pieces kept between large ones that come and go would tear the heap apart.
        self.sample = torch.empty(2 * SAMPLE_TOKENS, width, dtype=dtype, device=device)
        self.kinds = torch.zeros(2 * SAMPLE_TOKENS, dtype=torch.uint8, device=device)
        self.sampled = 0
        self.pending: list[Tensor] = []
        self.hessian = self._zeros(width, width) if request.hessian else None
        self.away: list[Tensor] = []  # of the pending inputs
        self.drift: Tensor | None = None

    def _zeros(self, *shape: int) -> Tensor:
        return torch.zeros(*shape, device=self.device)

    def add(self, p: PieceStats, part: int = 0) -> None:
        """Add a piece, but not its share of the Hessian, which ``jobs`` adds. part: ``Rows.part_of`` of its row."""
        self.tokens += len(p.x)
        room = min(len(p.sample), len(self.sample) - self.sampled)
        self.sample[self.sampled : self.sampled + room] = p.sample[:room]
        if p.kinds is not None:
            self.kinds[self.sampled : self.sampled + room] = p.kinds[:room]
        self.sampled += room
        if self.sums is not None and p.sums is not None:
            torch.maximum(self.sums[0][part], p.sums[0], out=self.sums[0][part])
            self.sums[1] += p.sums[1]
            self.sums[2] += p.sums[2]
        if self.hessian is not None:
            self.pending.append(p.x)
            if p.away is not None:
                self.away.append(p.away)

    def jobs(self) -> list[Callable[[], object]]:
        """Jobs that add the pieces so far to the Hessian. They are independent, one for each tile.

        Inputs in bf16 are exact in float32, so only the order of additions rounds, and that is fixed. The lower triangle
        alone is summed: half the work.
        """
        xs, self.pending = self.pending, []
        away, self.away = self.away, []
        if self.hessian is None or not xs:
            return []
        tasks: list[Callable[[], object]] = [partial(_add_tile, self.hessian, xs, xs, i, j) for i, j in self._tiles()]
        if away:
            if self.drift is None:
                self.drift = self._zeros(self.width, self.width)
            spans = _spans(0, self.width)
            tasks += [partial(_add_tile, self.drift, away, xs, i, j) for i in spans for j in spans]
        return tasks

    def _tiles(self) -> list[tuple[slice, slice]]:
        """Tiles of the lower triangle, the large ones first; those on the diagonal whole."""
        tiles = list(_lower_tiles(0, self.width))
        return sorted(tiles, key=lambda t: (t[1].start - t[1].stop, t[0].start, t[1].start))

    def finish(self, strides_by_kind: Sequence[int] = ()) -> Stats:
        """The statistics. strides_by_kind: ``strides``, where tokens are of several kinds."""
        stats = self._finish()
        if self.drift is not None:
            stats = replace(stats, drift=self.drift.div_(max(1, self.tokens)))
        if not strides_by_kind:
            return stats
        kinds = self.kinds[: self.sampled]
        counts = torch.tensor(strides_by_kind, dtype=torch.float32, device=self.device)
        return replace(stats, kinds=kinds, sample_weight=counts[kinds.long()])

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
            return Stats(
                tokens=self.tokens, mean_square=self.hessian.diagonal().clone(), sample=sample, hessian=self.hessian
            )
        halves, magnitudes, squares = self.sums
        by_time = halves if bool(halves.any(1).all()) else None
        return Stats(
            tokens=self.tokens,
            mean_square=squares / n,
            sample=sample,
            hessian=self.hessian,
            absmax=halves.amax(0),
            mean_abs=magnitudes / n,
            by_time=by_time,
        )


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


def _add_tile(total: Tensor, lefts: list[Tensor], rights: list[Tensor], i: slice, j: slice) -> None:
    for x, y in zip(lefts, rights, strict=True):
        if x.dtype == total.dtype:
            total[i, j].addmm_(x[:, i].T, y[:, j])
        else:  # sums of the pieces stay in float32
            total[i, j].add_(x[:, i].T @ y[:, j].to(x.dtype))


def run_pending(sums: Iterable[Accumulator], pool: Workers, everything: bool) -> None:
    """Bring Hessians up to date, once enough inputs wait for it (or ``everything``)."""
    sums = list(sums)
    if everything or sum(x.nbytes for s in sums for x in (*s.pending, *s.away)) >= PENDING_BYTES:
        pool.map(lambda job: job(), [job for s in sums for job in s.jobs()])
