"""Which matrices read one tensor, and which norm feeds them, seen in a run on the meta device."""

import pytest
import torch
from torch import nn

from qkit.families.sharing import run_without_values

WIDTH = 8


class Block(nn.Module):
    def __init__(self, rest) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.a, self.b, self.c = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.rest = rest

    def forward(self, x):
        normed = self.norm(x)
        y = self.a(normed) + self.b(normed)
        return x + self.rest(self, normed, y)


class Model(nn.Module):
    def __init__(self, rest) -> None:
        super().__init__()
        self.embedding = nn.Embedding(16, WIDTH)
        self.blocks = nn.ModuleList([Block(rest) for _ in range(2)])

    def forward(self, input_ids):
        x = self.embedding(input_ids)
        for block in self.blocks:
            x = block(x)
        return x


def fails(*_):
    raise RuntimeError("needs values")


@pytest.mark.parametrize(
    ("rest", "source"),
    [
        (lambda block, normed, y: block.c(y), "norm"),
        (lambda block, normed, y: block.c(y) + normed, None),
        (lambda block, normed, y: block.c(torch.cat([normed, y], -1)[..., :WIDTH]), None),  # inside a list
        (lambda block, normed, y: block.c(block.a(y)), None),  # a weight with two inputs
        (lambda block, normed, y: block.c(block.norm(y)), None),  # a norm with two
        (fails, None),  # what else reads it was not seen
    ],
    ids=["alone", "added", "in a list", "linear twice", "norm twice", "not to the end"],
)
def test_the_norm_that_feeds_a_group(rest, source):
    with torch.device("meta"):
        model = Model(rest)
    reads = run_without_values(model, ["blocks.0", "blocks.1"])
    groups = reads.groups("blocks.0", ["a", "b", "c"])
    with_a = next(g for g in groups if "a" in g.linears)
    with_b = next(g for g in groups if "b" in g.linears)
    assert with_b.source == source
    assert (with_a is with_b) == (reads.calls["blocks.0.a"] == 1)
