"""Tokens drawn from probabilities."""

from __future__ import annotations

import torch
from torch import Tensor


def by_sums(chances: Tensor, generator: torch.Generator, rows: tuple[int, int] | None = None) -> Tensor:
    """A sampled token for each row of probabilities [batch, vocabulary], int64 [batch], by their cumulative sums.

    rows: (first of them, number) of rows that the random numbers are drawn for, of which the batch is a part; None: the batch
    One random number a row instead of one a token: of 128 rows of 4096 0.4 ms instead of 8.8 ms, one thread of a CPU.
    """
    sums = chances.cumsum(-1)
    first, count = rows or (0, len(chances))
    drawn = torch.rand(count, 1, generator=generator, device=generator.device)[first : first + len(chances)]
    thresholds = drawn.to(chances.device) * sums[:, -1:]
    largest = sums[:, -1:].nextafter(
        torch.zeros_like(thresholds)
    )  # the product may have been rounded up to the whole sum
    return torch.searchsorted(sums, thresholds.minimum(largest), right=True)[:, 0]
