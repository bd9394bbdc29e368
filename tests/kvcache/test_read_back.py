"""What an FP8 cache holds of keys and values, to the nearest number and to the next toward zero."""

import torch

from qkit.kvcache.read_back import held

NUMBERS = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
GRID = NUMBERS[NUMBERS.isfinite()].unique()


def test_numbers_of_the_grid_stay():
    for cut in (False, True):
        assert torch.equal(held(GRID * 0.25, 0.25, cut), GRID * 0.25)


def test_nearest_and_toward_zero():
    x = torch.randn(4096, generator=torch.Generator().manual_seed(0)) * 100
    nearest = GRID[(x[:, None] - GRID).abs().argmin(1)]
    assert torch.equal(held(x, 1.0), nearest)
    sizes = GRID[GRID >= 0]
    toward = sizes[torch.searchsorted(sizes, x.abs(), right=True) - 1] * x.sign()
    assert torch.equal(held(x, 1.0, cut=True), toward)


def test_what_is_too_large_becomes_the_largest():
    x = torch.tensor([1e4, -1e4], dtype=torch.bfloat16)
    for cut in (False, True):
        assert held(x, 2.0, cut).tolist() == [896.0, -896.0]
