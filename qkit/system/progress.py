"""Listeners to the progress of long work."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

Advance = Callable[[int, int], None]  # of one measurement: (done, in all)
NamedAdvance = Callable[[str, int, int], None]  # of several: (which, done, in all)


class Progress(Protocol):
    """A listener to the phases of a run; raising from ``step`` stops the run at a safe place."""

    def start(self, what: str, total: int) -> None:
        """A phase of ``total`` steps begins."""

    def step(self, amount: int = 1) -> None:
        """``amount`` more steps of the phase are done."""


class Silent:
    """A listener that ignores everything."""

    def start(self, what: str, total: int) -> None:
        """Do nothing."""

    def step(self, amount: int = 1) -> None:
        """Do nothing."""
