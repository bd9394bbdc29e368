"""The arguments of recorded calls, compared: of two rows, of one row and a batch, of a run and a record."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from qkit.calibration.block_calls import Call, ForEveryRow


def leaves_of(call: Call) -> dict[str, Any]:
    """{description: value} of all arguments of a call, inside tuples, lists and dicts."""
    result: dict[str, Any] = {}

    def add(name: str, value: Any) -> None:
        if isinstance(value, (tuple, list)):
            for i, v in enumerate(value):
                add(f"{name}[{i}]", v)
        elif isinstance(value, Mapping):
            for k, v in value.items():
                add(f"{name}[{k!r}]", v)
        else:
            result[name] = value

    for i, value in enumerate(call.args):
        add(f"argument {i + 1}", value)
    for name, value in call.kwargs.items():
        add(name, value)
    return result


def same_value(a: Any, b: Any) -> bool:
    """Whether two arguments are the same: tensors by their values, plain values by these, other objects by their type."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.shape == b.shape and a.dtype == b.dtype and torch.equal(a, b)
    return type(a) is type(b) and (a == b or not isinstance(a, (bool, int, float, complex, str, bytes)))


def for_any_batch(one: dict[int, Call], two: dict[int, Call]) -> dict[int, Call] | None:
    """Calls that hold for any number of rows, from those of one row and of two; None where they depend on the row.

    one: the calls of the first row; two: those of a batch of the first two rows
    """
    shared: dict[tuple[int, int], Any] = {}  # blocks share their arguments

    def join(a: Any, b: Any) -> Any:
        if isinstance(a, (tuple, list)) and type(a) is type(b) and len(a) == len(b):
            return type(a)(map(join, a, b))
        if isinstance(a, Mapping) and isinstance(b, Mapping) and a.keys() == b.keys():
            return {k: join(v, b[k]) for k, v in a.items()}
        if not isinstance(a, Tensor) or not isinstance(b, Tensor):
            if not same_value(a, b):
                raise _Differs
            return a
        if (id(a), id(b)) not in shared:
            shared[id(a), id(b)] = _repeated(a, b)
        return shared[id(a), id(b)]

    try:
        return {
            i: replace(call, args=join(call.args, two[i].args), kwargs=join(call.kwargs, two[i].kwargs))
            for i, call in one.items()
        }
    except _Differs:
        return None


class _Differs(Exception):
    """Arguments of two calls that one rule does not make."""


def _repeated(one: Tensor, two: Tensor) -> Any:
    if one.shape == two.shape:
        if torch.equal(one, two):
            return one
        raise _Differs
    dims = [d for d in range(one.dim()) if two.dim() == one.dim() and two.shape[d] == 2 * one.shape[d]]
    for d in dims:
        if two.shape == torch.cat([one, one], d).shape and torch.equal(two, torch.cat([one, one], d)):
            return ForEveryRow(one, d)
    raise _Differs
