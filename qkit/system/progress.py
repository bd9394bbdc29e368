"""What long work reports to."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """A listener to the phases of a run; raising from ``step`` stops the run at a safe place."""

    def start(self, what: str, total: int) -> None:
        """A phase of so many steps begins."""

    def step(self, amount: int = 1) -> None:
        """So many steps of the phase are done."""


class Silent:
    """A listener that says nothing."""

    def start(self, what: str, total: int) -> None:
        """Nothing."""

    def step(self, amount: int = 1) -> None:
        """Nothing."""
