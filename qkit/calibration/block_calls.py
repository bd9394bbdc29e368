"""How a model calls its blocks, and the way into the first of them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from qkit.errors import Unsupported
from qkit.families.blocks import Streams
from qkit.files.offload import OffloadedTensors


@dataclass(frozen=True)
class PerRow:
    """An argument that differs from row to row (rotary angles of pictures of several sizes): tensors of one shape that make a
    batch along ``dim``."""

    each: tuple[Tensor, ...]
    dim: int


@dataclass(frozen=True)
class OffloadedArgument:
    """An argument that lies on the disk: place ``index`` of a file of tensors."""

    offload_file: OffloadedTensors
    index: int


def mapped(of: Callable[[Any], Any], value: Any) -> Any:
    """The same arguments with ``of`` of what is inside tuples, lists and dicts."""
    if isinstance(value, (tuple, list)):
        return type(value)(mapped(of, v) for v in value)
    return {k: mapped(of, v) for k, v in value.items()} if isinstance(value, dict) else of(value)


@dataclass(frozen=True)
class Call:
    """How the model calls a block: the arguments after the hidden states, recorded for one row, or for each (PerRow).

    streams: where the block is called by name, what of its arguments the hidden states are, and lengths, how many tokens each
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    streams: Streams | None = None
    lengths: tuple[int, ...] = ()

    def to(self, dtype: torch.dtype) -> Call:
        """The same call for a block that runs in ``dtype``: its floating-point arguments are in it too."""

        def cast(value: Any) -> Any:
            if isinstance(value, PerRow):
                return PerRow(tuple(map(cast, value.each)), value.dim)
            return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value

        return replace(self, args=mapped(cast, self.args), kwargs=mapped(cast, self.kwargs))

    def __call__(self, block: nn.Module, hidden: Tensor, rows: slice = slice(None)) -> Tensor:
        """What the block gives for those rows, [n, tokens, hidden]."""

        def of(value: Any) -> Any:
            if isinstance(value, PerRow):
                return torch.cat(value.each[rows], dim=value.dim)
            return value.offload_file[value.index] if isinstance(value, OffloadedArgument) else value

        kwargs = mapped(of, self.kwargs)
        if self.streams is None:
            out = block(hidden, *mapped(of, self.args), **kwargs)
            first: Tensor = out[0] if isinstance(out, tuple) else out
            return first
        parts = dict(zip(self.streams.names, hidden.split(self.lengths, -2), strict=True))
        out = block(**parts, **kwargs)
        given = dict(zip(self.streams.returns, out if isinstance(out, tuple) else (out,), strict=True))
        return torch.cat([given[n] for n in self.streams.names if given[n] is not None], -2)


@dataclass(frozen=True)
class OneByOne:
    """How blocks are called that take a row of any shape at a time: a row's pictures in a vision tower."""

    each: tuple[Call, ...]

    def __call__(self, block: nn.Module, hidden: Tensor, rows: slice = slice(None)) -> Tensor:
        """What the block gives for that one row, [.., tokens, hidden]."""
        assert rows.stop - rows.start == 1
        out: Tensor = self.each[rows.start](block, hidden)
        return out


