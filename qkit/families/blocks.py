"""The structure of a block for capture, solvers and transforms: its linears, their groups, and their names."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

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
    transposed: the parameter holds it as [in, out]
    """

    name: str
    param: str
    shape: tuple[int, int]
    bias: bool = False
    expert: int | None = None
    rows: tuple[int, int] | None = None
    transposed: bool = False

    @property
    def owner(self) -> str:
        """The module that has the parameter, relative to the block."""
        return self.param.rpartition(".")[0]

    def view(self, block: nn.Module) -> Tensor:
        """A view of the weight in a materialized block, [out, in]; writing to it changes the block."""
        return self.part(block.get_parameter(self.param).data)

    def part(self, param: Tensor) -> Tensor:
        """The part of this linear in a tensor with the shape of its parameter, [out, in]."""
        if self.expert is not None:
            param = param[self.expert]
        param = param.t() if self.transposed else param
        return param if self.rows is None else param[self.rows[0] : self.rows[1]]

    def as_stored(self, weight: Tensor) -> Tensor:
        """A weight [out, in] with the shape of its parameter, which holds no other."""
        return weight.t() if self.transposed else weight


@dataclass(frozen=True)
class LinearGroup:
    """Linears that read the same input; ``hook`` is the module whose input it is ('' for an expert's own).

    stack: the parameter that holds the one linear of the group beside others (``Stack``), '' for none
    """

    linears: tuple[Linear, ...]
    declared: Group
    hook: str
    expert: int | None = None
    stack: str = ""

    @property
    def key(self) -> str:
        """Identifies the group inside its block."""
        return self.linears[0].name


@dataclass(frozen=True)
class FusedExperts:
    """Routed experts whose weights are parameters of three dimensions of one module.

    module: inside the block, called as forward(hidden, top_k_index, top_k_weights)
    first, down: its parameters, [experts, out, in], or [experts, in, out] where ``transposed``
    halves: the rows of ``first`` are those of a gate, then those of what it gates; else they are one matrix
    """

    module: str
    count: int
    first: str
    down: str
    halves: bool
    transposed: bool

    @property
    def params(self) -> tuple[str, str]:
        """Both parameters, relative to the block."""
        return (f"{self.module}.{self.first}", f"{self.module}.{self.down}")


@dataclass(frozen=True)
class Stack:
    """Matrices in one parameter of three dimensions, [count, out, in], or [count, in, out] where ``transposed``.

    What multiplies by them is not known: their inputs are seen where the parameter is used.
    """

    param: str
    count: int
    transposed: bool


@dataclass(frozen=True)
class BlockStructure:
    """One block: its module path, the groups of its linears, and the stored name of every parameter."""

    index: int
    path: str
    groups: tuple[LinearGroup, ...]
    stored: tuple[tuple[str, str], ...]  # (parameter or buffer inside the block, checkpoint tensor name)
    experts: tuple[FusedExperts, ...] = ()
    stacks: tuple[Stack, ...] = ()

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
    """Blocks that a stream of rows passes one after another: a tower, or the language model (name LANGUAGE).

    on_text: they run where the model reads a text alone
    """

    name: str
    blocks: tuple[BlockStructure, ...]
    on_text: bool = True

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


def head_width(config: Any) -> int:
    """The width of a head of attention, by the config of a language model."""
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)
