"""Inputs of stacked matrices, seen where their parameter is used.

A module with stacked matrices multiplies by them in a way of its own: one matrix at a time, or all in one batched product. Each
product that has a part of the parameter as an operand is seen, and the other operand is the input of that part.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from qkit.families.blocks import LinearGroup

_PRODUCTS = ("linear", "matmul", "bmm", "mm", "__matmul__", "baddbmm")
_GROUPED = ("grouped_mm", "_grouped_mm")  # rows of one operand by matrix, up to offsets


@dataclass
class StackedInputs:
    """What a run showed. found: {(parameter, index): inputs [tokens, in], piece after piece}"""

    found: dict[tuple[str, int], list[Tensor]] = field(default_factory=dict)

    def inputs_of(self, group: LinearGroup) -> Tensor | None:
        """The inputs of a group [tokens, in], without rows of zeros; None where no token reached it."""
        linear = group.linears[0]
        pieces = self.found.get((linear.param, linear.expert or 0))
        if not pieces:
            return None
        x = torch.cat([p.reshape(-1, p.shape[-1]) for p in pieces])
        return x[(x != 0).any(-1)]  # experts that see all tokens see those of others as zeros


class _Watch(TorchFunctionMode):
    def __init__(self, params: dict[str, nn.Parameter], seen: StackedInputs) -> None:
        super().__init__()
        self.params, self.seen = params, seen

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name in _PRODUCTS and len(args) >= 2:
            self._note(args[0], args[1])
        elif name in _GROUPED and len(args) >= 2:
            offsets = args[2] if len(args) > 2 else (kwargs or {}).get("offs")
            ends = [] if offsets is None else offsets.tolist()
            self._note([args[0][i:j] for i, j in zip([0, *ends], ends, strict=False)], args[1])
        return func(*args, **(kwargs or {}))

    def _note(self, x: Any, weight: Any) -> None:
        """x: the operand, or a list of one for each matrix"""
        if not isinstance(weight, Tensor):
            return
        for name, param in self.params.items():
            if weight.untyped_storage().data_ptr() != param.untyped_storage().data_ptr():
                continue
            size = param[0].numel()
            first = (weight.storage_offset() - param.storage_offset()) // size
            if weight.dim() == 3 and isinstance(x, (Tensor, list)):
                for e in range(min(len(weight), len(x))):
                    self.seen.found.setdefault((name, first + e), []).append(x[e])
            elif isinstance(x, Tensor):
                self.seen.found.setdefault((name, first), []).append(x)


@contextmanager
def watch_stacks(block: nn.Module, params: set[str]) -> Iterator[StackedInputs]:
    """See the inputs of the stacked matrices of a block in the runs inside the context. params: relative to the block"""
    seen = StackedInputs()
    if not params:
        yield seen
        return
    with _Watch({name: block.get_parameter(name) for name in params}, seen):
        yield seen
