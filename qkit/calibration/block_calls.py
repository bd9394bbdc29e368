"""Recorded calls of a model's blocks, and a run of the model up to its first block."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from qkit.errors import Unsupported
from qkit.families.blocks import Streams
from qkit.families.text_arguments import text_arguments
from qkit.files.offload import OffloadedTensors


@dataclass(frozen=True)
class PerRow:
    """An argument that differs from row to row, such as rotary angles of images of several sizes.

    values: tensors of one shape, which make a batch along ``dim``
    """

    values: tuple[Tensor, ...]
    dim: int


@dataclass(frozen=True)
class ForEveryRow:
    """An argument that is the same for all rows and has an entry for each along ``dim``. value: that of one row"""

    value: Tensor
    dim: int


@dataclass(frozen=True)
class Passing:
    """How a block gets hidden states, and hands them on.

    place:  the argument with the hidden states, by its position or name
    result: where they are in the tuple that it returns; None: it returns them alone
    out:    what it returned in a run; what is beside the hidden states is the same in each run
    """

    place: int | str
    result: int | None
    out: Any

    def hand_on(self, hidden: Tensor) -> Any:
        """What the block returns, with other hidden states."""
        if self.result is None:
            return hidden
        values = [hidden if i == self.result else x for i, x in enumerate(self.out)]
        return type(self.out)(*values) if hasattr(self.out, "_fields") else type(self.out)(values)


@dataclass(frozen=True)
class OffloadedArgument:
    """An argument that is offloaded to the disk: tensor ``index`` of ``offload_file``."""

    offload_file: OffloadedTensors
    index: int


def mapped(of: Callable[[Any], Any], value: Any) -> Any:
    """Arguments with ``of`` applied to every value inside tuples, lists and dicts."""
    if isinstance(value, (tuple, list)):
        items = [mapped(of, v) for v in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    return {k: mapped(of, v) for k, v in value.items()} if isinstance(value, Mapping) else of(value)


@dataclass(frozen=True)
class Call:
    """A recorded call of a block: its arguments after the hidden states, for one row or for each row (PerRow).

    streams: names of the arguments that are hidden states, where the block is called by name
    lengths: tokens of each stream
    place, result: as of ``Passing``
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    streams: Streams | None = None
    lengths: tuple[int, ...] = ()
    place: int | str = 0
    result: int | None = 0

    @classmethod
    def of(cls, args: tuple[Any, ...], kwargs: dict[str, Any], passing: Passing) -> Call:
        """A call without its hidden states."""
        place = passing.place
        if isinstance(place, str):
            return cls(args, {k: v for k, v in kwargs.items() if k != place}, place=place, result=passing.result)
        return cls((*args[:place], *args[place + 1 :]), kwargs, place=place, result=passing.result)

    def to(self, dtype: torch.dtype, device: torch.device | None = None) -> Call:
        """The call with its floating-point arguments in ``dtype``, for a block that runs in it, and all on ``device`` (None:
        where they are)."""

        def cast(value: Any) -> Any:
            if isinstance(value, PerRow):
                return PerRow(tuple(map(cast, value.values)), value.dim)
            if isinstance(value, ForEveryRow):
                return ForEveryRow(cast(value.value), value.dim)
            if not isinstance(value, Tensor):
                return value
            return value.to(device, dtype) if value.is_floating_point() else value.to(device)

        return replace(self, args=mapped(cast, self.args), kwargs=mapped(cast, self.kwargs))

    def __call__(self, block: nn.Module, hidden: Tensor, rows: slice = slice(None)) -> Tensor:
        """Outputs of the block for the given rows, [n, tokens, hidden]."""

        def of(value: Any) -> Any:
            if isinstance(value, PerRow):
                return torch.cat(value.values[rows], dim=value.dim)
            if isinstance(value, ForEveryRow):
                return torch.cat([value.value] * len(hidden), dim=value.dim)
            return value.offload_file[value.index] if isinstance(value, OffloadedArgument) else value

        kwargs = mapped(of, self.kwargs)
        if self.streams is None:
            args = mapped(of, self.args)
            if isinstance(self.place, str):
                out = block(*args, **kwargs, **{self.place: hidden})
            else:
                out = block(*args[: self.place], hidden, *args[self.place :], **kwargs)
            hidden_out: Tensor = out[self.result or 0] if isinstance(out, (tuple, list)) else out
            return hidden_out
        parts = dict(zip(self.streams.names, hidden.split(self.lengths, -2), strict=True))
        out = block(**parts, **kwargs)
        outputs = dict(zip(self.streams.returns, out if isinstance(out, tuple) else (out,), strict=True))
        return torch.cat([outputs[n] for n in self.streams.names if outputs[n] is not None], -2)


