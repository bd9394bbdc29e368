"""Progress of a run: one bar for the complete run on a terminal, occasional lines elsewhere."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping, Sequence
from datetime import timedelta

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn
from rich.text import Text

_PATIENCE = 2.0  # seconds before the first sign, and between lines
_QUIET = 30.0  # seconds after which a line comes though nothing changed by a percent
_TAIL = 0.05  # share of a run that comes after its blocks: export and proof
_BLOCK = re.compile(
    r"(?P<sequence>.*?)block (?P<at>\d+)/\d+(, (?P<phase>.*))?"
)  # how ``run`` names the phases of a block


class Bar:
    """Shows the finished share of a run, from 0 to 1, with the elapsed time and the estimated time left."""

    def __init__(self, console: Console) -> None:
        self._console, self._live = console, console.is_terminal
        columns = (
            TextColumn("{task.fields[percent]}"),
            BarColumn(20),
            TextColumn("{task.fields[times]}"),
            TextColumn("{task.description}"),
        )
        self._progress = Progress(*columns, console=console, transient=True, disable=not self._live)
        self._task = self._progress.add_task("", total=1.0, visible=False, times="", percent="")
        self._began = self._last = time.monotonic()
        self._first: float | None = None
        self._percent = "-"

    def show(self, share: float | None, what: str) -> None:
        """Show the current phase and the finished share, if it is known. The first share is that of an earlier, stopped run."""
        now = time.monotonic()
        if self._first is None:
            self._first = share
        elapsed = now - self._began
        if elapsed < _PATIENCE:
            return
        moved = 0.0 if share is None or self._first is None else share - self._first
        left = f", {_clock(elapsed * (1 - share) / moved)} left" if share is not None and moved > 0.005 else ""
        times = f"{_clock(elapsed)}{left}"
        if self._live:
            self._progress.start()
            known = {"total": None} if share is None else {"total": 1.0, "completed": share}
            percent = "" if share is None else f"{100 * share:3.0f} %"
            text = escape(what)
            self._progress.update(self._task, description=text, times=times, percent=percent, visible=True, **known)
            return
        percent = "" if share is None else f"{100 * share:.0f} %, "
        if now - self._last > (_PATIENCE if percent != self._percent else _QUIET):
            self._last, self._percent = now, percent
            self._console.print(Text(f"{percent}{times}: {what}"))

    def stop(self) -> None:
        """Removes the bar."""
        self._progress.stop()


def _clock(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))


class Share:
    """Computes the finished share of a run from its phases.

    stages: (name, weight of each of its blocks) of every sequence of blocks, in order; none: a run of phases that nobody
    counted, whose share is not known. finished: blocks that were done before. ahead: weights of phases before all blocks, which
    a run that goes on may have again. behind: weights of phases after all blocks.
    """

    def __init__(
        self,
        stages: Sequence[tuple[str, Sequence[float]]] = (),
        finished: int = 0,
        ahead: Mapping[str, float] = {},
        behind: Mapping[str, float] = {},
    ) -> None:
        weights = {(name, 0): w for name, w in ahead.items()}
        weights |= {(name, i + 1): w for name, blocks in stages for i, w in enumerate(blocks)}
        weights |= {(name, 0): w for name, w in behind.items()}
        total, before = sum(weights.values()) or 1.0, 0.0
        self._spans = dict[tuple[str, int], tuple[float, float]]()  # by block, the share before it, and its own
        for key, weight in weights.items():
            self._spans[key] = (before, (1 - _TAIL) * weight / total)
            before += self._spans[key][1]
        done = len(ahead) + finished if finished else 0  # the share does not fall back
        self._value = sum(own for _, own in [*self._spans.values()][:done])
        self._after = not behind and finished >= len(self._spans) - len(ahead)  # whether all that is counted is done
        self._at: tuple[str, int] | None = None
        self._phase, self._steps, self._done = "", 0, 0
        self._ended = 0  # phases of this block, or of what comes after the blocks
        self._took, self._now = (
            dict[str, float](),
            dict[str, float](),
        )  # seconds by phase, of the block before and of this one
        self._began = time.monotonic()

    def start(self, what: str, total: int) -> float | None:
        """A phase begins; returns the finished share of the run."""
        now = time.monotonic()
        self._now[self._phase] = now - self._began
        match = _BLOCK.fullmatch(what)
        key = (match["sequence"].strip(), int(match["at"])) if match else (what, 0)
        at = key if match or key in self._spans else None  # None: a phase that nobody counted
        if at == self._at:
            self._ended += 1
        else:
            self._after = self._after or (at is None and bool(self._spans) and self._at == [*self._spans][-1])
            self._at, self._took, self._now, self._ended = at, self._now, {}, 0
        self._phase, self._began = (match["phase"] or "") if match else "" if at else what, now
        self._steps, self._done = total, 0
        return self.step(0)

    def step(self, amount: int) -> float | None:
        """A part of the phase is done; returns the finished share of the run."""
        self._done += amount
        if not self._spans:
            return None
        inner = min(1.0, self._done / self._steps) if self._steps else 1.0
        if self._at in self._spans:
            before, own = self._spans[self._at]
            self._value = max(self._value, before + own * self._in_block(inner))
        elif self._at is None and self._after:
            self._value = max(self._value, 1 - _TAIL * 0.5 ** (self._ended + inner))
        return self._value

    def _in_block(self, inner: float) -> float:
        """The finished share of a block, by the phase durations of the block before. The first block has no estimate."""
        if not self._phase:
            return inner
        if self._phase not in self._took:
            return float(1 - 0.5 ** (self._ended + inner))
        past = sum(seconds for name, seconds in self._took.items() if name in self._now)
        return (past + inner * self._took[self._phase]) / (sum(self._took.values()) or 1.0)
