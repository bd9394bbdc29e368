"""The structure of a block for capture, solvers and transforms: its linears, their groups, and their names."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor, nn


@dataclass(frozen=True)
class Group:
    """Linears of a block that read the same input.

    linears: module names inside the block
    source:  the norm or linear of the block whose output channels are that input, when a per-channel scale
             can be folded into it without changing the function; None when it cannot
    source_if: (config field, value) that the model must have for ``source`` to be true of it; None: always
    also:    modules with a ``weight`` [.., in] that read the same input and stay unquantized (a router)
    """

    linears: tuple[str, ...]
    source: str | None = None
    source_if: tuple[str, object] | None = None
    also: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Linear:
    """A weight matrix [out, in] of a block, as a parameter of its own or a part of one.

    name:   checkpoint name without '.weight'
    param:  the module parameter that holds it, relative to the block
    expert, rows: for fused experts, the index and the row range inside ``param``
    """

    name: str
    param: str
    shape: tuple[int, int]
    bias: bool = False
    expert: int | None = None
    rows: tuple[int, int] | None = None

    def view(self, block: nn.Module) -> Tensor:
        """A view of the weight in a materialized block, [out, in]; writing to it changes the block."""
        return self.part(block.get_parameter(self.param).data)

    def part(self, param: Tensor) -> Tensor:
        """The part of this linear in a tensor with the shape of its parameter, [out, in]."""
        if self.expert is not None:
            param = param[self.expert]
        return param if self.rows is None else param[self.rows[0] : self.rows[1]]


@dataclass(frozen=True)
class LinearGroup:
    """Linears that read the same input; ``hook`` is the module whose input it is ('' for an expert's own)."""

    linears: tuple[Linear, ...]
    declared: Group
    hook: str
    expert: int | None = None

    @property
    def key(self) -> str:
        """Identifies the group inside its block."""
        return self.linears[0].name


@dataclass(frozen=True)
class BlockStructure:
    """One block: its module path, the groups of its linears, and the stored name of every parameter."""

    index: int
    path: str
    groups: tuple[LinearGroup, ...]
    stored: tuple[tuple[str, str], ...]  # (parameter or buffer inside the block, checkpoint tensor name)

    @property
    def linears(self) -> tuple[Linear, ...]:
        return tuple(linear for g in self.groups for linear in g.linears)

    @property
    def units(self) -> tuple[tuple[LinearGroup, ...], ...]:
        """Groups whose linears need one format in engines: each group alone, and last all experts, which run as one product."""
        experts = tuple(g for g in self.groups if g.expert is not None)
        return (*((g,) for g in self.groups if g.expert is None), *([experts] if experts else []))


@dataclass(frozen=True)
class BlockSequence:
    """Blocks that a stream of rows passes one after another: a tower, or the language model (name LANGUAGE)."""

    name: str
    blocks: tuple[BlockStructure, ...]

    @property
    def paths(self) -> tuple[str, ...]:
        """Module paths of the blocks."""
        return tuple(b.path for b in self.blocks)


@dataclass(frozen=True)
class Streams:
    """The hidden states that pass from block to block, where blocks are called with named arguments.

    names:   the arguments with hidden states, in the order in which rows concatenate them
    returns: the argument that each result of a block becomes; a single result is not in a tuple
    recorded: how results are handed on is not known (both are empty): the inputs of each block are recorded in runs of the
             whole model
    """

    names: tuple[str, ...]
    returns: tuple[str, ...]
    recorded: bool = False


LANGUAGE = "language"
