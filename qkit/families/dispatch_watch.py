"""Operators that no torch function shows: of code that torch.jit compiled, and those that vmap runs on parts of tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from qkit.families.operators import tensors_in


class DispatchWatch(TorchDispatchMode):
    """Tells of the tensors that each operator reads, whoever calls it. see: gets them"""

    def __init__(self, see: Callable[[Iterator[Tensor]], None]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._see = see

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        self._see(tensors_in((args, kwargs or {})))
        return func(*args, **(kwargs or {}))
