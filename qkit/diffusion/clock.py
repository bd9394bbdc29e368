"""Which step of a sampler, and which guidance branch of it, a call of the transformer is: told from the call alone."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_MARKS = 256  # values of the latents that two calls are compared by


class Clock:
    """Counts steps and branches. Guidance calls the transformer several times with one time and the same latents; another time,
    or the same one with other latents (samplers of higher order, schedules that low precision rounds), is another step. A
    time that rises begins another run; a run of one step cannot be told from the next, and needs ``reset``."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Before the first call of a run."""
        self.step, self.branch = -1, 0
        self.time: float | None = None
        self._mark: Tensor | None = None

    def rises(self, timestep: Any) -> bool:
        """Whether a call at this time is the first of another run."""
        return self.time is not None and time_of(timestep) > self.time

    def tick(self, timestep: Any, latents: Tensor) -> None:
        """The transformer is called."""
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
    """The time of a call: the latest of its batch, or of its tokens, where what is given (a first frame) has time 0."""
    return float(torch.as_tensor(timestep).max())
