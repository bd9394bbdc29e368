"""Finds the step and guidance branch of a sampler's call of the transformer from the call alone."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_MARKS = 256  # values of the latents that are compared between calls


class Clock:
    """Counts steps and branches.

    Guidance calls the transformer several times with the same time and latents. Another time, or the same one with other
    latents (samplers of higher order, schedules that low precision rounds), is another step. A higher time begins a new run;
    runs of one step cannot be separated, and need ``reset``.
    """

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Set the state before the first call of a run."""
        self.step, self.branch = -1, 0
        self.time: float | None = None
        self._mark: Tensor | None = None

    def rises(self, timestep: Any) -> bool:
        """Whether a call at this time begins a new run."""
        return self.time is not None and time_of(timestep) > self.time

    def tick(self, timestep: Any, latents: Tensor) -> None:
        """Count a call of the transformer."""
        if self.rises(timestep):
            self.reset()
        time, flat = time_of(timestep), latents.detach().flatten()
        mark = flat[:: max(1, len(flat) // _MARKS)].clone()
        same = self._mark is not None and mark.shape == self._mark.shape and torch.equal(mark, self._mark)
        if time == self.time and same:
            self.branch += 1
        else:
            self.step, self.branch, self.time, self._mark = self.step + 1, 0, time, mark


def time_of(timestep: Any) -> float:
    """The time of a call: the latest of its batch, or of its tokens, since given parts (a first frame) have time 0."""
    return float(torch.as_tensor(timestep).max())
