"""Runs a block on the calibration rows and gathers what solvers and transforms need to know of its inputs.

Rows live in a file of the job folder, one hidden state [tokens, hidden] a row, and are read and written in
pieces: resident memory does not grow with their number (the page cache keeps them at hand), and the file is
what a resumed run goes on from.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qkit.blocks import BlockOutline, LinearGroup
from qkit.errors import BadCalibration, NumericFailure
from qkit.parallel import Workers

CHUNK_TOKENS = 4096  # tokens whose inputs are held at once while the Hessian grows
PIECE_TOKENS = 1024  # tokens that one worker runs through the block at a time
SAMPLE_TOKENS = 1024  # tokens kept per group for scale searches and error figures
_TILE = 384  # columns of one Hessian tile, about
MAX_BAD_ROWS = 0.1  # share of rows with non-finite activations above which a run is given up


@dataclass
class Rows:
    """Hidden states that enter a block: a file of ``count`` rows [tokens, hidden] in ``dtype``.

    good: rows without a non-finite value so far; the others are left out and counted
    """

    path: Path
    count: int
    tokens: int
    hidden: int
    dtype: torch.dtype
    good: list[bool] = field(default_factory=list)

    @property
    def row_bytes(self) -> int:
        return self.tokens * self.hidden * self.dtype.itemsize

    def read(self, start: int, stop: int) -> Tensor:
        """[stop - start, tokens, hidden]"""
        buffer = bytearray((stop - start) * self.row_bytes)
        with self.path.open("rb") as f:
            f.seek(start * self.row_bytes)
            if f.readinto(buffer) != len(buffer):
                raise BadCalibration(f"{self.path}: shorter than {self.count} rows: delete the job folder, start again")
        return torch.frombuffer(buffer, dtype=self.dtype).view(stop - start, self.tokens, self.hidden)

    def chunks(self) -> list[tuple[int, int]]:
        """(start, stop) pieces of about CHUNK_TOKENS tokens; their size does not depend on the machine."""
        step = max(1, CHUNK_TOKENS // self.tokens)
        return [(i, min(i + step, self.count)) for i in range(0, self.count, step)]


@dataclass(frozen=True)
class Stats:
    """What was seen at the input of a group of linears, over ``tokens`` tokens.

    hessian:  float32 [in, in], sum over tokens of x x^T, divided by the number of tokens (None: not asked for)
    absmax, mean_abs, mean_square: float32 [in]
    sample:   [n, in] inputs spread evenly over the rows, n at most about SAMPLE_TOKENS
    """

    tokens: int
    absmax: Tensor
    mean_abs: Tensor
    mean_square: Tensor
    sample: Tensor
    hessian: Tensor | None = None

    def divided_by(self, scale: Tensor) -> Stats:
        """The statistics of inputs divided per channel by ``scale`` [in]."""
        h = None if self.hessian is None else self.hessian / (scale[:, None] * scale[None, :])
        return replace(
            self,
            hessian=h,
            absmax=self.absmax / scale,
            mean_abs=self.mean_abs / scale,
            mean_square=self.mean_square / scale.square(),
            sample=(self.sample.float() / scale).to(self.sample.dtype),
        )


@dataclass(frozen=True)
class _Piece:
    """What one worker saw at the input of one group: x float32 [n, in], and sums over its tokens."""

    x: Tensor
    absmax: Tensor
    total: Tensor
    squares: Tensor
    sample: Tensor


def _piece(x: Tensor, stride: int) -> _Piece:
    wide = x.to(torch.float32)
    magnitude = wide.abs()
    return _Piece(wide, magnitude.amax(0), magnitude.sum(0), torch.einsum("ni,ni->i", wide, wide), x[::stride].clone())


class _Accumulator:
    """Gathers Stats of one group from pieces, always in the order of the rows."""

    def __init__(self, width: int, want_hessian: bool) -> None:
        self.tokens = 0
        self.absmax = torch.zeros(width)
        self.total = torch.zeros(width)
        self.squares = torch.zeros(width)
        self.samples: list[Tensor] = []
        self.hessian = torch.zeros(width, width) if want_hessian else None

    def add(self, pieces: list[_Piece]) -> list[Callable[[], None]]:
        """Add pieces; the work that is left is returned as independent jobs, one per tile of the Hessian.

        Inputs in bf16 are exact in float32, so only the order of additions rounds, and that is fixed. The lower triangle
        alone is summed: half the work.
        """
        for p in pieces:
            self.tokens += len(p.x)
            torch.maximum(self.absmax, p.absmax, out=self.absmax)
            self.total += p.total
            self.squares += p.squares
            self.samples.append(p.sample)
        if self.hessian is None:
            return []
        h, n = self.hessian, len(self.absmax)
        tiles = max(1, round(n / _TILE))
        edges = [n * i // tiles for i in range(tiles + 1)]
        spans = [slice(a, b) for a, b in pairwise(edges)]

        def job(i: slice, j: slice) -> Callable[[], None]:
            def run() -> None:
                for p in pieces:
                    h[i, j].addmm_(p.x[:, i].T, p.x[:, j])

            return run

        return [job(i, j) for i in spans for j in spans if j.start <= i.start]

    def finish(self) -> Stats:
        n = max(1, self.tokens)
        if self.hessian is not None:
            self.hessian = torch.tril(self.hessian).div_(n)
            self.hessian += torch.tril(self.hessian, -1).T
        sample = torch.cat(self.samples) if self.samples else torch.zeros(0, len(self.absmax))
        return Stats(self.tokens, self.absmax, self.total / n, self.squares / n, sample, self.hessian)


@dataclass(frozen=True)
class Call:
    """How the model calls a block: the arguments after the hidden states, recorded once for one row."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def __call__(self, block: nn.Module, hidden: Tensor) -> Tensor:
        out = block(hidden, *self.args, **self.kwargs)
        return out[0] if isinstance(out, tuple) else out


