"""What could mislead the trace of the residual stream: each of these would change a model that is rotated or scaled."""

import re

import pytest
import torch
from test_stream import watched
from torch.nn.functional import linear, scaled_dot_product_attention

# The step of a block between its embeddings and its last norm, which is folded into the head.
HONEST = {
    "a factor of a token": lambda m, x: x + m.down(m.up(m.norm(x))) * x.new_ones(1, 4, 1),
    "tokens that are chosen": lambda m, x: (
        x[:, torch.zeros(4, dtype=torch.long, device="meta")] + m.down(m.up(m.norm(x)))
    ),
    "a sum in place": lambda m, x: x.add_(m.down(m.up(m.norm(x)))),
    "arguments by name": lambda m, x: torch.add(
        x, linear(input=m.up(m.norm(x)), weight=m.down.weight, bias=m.down.bias)
    ),
}


@pytest.mark.parametrize("step", HONEST.values(), ids=HONEST)
def test_what_a_rotation_leaves_as_it_is_is_followed(step):
    found = watched(step)
    assert found.against == "" and "down.weight" in found.writes and found.reads["up.weight"] == "norm"


def _part_in_place(m, x):
    x[..., :4].mul_(0.5)
    return x + m.down(m.up(m.norm(x)))


def _part_of_the_sum(m, x):
    y = m.down(m.up(m.norm(x)))
    y.narrow(-1, 0, 4).mul_(2)
    return x + y


def _into_another(m, x):
    torch._foreach_mul_([x], 0.5)
    return x + m.down(m.up(m.norm(x)))


def _read_twice(m, x):
    h = m.up(m.norm(x))
    return x + m.down(h) + 0 * m.down(linear(torch.ones_like(h), m.up.weight.new_ones(12, 12)))


def _norm_of_another(m, x):
    y = x + m.down(m.up(m.norm(x)))
    return y * m.norm(torch.ones_like(x)).new_ones(1) if m.norm(torch.ones_like(x)) is not None else y


def _read_first_elsewhere(m, x):
    y = x + m.down(m.up(m.norm(x)))
    m.up(torch.ones_like(x))
    return y


def _weight_elsewhere(m, x):
    factor = (m.down.weight * 2).new_ones(1)
    return x + m.down(m.up(m.norm(x))) * factor


@torch.jit.script
def _compiled(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return x @ weight


def _scripted(m, x):
    factor = _compiled(x, m.up.weight.new_ones(8, 1)).sigmoid()
    return x + m.down(m.up(m.norm(x))) * factor


def _scripted_weight(m, x):
    factor = _compiled(x.new_ones(1, 8), m.down.weight).new_ones(1)
    return x + m.down(m.up(m.norm(x))) * factor


def _by_vmap(m, x):
    factor = torch.vmap(lambda row: row @ m.up.weight.new_ones(8, 1))(x).sigmoid()
    return x + m.down(m.up(m.norm(x))) * factor


class _Gate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return (x**2).sum(-1, keepdim=True)


FAULTS = {
    "compiled code": (_scripted, "compiled code reads the residual stream"),
    "a weight in compiled code": (_scripted_weight, "down.weight is read elsewhere, too"),
    "vmap": (_by_vmap, "compiled code reads the residual stream"),
    "a function of autograd": (
        lambda m, x: x + m.down(m.up(m.norm(x))) * _Gate.apply(x),
        "operator pow reads the residual stream",
    ),
    "a part in place": (_part_in_place, "writes into a part of a tensor reads the residual stream"),
    "a part of what is added": (_part_of_the_sum, "added to .* that no linear layer writes"),
    "a list in place": (_into_another, "operator foreach_mul reads the residual stream"),
    "a matrix that reads a part": (
        lambda m, x: x + m.down(m.up(m.norm(x))) + m.part(x[..., :4]),
        "part.weight reads the residual stream",
    ),
    "a norm of heads": (
        lambda m, x: torch.rms_norm(x.view(1, 4, 2, 4), (4,)).view(1, 4, 8) + m.down(m.up(m.norm(x))),
        "operator rms_norm reads the residual stream",
    ),
    "factors of channels, turned": (
        lambda m, x: (x.transpose(1, 2) * x.new_ones(1, 8, 1)).transpose(1, 2) + m.down(m.up(m.norm(x))),
        "operator mul reads the residual stream",
    ),
    "factors of heads that are added": (
        lambda m, x: x + (m.down(m.up(m.norm(x))).view(1, 4, 2, 4) * x.new_ones(1, 4, 2, 1)).view(1, 4, 8),
        "added to .* that no linear layer writes",
    ),
    "a matrix that reads something else, too": (_read_first_elsewhere, "up.weight multiplies more than once"),
    "a norm that divides something else, too": (_norm_of_another, "norm.weight is read elsewhere, too"),
    "a weight that is read by itself": (_weight_elsewhere, "down.weight is read elsewhere, too"),
}


@pytest.mark.parametrize(("step", "why"), FAULTS.values(), ids=FAULTS)
def test_what_a_rotation_would_change_is_refused(step, why):
    found = watched(step)
    assert re.search(why, found.against), found.against


def _attend_to_itself(m, x):
    h = m.up(m.norm(x)).view(1, 4, 3, 4).transpose(1, 2)
    return x + m.down(scaled_dot_product_attention(h, h, h).transpose(1, 2).reshape(1, 4, 12))


def _keys_are_values(m, x):
    h = m.up(m.norm(x)).view(1, 4, 3, 4).transpose(1, 2)
    return x + m.down(scaled_dot_product_attention(torch.ones_like(h), h, h).transpose(1, 2).reshape(1, 4, 12))


def _view_in_place(m, x):
    h = m.up(m.norm(x))
    h.view(1, 4, 3, 4).add_(1)
    return x + m.down(h)


UNSCALED = {
    "queries and keys are values": _attend_to_itself,
    "keys are values": _keys_are_values,
    "a view in place": _view_in_place,
    "a factor that divides": lambda m, x: x + m.down(torch.ones_like(h := m.up(m.norm(x))) / h),
    "a quotient of two": lambda m, x: x + m.down(m.up(m.norm(x)) / linear(x.new_ones(1, 4, 8), m.up.weight)),
    "a weight by itself": lambda m, x: x + m.down(m.up(m.norm(x)) * (m.up.weight * 2).new_ones(1)),
    "a matrix that multiplies something else, too": lambda m, x: (
        x + m.down(m.up(m.norm(x))) + 0 * m.down(x.new_ones(1, 4, 12))
    ),
}


@pytest.mark.parametrize("step", UNSCALED.values(), ids=UNSCALED)
def test_what_a_scale_does_not_pass_through(step):
    assert not watched(step).feeds