@dataclass(frozen=True)
class OneByOne:
    """Calls of a block, one for each row, where rows have different shapes (the images of a row in a vision tower)."""

    calls: tuple[Call, ...]

    def __call__(self, block: nn.Module, hidden: Tensor, rows: slice = slice(None)) -> Tensor:
        """Output of the block for one row, [.., tokens, hidden]."""
        assert rows.stop - rows.start == 1
        out: Tensor = self.calls[rows.start](block, hidden)
        return out


def offloaded(calls: dict[int, Call], offload_file: OffloadedTensors, dtype: torch.dtype) -> dict[int, Call]:
    """The calls of one row in ``dtype``, with tensors in ``offload_file``; tensors that blocks share are stored once."""
    arguments: dict[int, OffloadedArgument] = {}

    def put(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        if id(value) not in arguments:
            arguments[id(value)] = OffloadedArgument(offload_file, len(offload_file))
            offload_file.append(value.to(dtype) if value.is_floating_point() else value)
        return arguments[id(value)]

    return {i: replace(call, args=mapped(put, call.args), kwargs=mapped(put, call.kwargs)) for i, call in calls.items()}


class NotOneAfterAnother(Unsupported):
    """Blocks cannot be run one after another, outside the model: what one is called with is not what the one before left."""


def runs_again(index: int, count: int) -> NotOneAfterAnother:
    """The error for a block that runs a second time in a pass of the model."""
    return NotOneAfterAnother(
        f"block {index + 1} of {count} runs more than once in a pass of the model: its weights have several "
        "inputs, and qkit quantizes a block for one: use a method without calibration (rtn with a weight-only scheme)"
    )


def _by_name(block: nn.Module, streams: Streams, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, Call]:
    """Hidden states of all streams, concatenated along tokens, and the rest of the call."""
    signature = inspect.signature(block.forward)
    arguments = dict(signature.bind(*args, **kwargs).arguments)
    for name, p in signature.parameters.items():
        if p.kind is p.VAR_POSITIONAL:  # what blocks of other kinds take; nothing reads it
            arguments.pop(name, None)
        elif p.kind is p.VAR_KEYWORD:
            arguments.update(arguments.pop(name, {}))
    parts = [arguments.pop(name) for name in streams.names]
    return torch.cat(parts, -2), Call((), arguments, streams, tuple(p.shape[-2] for p in parts))


def merged(calls: list[dict[int, Call]], lengths: list[int]) -> dict[int, Call]:
    """Calls of a batch, from the calls of its rows, which are padded at the end to the longest row.

    Blocks are causal, so padding does not change the tokens before it. Raises Unsupported for arguments that differ between
    rows and do not have one entry for each token.
    """
    longest = lengths.index(max(lengths))
    joined_values: dict[tuple[int, ...], Any] = {}  # blocks share their arguments

    def join(values: list[Any]) -> Any:
        longest_value = values[longest]
        if isinstance(longest_value, (tuple, list)):
            return type(longest_value)(join([v[i] for v in values]) for i in range(len(longest_value)))
        if not isinstance(longest_value, Tensor):
            return longest_value
        key = tuple(map(id, values))
        if key not in joined_values:
            joined_values[key] = _joined(values, lengths, longest)
        return joined_values[key]

    batch_calls = {}
    for index, call in calls[longest].items():
        args = join([c[index].args for c in calls])
        batch_calls[index] = Call(args, {k: join([c[index].kwargs[k] for c in calls]) for k in call.kwargs})
    return batch_calls


def _joined(values: list[Tensor], lengths: list[int], longest: int) -> Any:
    reference, longest_tokens = values[longest], lengths[longest]
    if all(v.shape == reference.shape and torch.equal(v, reference) for v in values):
        return reference
    dim = next((d for d, n in enumerate(reference.shape) if n == longest_tokens), None)
    if dim is None or any(
        v.dim() != reference.dim() or v.shape[dim] != n for v, n in zip(values, lengths, strict=True)
    ):
        raise Unsupported(
            f"calibration samples of several lengths: blocks are called with a tensor {list(reference.shape)} "
            "that differs between rows and does not follow their tokens"
        )
    if all(torch.equal(v, reference.narrow(dim, 0, n)) for v, n in zip(values, lengths, strict=True)):
        return reference
    padded = []
    for v, n in zip(values, lengths, strict=True):
        padding = v.new_zeros(*v.shape[:dim], longest_tokens - n, *v.shape[dim + 1 :])
        padded.append(torch.cat([v, padding], dim))
    return PerRow(tuple(padded), dim - 1)


# ---- the way into the first block ---------------------------------------------------------------------------


class _Entered(Exception):
    """Ends a run of the model at its last block: later results are not needed."""


@dataclass
class _Notes:
    """Record of one sample: the hidden states that enter the first block, and the call of each block.

    run_to_end: the run goes on after the last block, to detect blocks that are called twice; last: its index
    """

    count: int
    last: int
    calls: dict[int, Call] = field(default_factory=dict)
    first: Tensor | None = None
    run_to_end: bool = False

    def add(self, index: int, hidden: Tensor, call: Call) -> None:
        """Record a call. Raises Unsupported for a block that is called twice."""
        if index in self.calls:
            raise runs_again(index, self.count)
        self.first = hidden if not self.calls else self.first
        self.calls[index] = call
        if index == self.last and not self.run_to_end:
            raise _Entered


class _Recorder(nn.Module):
    """Stand-in for a block, which records its call and returns the hidden states unchanged."""

    def __init__(
        self, block: nn.Module, notes: _Notes, index: int, streams: Streams | None, passing: Passing | None
    ) -> None:
        super().__init__()
        self.__dict__["_block"] = block
        self.__dict__["_note"] = (notes, index, streams, passing)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_block"], name)  # models read attributes such as attention_type from a block

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        notes, index, streams, passing = self.__dict__["_note"]
        if passing is not None:
            place = passing.place
            hidden = kwargs[place] if isinstance(place, str) else args[place]
            notes.add(index, hidden, Call.of(args, kwargs, passing))
            return passing.hand_on(hidden)
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
    passing: Mapping[int, Passing] | None = None,
) -> Generator[tuple[Tensor, dict[int, Call]], None, None]:
    """Yield, for each sample, the hidden states that enter the first block, [.., tokens, hidden], and the call of each block.

    Samples that do not reach the first block are left out (a text, where the blocks process images).

    model:   all modules before the blocks are materialized
    samples: arguments of the model for each row
    through: the blocks are materialized and run; transformers records the outputs of a tower's blocks at its first call
    streams: of a diffusion transformer
    passing: of each block that runs, where a trial showed it
    """
    originals = [model.get_submodule(name) for name in blocks]
    base: Any = getattr(model, "base_model", model)
    notes = _Notes(len(blocks), last=max(passing) if passing else len(blocks) - 1)

    def look(index: int) -> Callable[..., None]:
        return lambda _, args, kwargs: notes.add(index, args[0], Call(args[1:], kwargs))

    handles = []
    try:
        for i, (name, block) in enumerate(zip(blocks, originals, strict=True)):
            if through:
                handles.append(block.register_forward_pre_hook(look(i), with_kwargs=True))
            else:
                model.set_submodule(name, _Recorder(block, notes, i, streams, passing.get(i) if passing else None))
        for i, sample in enumerate(samples):
            notes.first, notes.calls, notes.run_to_end = None, {}, i == 0 and not through and streams is None
            with torch.inference_mode(), suppress(_Entered):
                base(**text_arguments(base, sample))
            if notes.first is not None:
                yield notes.first, notes.calls
    finally:
        for handle in handles:
            handle.remove()
        if not through:
            for name, block in zip(blocks, originals, strict=True):
                model.set_submodule(name, block)


def enter_one(
    model: nn.Module, blocks: Sequence[str], sample: Mapping[str, Any], passing: Mapping[int, Passing]
) -> tuple[Tensor, dict[int, Call]]:
    """What ``enter`` yields for one sample. Raises Unsupported where it reaches no block."""
    with closing(enter(model, blocks, [sample], passing=passing)) as entered:
        for found in entered:
            return found
    raise Unsupported(f"{blocks[0]} and all that follow do not run when the model reads a text")