class _AllSeen(Exception):
    """Raised by a hook to end a run of the block whose remaining work nobody needs."""


class _Inputs:
    """The one kind of hook: keeps the input of each hooked module, per thread, while a block runs.

    The run ends as soon as every hooked module was called: the last product of the block is not needed.
    """

    def __init__(self, block: nn.Module, names: set[str]) -> None:
        self._local = threading.local()
        self._expected = len(names)
        self._handles = [block.get_submodule(n).register_forward_pre_hook(self._hook(n)) for n in sorted(names)]

    def _hook(self, name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def keep(_: nn.Module, args: tuple[Any, ...]) -> None:
            self._local.seen[name] = args
            if len(self._local.seen) == self._expected:
                raise _AllSeen

        return keep

    def run(self, call: Call, block: nn.Module, hidden: Tensor) -> dict[str, tuple[Any, ...]]:
        """{module name: its positional arguments} of one run of the block."""
        self._local.seen = {}
        with suppress(_AllSeen):
            call(block, hidden)
        return dict(self._local.seen)

    def close(self) -> None:
        for handle in self._handles:
            handle.remove()


def capture(
    block: nn.Module,
    outline: BlockOutline,
    rows: Rows,
    call: Call,
    pool: Workers,
    want_hessian: bool,
    progress: Callable[[int], None],
) -> dict[str, Stats]:
    """{group key: Stats} of every group of the block, over all good rows.

    Raises NumericFailure when too many rows have non-finite values, BadCalibration when a group saw no token.
    """
    inputs = _Inputs(block, {g.hook for g in outline.groups if g.hook})
    width = {g.key: g.linears[0].shape[1] for g in outline.groups}
    sums = {k: _Accumulator(w, want_hessian) for k, w in width.items()}
    stride = max(1, rows.count * rows.tokens // SAMPLE_TOKENS)

    def one(x: Tensor) -> dict[str, _Piece]:
        found = _group_inputs(inputs.run(call, block, x), block, outline)
        return {key: _piece(t, stride) for key, t in found.items() if len(t)}

    try:
        for start, stop in rows.chunks():
            hidden = rows.read(start, stop)
            keep = torch.tensor(rows.good[start:stop])
            seen = pool.map(one, _pieces(hidden[keep], rows))
            jobs = [j for g in outline.groups for j in sums[g.key].add([s[g.key] for s in seen if g.key in s])]
            pool.map(lambda job: job(), jobs)
            progress(stop - start)
    finally:
        inputs.close()
    return {g.key: _finish(g, sums[g.key]) for g in outline.groups}


def _finish(group: LinearGroup, total: _Accumulator) -> Stats:
    if total.tokens == 0 and group.expert is None:
        raise BadCalibration(f"no calibration row reached {group.key}: its block runs without calling this linear")
    return total.finish()


def _pieces(hidden: Tensor, rows: Rows) -> list[Tensor]:
    step = max(1, PIECE_TOKENS // rows.tokens)
    return list(hidden.split(step)) if len(hidden) else []


def _group_inputs(seen: dict[str, tuple[Any, ...]], block: nn.Module, outline: BlockOutline) -> dict[str, Tensor]:
    """{group key: inputs [tokens, in]} from the arguments of the hooked modules."""
    result: dict[str, Tensor] = {}
    for group in outline.groups:
        if group.hook and group.hook in seen:
            args = seen[group.hook]
            x = args[0].flatten(0, -2)
            if group.expert is None:
                result[group.key] = x
            else:
                routed = (args[1] == group.expert).any(-1).flatten()
                result[group.key] = x[routed]
        elif group.expert is not None:  # the expert's down projection: its input is computed here
            pair = next(g for g in outline.groups if g.expert == group.expert and g.hook)
            if pair.key in result:
                experts = block.get_submodule(pair.hook)
                x, (gate, up) = result[pair.key], (linear.view(block) for linear in pair.linears)
                act: Any = experts.act_fn
                result[group.key] = act(nn.functional.linear(x, gate)) * nn.functional.linear(x, up)
    return result


def advance(
    block: nn.Module, rows: Rows, call: Call, out: Path, pool: Workers, progress: Callable[[int], None]
) -> Rows:
    """Run the (quantized) block on all rows and write its outputs to the file ``out``, durably.

    Rows that turned non-finite are marked; raises NumericFailure above MAX_BAD_ROWS of them.
    """
    good = list(rows.good)
    with out.open("wb") as f:
        for start, stop in rows.chunks():
            hidden = rows.read(start, stop)
            result = torch.cat(pool.map(lambda x: call(block, x).to(rows.dtype), _pieces(hidden, rows)))
            finite = result.isfinite().flatten(1).all(1)
            for i in range(start, stop):
                good[i] = good[i] and bool(finite[i - start])
            f.write(memoryview(result.contiguous().view(torch.uint8).numpy().reshape(-1)))
            progress(stop - start)
    bad = good.count(False)
    if bad > MAX_BAD_ROWS * rows.count:
        raise NumericFailure(
            f"{bad} of {rows.count} calibration rows have non-finite activations after this block, more than "
            f"{MAX_BAD_ROWS:.0%}: use other calibration text, or a checkpoint in bf16 if this one is fp16"
        )
    return replace(rows, path=out, good=good)


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


def enter(model: nn.Module, blocks: str, tokens: Tensor) -> Iterator[tuple[Tensor, dict[int, Call]]]:
    """Hidden states that reach the first block, a row [1, tokens, hidden] at a time, and how each block is called.

    model: everything but the blocks is materialized; tokens: int64 [rows, length]
    """
    layers = model.get_submodule(blocks)
    originals = list(layers.children())
    calls: dict[int, Call] = {}
    first: list[Tensor] = []
    base: Any = getattr(model, "base_model", model)
    try:
        for i, block in enumerate(originals):
            layers[i] = _Recorder(block, calls, first, i)  # type: ignore[index,operator]
        for row in tokens:
            first.clear()
            with torch.inference_mode():
                base(input_ids=row[None], use_cache=False)
            yield first[0], calls
    finally:
        for i, block in enumerate(originals):
            layers[i] = block  # type: ignore[index,operator]
