"""Scales and minima of GGUF's block types, chosen by squared error.

Every type is, for a group of columns, scale * code + minimum; what differs is how these two numbers are stored. First each
group gets the real numbers that suit it best: of some fractions of its range, each refined by least squares under the codes
that it gives (for types without a minimum also with the sign turned round, since their codes reach further below zero than
above). float16 scales are that, rounded. K types store small integers for the groups of a super-block under one float16 number:
it is chosen from a few fractions of the one that makes the largest scale fit, then the integers of every group are moved by one
step where that errs less. Errors are always those of the numbers as the decoder computes them. The plan of the search is our
own.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

import torch
from torch import Tensor

from qkit.tensor.formats import SUPER_BLOCK, Format
from qkit.tensor.grid import code_range, round_to_grid, round_to_grid_
from qkit.tensor.params import Params, effective_minimum, effective_scale, tiles

_ELEMENTS = 1 << 16  # of a weight, held by one step of the search
_F16 = torch.finfo(torch.float16)
_SMALLEST = 2.0**-24  # the smallest float16 that is not zero
_MOVES = 2  # how often the integers of groups are moved by a step
_SUPER_FACTORS = (1.0, 0.85, 0.9, 0.95, 1.05)


def find(w: Tensor, fmt: Format, importance: Tensor | None, search: bool) -> Params:
    """Params of a weight, float32 [out, in]. importance: float32 [in], weight of each column's squared error."""
    weights = torch.ones(1, w.shape[1], device=w.device) if importance is None else importance[None].to(torch.float32)
    per_column = tiles(weights, fmt)
    step = max(1, _ELEMENTS // w.shape[1])
    return Params.cat([_Search(tiles(rows, fmt), per_column, fmt, search).params() for rows in w.split(step)], dim=0)


def find_group(w: Tensor, fmt: Format, importance: Tensor, block: Params) -> Params:
    """Params of one group of columns, float32 [out, group], of a K type, under the super-scales of its super-block."""
    search = _Search(w[:, None], importance[None, None].to(torch.float32), fmt, search=True)
    assert block.super_scale is not None
    if fmt.symmetric:
        scale, below, below_unit = search.best(), None, None
    else:
        scale, minimum = search.best_pair()
        below = -minimum[..., None]
        below_unit = None if block.super_minimum is None else block.super_minimum.to(torch.float32)
    p = search.rounded(scale[..., None], block.super_scale, below, below_unit)
    for _ in range(_MOVES):
        p = search.moved(p)
    return p


def largest_integers(fmt: Format) -> tuple[int, int]:
    """The range of the integers that stand for the scales of a K type's groups."""
    return {"q2_k": (0, 15), "q4_k": (0, 63), "q5_k": (0, 63), "q6_k": (-128, 127)}.get(fmt.name, (-32, 31))


def nearest_integers(x: Tensor, fmt: Format) -> Tensor:
    """The integers, int8, nearest to wanted scales of a K type's groups; never zero, since codes can be."""
    rounded = x.round().clamp_(*largest_integers(fmt))
    one = torch.where(x < 0, -1.0, 1.0) if fmt.symmetric else torch.ones(())
    return torch.where(rounded == 0, one, rounded).to(torch.int8)


class _Search:
    """The search for some rows. tiles: [R, C, n]; weights: [1, C, n]"""

    def __init__(self, values: Tensor, weights: Tensor, fmt: Format, search: bool) -> None:
        self.values, self.weights, self.fmt, self.search = values, weights, fmt, search
        self.stored_in_f16 = fmt.scale == "f16"

    def params(self) -> Params:
        if self.fmt.symmetric:
            scale, minimum = self.best(), None
        else:
            scale, minimum = self.best_pair()
        if self.stored_in_f16:
            return Params(to_f16(scale), minimum=None if minimum is None else minimum.to(torch.float16))
        return self._super_blocks(scale, minimum)

    # ---- groups ------------------------------------------------------------------------------------------------

    def _scales(self) -> Iterator[Tensor]:
        """Scales to try, [R, C]; the first makes the largest weight the lowest code."""
        low, high = code_range(self.fmt)
        largest = self.values.gather(-1, self.values.abs().argmax(-1, keepdim=True))[..., 0]
        full = torch.where(largest == 0, 1.0, largest / low)
        yield full
        if self.search:
            for factor in _factors(self.fmt)[1:]:
                yield full * factor
            for factor in _factors(self.fmt):
                yield full * (low / high) * factor

    def best(self) -> Tensor:
        """The scale of every group that errs least, [R, C]."""
        best: Tensor | None = None
        least = torch.empty(())
        for start in self._scales():
            for found in (start, self._refined(start)) if self.search else (start,):
                scale = self._as_stored(found)
                error = self._error(scale, None)
                best = scale if best is None else torch.where(error < least, scale, best)
                least = torch.minimum(error, least) if least.shape else error
        assert best is not None
        return best

    def _refined(self, scale: Tensor) -> Tensor:
        """The least-squares scale under the codes that a scale gives."""
        codes = round_to_grid_(self.values / scale[..., None], self.fmt)
        weighted = codes * self.weights
        refined = (weighted * self.values).sum(-1) / weighted.mul_(codes).sum(-1)
        return torch.where(refined.isfinite() & (refined != 0), refined, scale)

    def _ranges(self) -> Iterator[tuple[Tensor, Tensor]]:
        """(scale, minimum) to try, [R, C] each; the first spans all weights."""
        low, high = self.values.amin(-1), self.values.amax(-1)
        if not self.stored_in_f16:
            low = low.clamp_max(0)  # a minimum of K types is never positive
        levels = code_range(self.fmt)[1]
        width = torch.where(high > low, high - low, 1.0)
        for factor in _factors(self.fmt) if self.search else (1.0,):
            for shift in (0.0, 0.5, 1.0) if factor < 1 else (0.0,):
                yield width * factor / levels, low + width * ((1 - factor) * shift)

    def best_pair(self) -> tuple[Tensor, Tensor]:
        """The scale and the minimum of every group that err least, [R, C] each."""
        best: tuple[Tensor, Tensor] | None = None
        least = torch.empty(())
        for start in self._ranges():
            for scale, minimum in (start, self._refined_pair(*start)) if self.search else (start,):
                scale, minimum = self._as_stored(scale), self._minimum_as_stored(minimum)
                error = self._error(scale, minimum)
                if best is None:
                    best, least = (scale, minimum), error
                    continue
                better = error < least
                best = torch.where(better, scale, best[0]), torch.where(better, minimum, best[1])
                least = torch.minimum(error, least)
        assert best is not None
        return best

    def _refined_pair(self, scale: Tensor, minimum: Tensor) -> tuple[Tensor, Tensor]:
        """The least-squares scale and minimum under the codes that a pair gives."""
        codes = round_to_grid_((self.values - minimum[..., None]) / scale[..., None], self.fmt)
        w, wq = self.weights.sum(-1), self.weights * codes
        q, x = wq.sum(-1), (self.weights * self.values).sum(-1)
        qx, qq = (wq * self.values).sum(-1), wq.mul_(codes).sum(-1)
        determinant = w * qq - q * q
        slope, offset = (w * qx - x * q) / determinant, (qq * x - q * qx) / determinant
        if not self.stored_in_f16:
            slope = torch.where(offset > 0, qx / qq, slope)
            offset = offset.clamp_max(0)
        sound = (slope > 0) & slope.isfinite() & offset.isfinite()
        return torch.where(sound, slope, scale), torch.where(sound, offset, minimum)

    def _as_stored(self, scale: Tensor) -> Tensor:
        return to_f16(scale).to(torch.float32) if self.stored_in_f16 else scale

    def _minimum_as_stored(self, minimum: Tensor) -> Tensor:
        return minimum.clamp(-_F16.max, _F16.max).to(torch.float16).to(torch.float32) if self.stored_in_f16 else minimum

    def _error(self, scale: Tensor, minimum: Tensor | None) -> Tensor:
        """Weighted squared error of every group, [R, C]."""
        shifted = self.values if minimum is None else self.values - minimum[..., None]
        step = scale[..., None]
        values = round_to_grid(shifted / step, self.fmt).mul_(step).sub_(shifted)
        return values.square_().mul_(self.weights).sum(-1)

    # ---- super-blocks ------------------------------------------------------------------------------------------

    def _super_blocks(self, scale: Tensor, minimum: Tensor | None) -> Params:
        groups = SUPER_BLOCK // (self.fmt.group or 1)
        rows, blocks = len(scale), scale.shape[1] // groups
        per_block = scale.reshape(rows, blocks, groups)
        lowest, highest = largest_integers(self.fmt)
        extreme = per_block.gather(-1, per_block.abs().argmax(-1, keepdim=True))[..., 0]
        unit = extreme / (lowest or highest)
        below = None if minimum is None else -minimum.reshape(rows, blocks, groups)
        unit_below = None if below is None else below.amax(-1) / highest
        best: Params | None = None
        least = torch.empty(())
        for factor, factor_below in self._super_factors():
            p = self.rounded(
                per_block, to_f16(unit * factor), below, None if unit_below is None else (unit_below * factor_below)
            )
            error = self._total(p, blocks)
            if best is None:
                best, least = p, error
                continue
            best = _chosen(error < least, p, best, groups)
            least = torch.minimum(error, least)
        assert best is not None
        for _ in range(_MOVES if self.search else 0):
            best = self.moved(best)
        return best

    def _super_factors(self) -> list[tuple[float, float]]:
        if not self.search:
            return [(1.0, 1.0)]
        if self.fmt.symmetric:
            return [(f, 1.0) for f in _SUPER_FACTORS]
        return [(1.0, 1.0), *((f, g) for f, g in product(_SUPER_FACTORS, (1.0, 0.93)) if (f, g) != (1.0, 1.0))]

    def rounded(self, scale: Tensor, unit: Tensor, below: Tensor | None, unit_below: Tensor | None) -> Params:
        """Params with the integers nearest to what the groups want, under given super-scales."""
        integers = nearest_integers(scale / unit[..., None].to(torch.float32), self.fmt).flatten(1)
        if below is None or unit_below is None:
            return Params(integers, super_scale=unit)
        stored = unit_below.clamp_max(_F16.max).to(torch.float16)
        ratio = (below / stored[..., None].to(torch.float32)).nan_to_num_(0.0, 0.0, 0.0)
        minima = ratio.round_().clamp_(0, largest_integers(self.fmt)[1]).to(torch.int8).flatten(1)
        return Params(integers, minimum=minima, super_scale=unit, super_minimum=stored)

    def _error_of(self, p: Params) -> Tensor:
        return self._error(effective_scale(p, self.fmt), effective_minimum(p))

    def _total(self, p: Params, blocks: int) -> Tensor:
        """Errors of the super-blocks, [R, blocks]."""
        return self._error_of(p).reshape(len(self.values), blocks, -1).sum(-1)

    def moved(self, p: Params) -> Params:
        """The params with the integers of each group where they are, or one step beside."""
        highest = largest_integers(self.fmt)[1]
        best, least = p, self._error_of(p)
        below = (0, -1, 1) if p.minimum is not None else (0,)
        for step, step_below in product((0, -1, 1), below):
            if not step and not step_below:
                continue
            scale = nearest_integers(p.scale.to(torch.float32) + step, self.fmt)
            minimum = None
            if p.minimum is not None:
                minimum = (p.minimum.to(torch.int16) + step_below).clamp_(0, highest).to(torch.int8)
            moved = Params(scale, minimum=minimum, super_scale=p.super_scale, super_minimum=p.super_minimum)
            error = self._error_of(moved)
            better = error < least
            best = Params(
                torch.where(better, scale, best.scale),
                minimum=None if minimum is None or best.minimum is None else torch.where(better, minimum, best.minimum),
                super_scale=p.super_scale,
                super_minimum=p.super_minimum,
            )
            least = torch.minimum(error, least)
        return best


def _chosen(first: Tensor, a: Params, b: Params, groups: int) -> Params:
    """The params of super-blocks from a where ``first`` says so, else from b."""
    of_groups = first.repeat_interleave(groups, dim=-1)

    def pick(which: Tensor, x: Tensor | None, y: Tensor | None) -> Tensor | None:
        return None if x is None or y is None else torch.where(which, x, y)

    return Params(
        torch.where(of_groups, a.scale, b.scale),
        minimum=pick(of_groups, a.minimum, b.minimum),
        super_scale=pick(first, a.super_scale, b.super_scale),
        super_minimum=pick(first, a.super_minimum, b.super_minimum),
    )


def _factors(fmt: Format) -> tuple[float, ...]:
    """The fractions of the full range that are tried, the full range first."""
    if fmt.bits >= 8:
        return (1.0,)
    if fmt.bits >= 5:
        return (1.0, 0.86, 0.9, 0.94, 0.97, 1.03)
    if fmt.bits == 4:
        return (1.0, 0.7, 0.75, 0.8, 0.84, 0.88, 0.92, 0.96, 1.04)
    return (1.0, 0.5, 0.58, 0.66, 0.74, 0.82, 0.9, 0.95, 1.08)


def to_f16(scale: Tensor) -> Tensor:
    """Scales in float16; one that is too small for it becomes the smallest, 0 becomes 1."""
    stored = scale.clamp(-_F16.max, _F16.max).to(torch.float16)
    smallest = torch.where(scale < 0, -_SMALLEST, _SMALLEST).to(torch.float16)
    stored = torch.where(stored == 0, smallest, stored)
    return torch.where(scale == 0, torch.ones((), dtype=torch.float16), stored)
