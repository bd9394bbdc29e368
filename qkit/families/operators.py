"""Operators that a run of a skeleton calls, by what they do with the values that ``stream_trace`` follows."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor

# Operators by what they do. At the shape and the dtype of a tensor, not at its values:
LIKE = {
    *(f"{n}_like" for n in ("zeros", "ones", "empty", "full")),
    *(f"new_{n}" for n in ("zeros", "ones", "empty", "full")),
}
KEEP = {"to", "float", "type", "type_as", "bfloat16", "half", "contiguous", "clone", "dropout", "detach", "data"}
SPLIT = {"view", "reshape", "unflatten"}  # move values, and may split channels into heads
MOVE = {
    *SPLIT,
    *("transpose", "permute", "unsqueeze", "squeeze", "expand", "flatten", "getitem", "movedim", "swapaxes", "narrow"),
    *("repeat_interleave", "repeat", "chunk", "split", "unbind", "select"),
}
TRANSPOSE = {"t", "T", "mT", "transpose", "swapaxes"}  # a matrix
ADD, MULTIPLY = {"add", "iadd", "radd", "sub", "isub"}, {"mul", "imul", "rmul", "div", "truediv", "idiv", "itruediv"}
WRITES = {"__setitem__", "__set__", *(f"__i{n}__" for n in ("add", "sub", "mul", "div", "truediv", "pow", "and", "or"))}
PRODUCTS = {"linear": 1, "matmul": 1, "mm": 1, "bmm": 1, "addmm": 2}  # where the second factor is


def transposes(out: Tensor, dims: tuple[Any, ...]) -> bool:
    """Whether a view of a parameter has its last two dimensions exchanged. dims: those that the operator got"""
    numbers = [d % out.dim() for d in dims if isinstance(d, int)]
    return out.dim() > 1 and (not numbers or set(numbers) == {out.dim() - 2, out.dim() - 1})


def writes(func: Any) -> bool:
    """Whether an operator writes into its first argument."""
    name = getattr(func, "__name__", "")
    return name in WRITES or (name.endswith("_") and not name.endswith("__"))


def target(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """The tensor that an operator writes into, such as ``x`` of ``x.add_(y)``; None for others."""
    found = kwargs.get("out", args[0] if writes(func) and args else None)
    return found if isinstance(found, Tensor) else None


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Yield the tensors in nested arguments, such as those of torch.cat."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list, dict)):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from tensors_in(inner)
