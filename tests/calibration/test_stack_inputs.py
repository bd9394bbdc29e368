"""What stacked matrices read, seen where a module multiplies by them."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from qkit.calibration.stack_inputs import watch_stacks
from qkit.families.blocks import Group, Linear, LinearGroup

ENDS = torch.tensor([2, 2, 7], dtype=torch.int32)  # no row for the second matrix


class Experts(nn.Module):
    def __init__(self, grouped: bool) -> None:
        super().__init__()
        self.weight, self.grouped = nn.Parameter(torch.randn(3, 32, 64, dtype=torch.bfloat16)), grouped

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.grouped:
            return F.grouped_mm(x, self.weight, offs=ENDS)
        return torch.cat([torch.matmul(x[i:j], self.weight[e]) for e, (i, j) in enumerate(((0, 2), (2, 2), (2, 7)))])


@pytest.mark.parametrize("grouped", [False, True], ids=["one by one", "grouped"])
def test_each_matrix_of_a_stack_has_the_rows_that_it_multiplies(grouped):
    x, block = torch.randn(7, 32, dtype=torch.bfloat16), Experts(grouped)
    with watch_stacks(block, {"weight"}) as seen, torch.no_grad():
        block(x)
    groups = [
        LinearGroup(
            (Linear(name=f"{e}", param="weight", shape=(64, 32), expert=e, transposed=True),),
            Group(()),
            "",
            e,
            "weight",
        )
        for e in range(3)
    ]
    first, second, third = (seen.inputs_of(g) for g in groups)
    assert torch.equal(first, x[:2]) and torch.equal(third, x[2:])
    assert second is None or not len(second)