def offloaded(calls: dict[int, Call], offload_file: OffloadedTensors, dtype: torch.dtype) -> dict[int, Call]:
    """The calls of one row, for blocks that run in ``dtype``, their tensors on the disk; what blocks share is there once."""
    places: dict[int, OffloadedArgument] = {}

    def put(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        if id(value) not in places:
            places[id(value)] = OffloadedArgument(offload_file, len(offload_file))
            offload_file.append(value.to(dtype) if value.is_floating_point() else value)
        return places[id(value)]

    return {i: replace(call, args=mapped(put, call.args), kwargs=mapped(put, call.kwargs)) for i, call in calls.items()}


def _by_name(block: nn.Module, streams: Streams, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, Call]:
    """The hidden states of all streams, one behind the other, and the rest of the call."""
    signature = inspect.signature(block.forward)
    given = dict(signature.bind(*args, **kwargs).arguments)
    for name, p in signature.parameters.items():
        if p.kind is p.VAR_POSITIONAL:  # what blocks of other kinds take; nothing reads it
            given.pop(name, None)
        elif p.kind is p.VAR_KEYWORD:
            given.update(given.pop(name, {}))
    parts = [given.pop(name) for name in streams.names]
    return torch.cat(parts, -2), Call((), given, streams, tuple(p.shape[-2] for p in parts))


def merged(calls: list[dict[int, Call]], lengths: list[int]) -> dict[int, Call]:
    """The calls of rows of several lengths as those of one batch, filled up at the end to the longest.

    Blocks are causal, so that what follows a row's end changes nothing in it. Raises Unsupported for arguments that are
    neither the same for all rows nor one number, or vector, a token.
    """
    longest = lengths.index(max(lengths))
    made: dict[tuple[int, ...], Any] = {}  # blocks share their arguments

    def join(values: list[Any]) -> Any:
        first = values[longest]
        if isinstance(first, (tuple, list)):
            return type(first)(join([v[i] for v in values]) for i in range(len(first)))
        if not isinstance(first, Tensor):
            return first
        key = tuple(map(id, values))
        if key not in made:
            made[key] = _joined(values, lengths, longest)
        return made[key]

    found = {}
    for index, call in calls[longest].items():
        args = join([c[index].args for c in calls])
        found[index] = Call(args, {k: join([c[index].kwargs[k] for c in calls]) for k in call.kwargs})
    return found


def _joined(values: list[Tensor], lengths: list[int], longest: int) -> Any:
    first, most = values[longest], lengths[longest]
    if all(v.shape == first.shape and torch.equal(v, first) for v in values):
        return first
    dim = next((d for d, n in enumerate(first.shape) if n == most), None)
    if dim is None or any(v.dim() != first.dim() or v.shape[dim] != n for v, n in zip(values, lengths, strict=True)):
        raise Unsupported(
            f"calibration samples of several lengths: blocks are called with a tensor {list(first.shape)} that differs between "
            "rows and does not follow their tokens"
        )
    if all(torch.equal(v, first.narrow(dim, 0, n)) for v, n in zip(values, lengths, strict=True)):
        return first
    padded = []
    for v, n in zip(values, lengths, strict=True):
        rest = v.new_zeros(*v.shape[:dim], most - n, *v.shape[dim + 1 :])
        padded.append(torch.cat([v, rest], dim))
    return PerRow(tuple(padded), dim - 1)


# ---- the way into the first block ---------------------------------------------------------------------------


class _Entered(Exception):
    """Raised at the last block: what comes after it is not needed."""


@dataclass
class _Notes:
    """What is seen of one sample: the hidden states that enter the first block, and how each block is called.

    whole: the sample goes on behind the last block, to see whether blocks are called again
    """

    count: int
    calls: dict[int, Call] = field(default_factory=dict)
    first: Tensor | None = None
    whole: bool = False

    def add(self, index: int, hidden: Tensor, call: Call) -> None:
        """Raises Unsupported for a block that is called twice."""
        if index in self.calls:
            raise Unsupported(
                f"block {index + 1} of {self.count} runs more than once in a pass of the model: its weights have several "
                "inputs, and qkit quantizes a block for one: use a method without calibration (rtn with a weight-only scheme)"
            )
        self.first = hidden if index == 0 else self.first
        self.calls[index] = call
        if index + 1 == self.count and not self.whole:
            raise _Entered


class _Recorder(nn.Module):
    """Stands in a block's place: notes how it is called and hands the hidden states on."""

    def __init__(self, block: nn.Module, notes: _Notes, index: int, streams: Streams | None) -> None:
        super().__init__()
        self.__dict__["_block"] = block
        self.__dict__["_note"] = (notes, index, streams)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_block"], name)  # models read attributes such as attention_type from a block

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        notes, index, streams = self.__dict__["_note"]
        if streams is None:
            notes.add(index, args[0], Call(args[1:], kwargs))
            return args[0]
        hidden, call = _by_name(self.__dict__["_block"], streams, args, kwargs)
        notes.add(index, hidden, call)
        parts = dict(zip(streams.names, hidden.split(call.lengths, -2), strict=True))
        return tuple(parts[n] for n in streams.returns) if len(parts) > 1 else hidden


def enter(
    model: nn.Module,
    blocks: Sequence[str],
    samples: Iterable[Mapping[str, Any]],
    through: bool = False,
    streams: Streams | None = None,
) -> Generator[tuple[Tensor, dict[int, Call]], None, None]:
    """Hidden states that reach the first of these blocks, [.., tokens, hidden] of a sample at a time, and how each block is
    called. Samples that do not reach it (a text, where the blocks look at pictures) are left out.

    model: everything before the blocks is materialized; samples: what the model is called with for each row; through: the
    blocks are materialized too and run, since transformers looks for those of a tower at its first call, to record what
    they give; streams: of a diffusion transformer
    """
    originals = [model.get_submodule(name) for name in blocks]
    base: Any = getattr(model, "base_model", model)
    notes = _Notes(len(blocks))

    def look(index: int) -> Callable[..., None]:
        return lambda _, args, kwargs: notes.add(index, args[0], Call(args[1:], kwargs))

    handles = []
    try:
        for i, (name, block) in enumerate(zip(blocks, originals, strict=True)):
            if through:
                handles.append(block.register_forward_pre_hook(look(i), with_kwargs=True))
            else:
                model.set_submodule(name, _Recorder(block, notes, i, streams))
        for i, sample in enumerate(samples):
            notes.first, notes.calls, notes.whole = None, {}, i == 0 and not through and streams is None
            with torch.inference_mode(), suppress(_Entered):
                base(**sample)
            if notes.first is not None:
                yield notes.first, notes.calls
    finally:
        for handle in handles:
            handle.remove()
        if not through:
            for name, block in zip(blocks, originals, strict=True):
                model.set_submodule(name, block)
