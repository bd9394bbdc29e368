"""Stand-ins for submodules of a block whose linears are solved (``block_runner``)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn


@dataclass
class PlaybackUnit:
    """A submodule that returns the output of its last linear, either alone or first in a tuple with Nones.

    path, last, width: of the submodule, of its last linear, and the outputs of that; rest: Nones after it (None: a bare tensor)
    """

    path: str
    last: str
    width: int
    rest: int | None = None


class Playback(nn.Module):
    """Stand-in for a solved submodule, which returns its recorded output."""

    def __init__(self, module: nn.Module, fetch: Callable[[], Tensor], rest: int | None) -> None:
        super().__init__()
        self.__dict__["_solved"] = (module, fetch, rest)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_solved"][0], name)  # blocks read attributes of their parts

    def forward(self, *_: Any, **__: Any) -> Any:
        _, fetch, rest = self.__dict__["_solved"]
        out = fetch()
        return out if rest is None else (out, *[None] * rest)
