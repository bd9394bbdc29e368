"""Scales and minima of GGUF's types, set to their least squares under given codes, on the grids on which they are stored.

With H the Hessian, e the errors of a row and V the columns that one stored number is multiplied with (its codes, or ones
for a minimum), a change d of that number makes e^T H e larger by d^2 V^T H V - 2 d V^T H e: a parabola, whose lowest point is
rounded to what can be stored. For a group with a minimum it is a form in two numbers; a K type tries the integers of the scale
around the lowest point, each with the best integer of the minimum. Groups come one after another, and each sees the errors that
the ones before it leave. Then the super-scales of their super-block follow, in the same way. A change that makes nothing
smaller is left out.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from qkit.tensor.block_params import largest_integers, nearest_integers, to_f16
from qkit.tensor.formats import SUPER_BLOCK, Format
from qkit.tensor.params import Params


class Refit:
    """The refit of some rows, whose tensors are [columns, rows], with columns in the natural order.

    grid: values of the codes; errors: of the dequantized weights, updated; diagonal, pull: as ``gptq.Factor`` has them
    """

    def __init__(self, p: Params, fmt: Format, grid: Tensor, errors: Tensor, diagonal: Tensor, pull: Tensor) -> None:
        self.fmt, self.grid, self.errors, self.diagonal, self.pull = fmt, grid, errors, diagonal, pull
        self.params = replace(p, **{n: t.clone() for n in _STORED if (t := getattr(p, n)) is not None})

    def run(self) -> Params:
        """The refitted params."""
        group = self.fmt.group or len(self.grid)
        for start in range(0, len(self.grid), group):
            self._group(slice(start, start + group), start // group)
            end = start + group
            if self.params.super_scale is not None and end % SUPER_BLOCK == 0:
                self._super(slice(end - SUPER_BLOCK, end), end // SUPER_BLOCK - 1)
        return self.params

    def _energy(self, some: slice, v: Tensor) -> Tensor:
        """H V for columns V of some of the inputs, zero elsewhere; its rows of these inputs."""
        return self.diagonal[some, None] * (self.pull[some, some].T @ v + v)

    def _slope(self, some: slice) -> Tensor:
        """H e, its rows of some inputs."""
        return self.diagonal[some, None] * (self.pull[:, some].T @ self.errors + self.errors[some])

    def _group(self, some: slice, place: int) -> None:
        v, slope = self.grid[some], self._slope(some)
        bent = self._energy(some, v)
        a, aa = (v * slope).sum(0), (v * bent).sum(0)
        unit, unit_below = self._units(place)
        scale = self.params.scale[:, place].to(torch.float32) * unit
        if self.params.minimum is None:
            stored = self._stored_scale(scale + a / aa, unit)
            change = stored.to(torch.float32) * unit - scale
            change = torch.where(change * (change * aa - 2 * a) < 0, change, 0.0)
            self.params.scale[:, place] = torch.where(change != 0, stored, self.params.scale[:, place])
            self.errors[some] -= v * change
            return
        ones = torch.ones(v.shape[0], 1, device=v.device)
        b, bb, ab = slope.sum(0), self._energy(some, ones).sum(), bent.sum(0)
        minimum = self.params.minimum[:, place].to(torch.float32) * unit_below
        wanted = (a * bb - b * ab) / (aa * bb - ab * ab)
        least, best = torch.zeros_like(a), (self.params.scale[:, place], self.params.minimum[:, place])
        moved = torch.zeros_like(a), torch.zeros_like(a)
        for stored in self._scales_around(scale, wanted, unit):
            d = stored.to(torch.float32) * unit - scale
            below = self._stored_minimum(minimum + (b - d * ab) / bb, unit_below)
            m = below.to(torch.float32) * unit_below - minimum
            gain = d * (d * aa - 2 * a) + m * (m * bb - 2 * b) + 2 * d * m * ab
            better = gain < least
            least = torch.where(better, gain, least)
            best = torch.where(better, stored, best[0]), torch.where(better, below, best[1])
            moved = torch.where(better, d, moved[0]), torch.where(better, m, moved[1])
        self.params.scale[:, place], self.params.minimum[:, place] = best
        self.errors[some] -= v * moved[0] + moved[1]

    def _units(self, place: int) -> tuple[Tensor, Tensor]:
        """What the stored scale and minimum of a group are multiplied with, [rows]."""
        p = self.params
        if p.super_scale is None:
            return torch.ones(()), torch.ones(())
        block = place * (self.fmt.group or 1) // SUPER_BLOCK
        unit = p.super_scale[:, block].to(torch.float32)
        return unit, unit if p.super_minimum is None else -p.super_minimum[:, block].to(torch.float32)

    def _scales_around(self, scale: Tensor, change: Tensor, unit: Tensor) -> list[Tensor]:
        """Stored scales to try around the one that is wanted."""
        if self.params.super_scale is None:
            return [self._stored_scale(scale + change, unit), self._stored_scale(scale, unit)]
        around = [self._stored_scale(scale + change + step * unit, unit) for step in (0, -1, 1)]
        return [*around, self._stored_scale(scale, unit)]

    def _stored_scale(self, scale: Tensor, unit: Tensor) -> Tensor:
        """The nearest scale that can be stored; 1 where there is none."""
        if self.params.super_scale is None:
            return to_f16(scale.nan_to_num(1.0))
        return nearest_integers((scale / unit).nan_to_num(1.0), self.fmt)

    def _stored_minimum(self, minimum: Tensor, unit: Tensor) -> Tensor:
        if self.params.super_scale is None:
            return minimum.nan_to_num(0.0).clamp(-_LARGEST, _LARGEST).to(torch.float16)
        highest = largest_integers(self.fmt)[1]
        return (minimum / unit).nan_to_num(0.0, 0.0, 0.0).round_().clamp_(0, highest).to(torch.int8)

    def _super(self, some: slice, block: int) -> None:
        """Move the super-scale and the super-minimum of a block."""
        p, groups = self.params, SUPER_BLOCK // (self.fmt.group or 1)
        assert p.super_scale is not None
        of_groups = slice(block * groups, (block + 1) * groups)
        integers = p.scale[:, of_groups].to(torch.float32).repeat_interleave(self.fmt.group or 1, dim=1).T
        self._move(some, self.grid[some] * integers, p.super_scale[:, block])
        if p.minimum is not None and p.super_minimum is not None:
            integers = p.minimum[:, of_groups].to(torch.float32).repeat_interleave(self.fmt.group or 1, dim=1).T
            self._move(some, -integers, p.super_minimum[:, block])

    def _move(self, some: slice, v: Tensor, stored: Tensor) -> None:
        """Set one float16 number of every row, that columns V are multiplied with, to its least squares."""
        a, aa = (v * self._slope(some)).sum(0), (v * self._energy(some, v)).sum(0)
        old = stored.to(torch.float32)
        new = to_f16((old + a / aa).nan_to_num(0.0, 0.0, 0.0))
        change = new.to(torch.float32) - old
        better = (change * (change * aa - 2 * a) < 0) & (new * stored > 0)
        stored.copy_(torch.where(better, new, stored))
        self.errors[some] -= v * torch.where(better, change, 0.0)


_STORED = ("scale", "minimum", "super_scale", "super_minimum")
_LARGEST = torch.finfo(torch.float16).max
