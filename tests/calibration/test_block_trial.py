"""How blocks pass hidden states on, seen in a run: what may be run block after block, and what is refused."""

from contextlib import nullcontext

import pytest
import torch
from torch import nn

from qkit.calibration.block_calls import Call, ForEveryRow, enter_one
from qkit.calibration.block_trial import prove, run_trial
from qkit.calibration.call_values import for_any_batch
from qkit.errors import Unsupported

WIDTH = 8


class Block(nn.Module):
    """Returns hidden states beside something else."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, hidden, scale=None, state=None, shared=None):
        out = self.linear(hidden) if scale is None else self.linear(hidden) * scale
        if shared is not None:
            shared["seen"] = out
        return out, hidden.sum(), None


class Model(nn.Module):
    """glue: how the model calls block after block, given (block, hidden states, what the block before returned beside)."""

    def __init__(self, glue) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block() for _ in range(3)])
        self.glue = glue

    def forward(self, x):
        beside, shared = None, {}
        for block in self.blocks:
            x, beside, _ = self.glue(block, x, beside, shared)
        return x


def positional(block, hidden, beside, shared):
    return block(hidden, torch.ones(WIDTH))


def by_name(block, hidden, beside, shared):
    return block(scale=None, hidden=hidden)


def changed(block, hidden, beside, shared):
    return block(hidden + 1)


def depends_on_the_row(block, hidden, beside, shared):
    return block(hidden, state=None if beside is None else beside * 2)


def shares(block, hidden, beside, shared):
    return block(hidden, shared=shared)


def proved(glue, rows):
    """The trial of the first row, after each row was proved with it."""
    torch.manual_seed(0)
    model, paths = Model(glue), [f"blocks.{i}" for i in range(3)]
    trials = [run_trial(model, paths, {"x": row[None]}, lambda i: nullcontext()) for row in rows]
    for row, trial in zip(rows, trials, strict=True):
        hidden, calls = enter_one(model, paths, {"x": row[None]}, trials[0].passing)
        prove(trial, calls, paths)
        x = hidden
        for i, path in enumerate(paths):  # run one after another, the blocks give what the model gives
            with torch.inference_mode():
                x = calls[i](model.get_submodule(path), x)
        with torch.inference_mode():
            torch.testing.assert_close(x, model(row[None]))
    return trials[0]


@pytest.mark.parametrize(("glue", "place"), [(positional, 0), (by_name, "hidden")])
def test_blocks_that_pass_on_hidden_states(glue, place):
    trial = proved(glue, torch.randn(2, 5, WIDTH))
    assert {p.place for p in trial.passing.values()} == {place} and {p.result for p in trial.passing.values()} == {0}
    assert trial.returns_more  # so a second row has to prove it


@pytest.mark.parametrize(
    ("glue", "words"),
    [
        (changed, "states other than those that leave"),
        (shares, "blocks.1 is called with shared\\['seen'\\], which earlier"),
    ],
)
def test_what_one_row_shows_cannot_be_run(glue, words):
    with pytest.raises(Unsupported, match=words):
        proved(glue, torch.randn(1, 5, WIDTH))


def test_what_only_a_second_row_shows_cannot_be_run():
    rows = torch.randn(2, 5, WIDTH)
    proved(depends_on_the_row, rows[:1])
    with pytest.raises(Unsupported, match="called with state, which earlier blocks make or change"):
        proved(depends_on_the_row, rows)


def test_calls_for_any_batch():
    mask, angles = torch.ones(1, 1, 4, 4), torch.randn(1, 4, 2)
    one = {0: Call((mask,), {"angles": angles, "length": 4})}
    two = {0: Call((torch.cat([mask, mask]),), {"angles": angles, "length": 4})}
    joined = for_any_batch(one, two)
    assert joined is not None and isinstance(joined[0].args[0], ForEveryRow) and joined[0].kwargs["angles"] is angles
    for other in ({"angles": angles, "length": 8}, {"angles": angles + 1, "length": 4}):
        assert for_any_batch(one, {0: Call((torch.cat([mask, mask]),), other)}) is None
    row = torch.cat([mask, 2 * mask])
    assert for_any_batch(one, {0: Call((row,), one[0].kwargs)}) is None
