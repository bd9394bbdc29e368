"""A step of learned scales against autograd and torch's Adam."""

from __future__ import annotations

import pytest
import torch
from test_reconstruct import ALL, INPUTS, SHAPE, solved, weight

from qkit.families.blocks import Linear
from qkit.rounding.learned_scale import LearnedScale, has_learned_scales
from qkit.tensor.formats import Format
from qkit.tensor.input_transform import InputTransform
from qkit.tensor.qtensor import codes_to_grid, dequantize, effective_minimum, effective_scale, tiles, untile


def learned(fmt: Format, inputs: InputTransform) -> LearnedScale:
    return LearnedScale(Linear(name="a", param="a.weight", shape=SHAPE), solved(fmt, inputs.weight(weight())), inputs)


def of_factors(x: LearnedScale, factor: torch.Tensor) -> torch.Tensor:
    """``LearnedScale.dense`` without rounding of scales."""
    p, fmt = x.q.params, x.q.format
    grid = tiles(codes_to_grid(x.q.codes, fmt), fmt)
    grid = grid if p.zero is None else grid - p.zero.float()[..., None]
    minimum = effective_minimum(p)
    below = 0.0 if minimum is None else minimum[..., None]
    scale = effective_scale(p, fmt)
    factor = factor.repeat_interleave(scale.shape[1] // factor.shape[1], 1)  # of super-blocks
    return x.inputs.weight_back(untile(grid * (scale * factor)[..., None] + below, fmt, SHAPE))


@pytest.mark.parametrize("fmt", ALL, ids=lambda f: f.name)
@pytest.mark.parametrize("inputs", INPUTS, ids=["plain", "turned"])
def test_steps_are_those_of_adam(fmt: Format, inputs: InputTransform) -> None:
    x = learned(fmt, inputs)
    state = x.begin()
    assert torch.equal(dequantize(x.result(state[0])), dequantize(x.q))
    expected = torch.ones_like(state[0]).requires_grad_()
    adam = torch.optim.Adam([expected], lr=0.01, betas=(0.9, 0.95), eps=1e-12)
    generator = torch.Generator().manual_seed(3)
    for number in (1, 2, 3):
        pieces = torch.randn(2, *SHAPE, generator=generator)
        state = x.step(state, list(pieces), number, 0.01)
        adam.zero_grad()
        of_factors(x, expected).backward(pieces.sum(0))
        adam.step()
    if not has_learned_scales(fmt):
        assert torch.equal(state, x.begin())
        return
    torch.testing.assert_close(state[0], expected.detach(), rtol=1e-4, atol=1e-5)
    assert torch.equal(x.result(state[0]).codes, x.q.codes)


@pytest.mark.parametrize("fmt", [f for f in ALL if has_learned_scales(f)], ids=lambda f: f.name)
def test_what_runs_is_what_the_file_has(fmt: Format) -> None:
    """Scales are rounded to their dtype on disk, and stay near what was learned."""
    x = learned(fmt, INPUTS[0])
    factor = 1 + 0.4 * (torch.rand(x.begin()[0].shape, generator=torch.Generator().manual_seed(1)) - 0.5)
    q = x.result(factor)
    assert {n: t.dtype for n, t in vars(q.params).items() if t is not None} == {
        n: t.dtype for n, t in vars(x.q.params).items() if t is not None
    }
    assert torch.equal(x.dense(factor), dequantize(q))
    wanted, packed = of_factors(x, factor), dequantize(q)
    assert float((packed - wanted).norm() / wanted.norm()) < 0.005
