"""The comparison of products: checked first, then timed in turn, with weights from memory (cold) and from the cache (warm).

Every contender has as many copies of its weight as it takes to fill the last-level cache three times, and goes on to the
next copy with each call; where copies of a small weight would be too many, everything else is read in between. The call
right after, on the same copy, is the warm one. Contenders take turns, so that what else the machine does meets all of them,
in another order each time and with a pause before each: threads of the one before may still be spinning, and take its core.

Before that, outputs are compared with float64 on two inputs, after memory of their size was filled with NaN and given back.
An error above twice that of a plain bf16 product (or above 2 %, of a contender that rounds activations to 8 bits on its
own) is no result; nor is a time that the machine could not reach.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from qkit.benchmark.contenders import BF16, FLOAT32, OWN, Contender, Product, contenders, operator_of
from qkit.benchmark.host import TIMES_CACHE, Host
from qkit.system.machine import available_memory

ROUNDING_BOUND = 0.02  # error of a contender that rounds activations to 8 bits
_MOST_COPIES = 48
_LEAST, _MOST, _MOST_FLUSHED = 3, 60, 20  # calls of a contender
_QUIET = 0.02  # seconds until the threads of another library have gone to sleep


@dataclass(frozen=True)
class Timing:
    """The seconds of a call, at three quantiles."""

    p20: float
    p50: float
    p80: float

    @staticmethod
    def of(seconds: Sequence[float]) -> Timing:
        """The quantiles of at least one time."""
        ordered = sorted(seconds)
        return Timing(*(ordered[round(q * (len(ordered) - 1))] for q in (0.2, 0.5, 0.8)))


@dataclass(frozen=True, kw_only=True)
class ProductTiming:
    """The result of one contender at one number of rows.

    error:  relative to float64 (norm over norm); repeats: whether a second run gave the same bits
    floor:  seconds that reading the weight and the activations and writing the product take at least
    refused: why there are no times
    """

    contender: str
    rows: int
    operator: str | None
    error: float
    repeats: bool
    floor: float
    cold: Timing | None
    warm: Timing | None
    refused: str | None

    @property
    def share(self) -> float | None:
        """The share of the floor in the cold time."""
        return None if self.cold is None else self.floor / self.cold.p50


@dataclass(frozen=True)
class Entrant:
    """A contender with its copies; flush: whether they are too few to leave the cache by themselves."""

    contender: Contender
    copies: list[Any]
    flush: bool


def make_entrants(p: Product, device: str, host: Host, names: Sequence[str] = ()) -> list[Entrant]:
    """The copies of every contender, in half of the memory that there is. names: names, all if empty."""
    entering = [c for c in contenders(p, device) if not names or c.name in names]
    room = (available_memory() or 4 << 30) // 2 // len(entering)
    entrants = []
    for c in entering:
        wanted_copies = math.ceil(TIMES_CACHE * host.cache / c.size)
        count = max(1, min(wanted_copies, _MOST_COPIES, room // (2 * c.size)))
        entrants.append(Entrant(c, [c.prepare() for _ in range(count)], count < wanted_copies))
    return entrants


def compare(p: Product, entrants: Sequence[Entrant], rows: int, host: Host, seconds: float) -> list[ProductTiming]:
    """The results of all entrants at ``rows`` rows. seconds: that each may use for cold calls, and again for warm ones."""
    with torch.inference_mode():
        checks = [_check(p, e, rows) for e in entrants]
        dense_error = _plain_error(p, rows)
        bounds = [max(2 * dense_error + 1e-6, ROUNDING_BOUND if e.contender.rounds else 0.0) for e in entrants]
        faults = [
            None if error <= bound else f"wrong result: error {error:.2g} against float64, expected at most {bound:.2g}"
            for (error, _), bound in zip(checks, bounds, strict=True)
        ]
        sound_entrants = [e for e, reason in zip(entrants, faults, strict=True) if reason is None]
        x = _activations(p, rows, seed=0)
        times = dict(zip(map(id, sound_entrants), _take_turns(sound_entrants, x, host, seconds), strict=True))

    def timings(host: Host) -> list[ProductTiming]:
        return [
            _result(p, e, rows, host, error, repeats, times.get(id(e)), reason)
            for e, (error, repeats), reason in zip(entrants, checks, faults, strict=True)
        ]

    results = timings(host)
    if any(r.refused is not None and r.contender in {e.contender.name for e in sound_entrants} for r in results):
        return timings(host.remeasure())  # before a time is refused, the memory gets a second chance
    return results


def _result(
    p: Product,
    e: Entrant,
    rows: int,
    host: Host,
    error: float,
    repeats: bool,
    times: tuple[list[float], list[float]] | None,
    reason: str | None,
) -> ProductTiming:
    (out, columns), c = p.shape, e.contender
    bytes_moved = c.size + rows * (out + columns) * c.dtype.itemsize
    cold = warm = None
    if times is not None:
        cold, warm = Timing.of(times[0]), Timing.of(times[1])
        operations = 2 * rows * out * columns
        reason = host.refusal(cold.p50, bytes_moved, operations) or host.refusal(warm.p50, 0, operations)
        if reason is not None:
            cold = warm = None
    return ProductTiming(
        contender=c.name,
        rows=rows,
        operator=operator_of(e.copies[0]),
        error=error,
        repeats=repeats,
        floor=host.floor(bytes_moved),
        cold=cold,
        warm=warm,
        refused=reason,
    )


def _activations(p: Product, rows: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, p.shape[1], generator=generator).to(p.dtype)


def _check(p: Product, e: Entrant, rows: int) -> tuple[float, bool]:
    """(largest error on two inputs, whether runs repeat to the bit)."""
    worst, repeats = 0.0, True
    for seed in (1, 2):
        x = _activations(p, rows, seed)
        expected = _reference(p, x)
        inputs = (x if e.contender.name == OWN else p.rounded(x)).to(e.contender.dtype)
        runs = []
        for _ in range(2):
            poison(rows * p.shape[0] * e.contender.dtype.itemsize)
            runs.append(e.contender.run(e.copies[0], inputs))
        error = float((runs[0].double() - expected).norm() / expected.norm())
        worst = max(worst, error if math.isfinite(error) else math.inf)
        repeats = repeats and torch.equal(runs[0], runs[1])
    return worst, repeats


def _plain_error(p: Product, rows: int) -> float:
    """Of a dense bf16 product, on the first of the inputs."""
    x = _activations(p, rows, seed=1)
    y = functional.linear(p.rounded(x).to(torch.bfloat16), p.exact.to(torch.bfloat16))
    expected = _reference(p, x)
    return float((y.double() - expected).norm() / expected.norm())


def _reference(p: Product, x: Tensor) -> Tensor:
    """float64: activations as the scheme rounds them, times what the weight stands for."""
    wide = p.rounded(x.to(torch.float32)).double()
    return torch.cat([wide @ part.double().T for part in p.exact.split(1024)], dim=1)


def poison(size: int) -> None:
    """Fills memory of that size with NaN and gives it back: who hands out an output without writing it hands out NaN."""
    blocks = [torch.full((max(1, size // 4),), torch.nan) for _ in range(4)]
    blocks.clear()


def _take_turns(
    entrants: Sequence[Entrant], x: Tensor, host: Host, seconds: float
) -> list[tuple[list[float], list[float]]]:
    """(cold, warm) times of each."""
    inputs = [x.to(e.contender.dtype) for e in entrants]
    calls = []
    for e, activations in zip(entrants, inputs, strict=True):
        one_call = time_call(lambda e=e, activations=activations: e.contender.run(e.copies[-1], activations))  # type: ignore[misc]
        calls.append(max(_LEAST, min(_MOST_FLUSHED if e.flush else _MOST, int(seconds / one_call))))
    turn_times: list[tuple[list[float], list[float]]] = [([], []) for _ in entrants]
    order = torch.Generator().manual_seed(0)
    for turn in range(max(calls, default=0)):
        for i in torch.randperm(len(entrants), generator=order).tolist():
            if turn >= calls[i]:
                continue
            e, activations, (cold, warm) = entrants[i], inputs[i], turn_times[i]
            copy, run = e.copies[turn % len(e.copies)], e.contender.run
            if e.flush:
                host.flush()
            _wait(_QUIET)
            cold.append(time_call(lambda run=run, copy=copy, activations=activations: run(copy, activations)))  # type: ignore[misc]
            warm.append(time_call(lambda run=run, copy=copy, activations=activations: run(copy, activations)))  # type: ignore[misc]
    return turn_times


def _wait(seconds: float) -> None:
    """Awake: a core that slept would begin with cold code, which no decoding does."""
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        pass


def time_call(run: Callable[[], object]) -> float:
    """Seconds of one call."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def product_record(p: Product, results: Sequence[ProductTiming]) -> dict[str, Any]:
    """The results for one product as a JSON-able dictionary: times in seconds, speed-ups of the cold times, and what they
    would be if only bytes counted."""
    by_name = {(r.contender, r.rows): r for r in results}
    rows = []
    for r in results:
        entry = {**asdict(r), "share": r.share, "speedup": {}}
        for name in (BF16, FLOAT32):
            dense = by_name.get((name, r.rows))
            if r.cold is not None and dense is not None and dense.cold is not None:
                entry["speedup"][name] = {"cold": dense.cold.p50 / r.cold.p50, "ideal": dense.floor / r.floor}
        rows.append(entry)
    weights = None if p.q is None else p.q.format
    return {
        "format": p.candidate.name,
        "group": None if weights is None else weights.group,
        "out": p.shape[0],
        "in": p.shape[1],
        "dtype": str(p.dtype).removeprefix("torch."),
        "bytes": p.size,
        "results": rows,
    }
