"""The inputs of a routed expert: its own tokens, and a share of all."""

from itertools import pairwise

import pytest
import torch
from torch import nn

from qkit.calibration.group_inputs import group_inputs_of
from qkit.families.blocks import Group, Linear, LinearGroup

TOKENS, WIDTH = 40, 4
HIDDEN = torch.arange(TOKENS, dtype=torch.float32)[:, None].expand(TOKENS, WIDTH)
INDEX = torch.arange(TOKENS)[:, None] % 2 * 3  # experts 0 and 3 in turn


def tokens_of(share, valid=None):
    """{expert: places of the tokens that it gets}."""
    groups = tuple(
        LinearGroup(
            (Linear(name=f"{e}.gate", param="gate", shape=(8, WIDTH), expert=e),), Group(("gate",)), "experts", e
        )
        for e in range(4)
    )
    found = group_inputs_of({"experts": (HIDDEN, INDEX)}, nn.Module(), (), groups, valid, share)
    return {e: set(found[f"{e}.gate"][:, 0].int().tolist()) for e in range(4)}


@pytest.mark.parametrize("share", [0.25, 0.1])
def test_a_share_of_the_tokens_is_spread_and_other_experts_get_others(share):
    alone, found = tokens_of(0.0), tokens_of(share)
    assert [len(alone[e]) for e in range(4)] == [20, 0, 0, 20]
    assert all(alone[e] <= found[e] for e in range(4))
    for e in (1, 2):  # no token is sent to these
        places = sorted(found[e])
        assert len(places) == TOKENS * share
        assert {b - a for a, b in pairwise(places)} == {round(1 / share)}
    assert not found[1] & found[2]


def test_a_share_of_all_and_tokens_that_do_not_count():
    valid = torch.arange(TOKENS) >= 10
    assert all(len(x) == TOKENS for x in tokens_of(1.0).values())
    assert all(x == set(range(10, TOKENS)) for x in tokens_of(1.0, valid).values())
    assert tokens_of(0.25, valid)[1] == {t for t in tokens_of(0.25)[1] if t >= 10}
