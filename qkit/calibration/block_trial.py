"""One run of the original model on one row, block by block, which shows how its blocks pass hidden states on.

The blocks of a model that nobody declared may take hidden states under any name, return them beside other values, and get
values from the model that depend on the row or on earlier blocks. A run of one row shows it: where a block's output is the next
one's input, and what else the blocks are called with. ``prove`` then compares these calls with the ones that were recorded
without running any block. Where both agree, blocks can be run one after another.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from qkit.calibration.block_calls import Call, NotOneAfterAnother, Passing, mapped, runs_again
from qkit.calibration.call_values import leaves_of, same_value
from qkit.errors import Unsupported
from qkit.families.text_arguments import text_arguments

ADVICE = "use a method without calibration (rtn with a weight-only scheme)"


@dataclass
class _Seen:
    """The call of one block in the run."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    out: Any


def _itself(value: Any) -> Any:
    return value


@dataclass(frozen=True)
class Trial:
    """How each block that ran passes hidden states on, and the calls of the row, with their hidden states; by index."""

    passing: dict[int, Passing]
    calls: dict[int, Call]
    entering: dict[int, Tensor] = field(repr=False)

    @property
    def returns_more(self) -> bool:
        """Whether a block returns tensors beside the hidden states, which may be those of this row alone."""
        beside = (
            (i != p.result, x) for p in self.passing.values() if p.result is not None for i, x in enumerate(p.out)
        )
        return any(other and isinstance(x, Tensor) for other, x in beside)


def run_trial(
    model: nn.Module,
    blocks: Sequence[str],
    sample: Mapping[str, Any],
    loaded: Callable[[int], AbstractContextManager[object]],
) -> Trial:
    """Run one row through the whole model. loaded: a context in which the block of that index has its weights

    Raises NotOneAfterAnother where a block runs more than once and where hidden states cannot be told, Unsupported where no
    block runs.
    """
    base: Any = getattr(model, "base_model", model)
    seen: dict[int, _Seen] = {}
    open_blocks: dict[int, AbstractContextManager[object]] = {}

    def before(index: int) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if index in seen:
                raise runs_again(index, len(blocks))
            seen[index] = _Seen(
                mapped(_itself, args), mapped(_itself, kwargs), None
            )  # later blocks may fill a dict of it
            open_blocks[index] = loaded(index)
            open_blocks[index].__enter__()

        return hook

    def after(index: int) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
            seen[index].out = out
            open_blocks.pop(index).__exit__(None, None, None)

        return hook

    handles = []
    try:
        for i, name in enumerate(blocks):
            block = model.get_submodule(name)
            handles.append(block.register_forward_pre_hook(before(i), with_kwargs=True, prepend=True))
            handles.append(block.register_forward_hook(after(i), with_kwargs=True))
        with torch.inference_mode():
            base(**text_arguments(base, sample))
    finally:
        for handle in handles:
            handle.remove()
        for context in open_blocks.values():
            with suppress(Exception):
                context.__exit__(None, None, None)
    ran = [i for i in range(len(blocks)) if i in seen]
    if not ran:
        raise Unsupported(f"{blocks[0]} and all that follow do not run when the model reads a text: {ADVICE}")
    passing, calls = _passing([seen[i] for i in ran], [blocks[i] for i in ran])
    return Trial(
        {i: p for i, p in zip(ran, passing, strict=True)},
        {i: c for i, c in zip(ran, calls, strict=True)},
        {i: _argument(seen[i], p.place) for i, p in zip(ran, passing, strict=True)},
    )


def _passing(seen: list[_Seen], blocks: Sequence[str]) -> tuple[list[Passing], list[Call]]:
    """How the blocks that ran pass hidden states on, and their calls."""
    passing: list[Passing] = []
    for i, block in enumerate(seen):
        following = seen[i + 1] if i + 1 < len(seen) else None
        result = _result(block.out, following, blocks[i])
        place: int | str | None = None
        if i > 0:
            place = _place(block, _at(seen[i - 1].out, passing[-1].result))
        elif following is not None:
            place = _place(following, _at(block.out, result))
        if place is None or not isinstance(_argument(block, place), Tensor):
            place = _first_tensor(block)
        if place is None:
            raise NotOneAfterAnother(f"{blocks[i]} is called without hidden states that qkit can tell: {ADVICE}")
        passing.append(Passing(place, result, block.out))
    return passing, [Call.of(block.args, block.kwargs, p) for block, p in zip(seen, passing, strict=True)]


def _at(out: Any, result: int | None) -> Any:
    return out if result is None else out[result]


def _result(out: Any, following: _Seen | None, name: str) -> int | None:
    """Where the hidden states are in what a block returns: what the next block is called with, else the first."""
    if isinstance(out, Tensor):
        return None
    if not isinstance(out, (tuple, list)) or not any(isinstance(x, Tensor) for x in out):
        raise NotOneAfterAnother(f"{name} returns {type(out).__name__}, and hidden states are expected: {ADVICE}")
    tensors = [i for i, x in enumerate(out) if isinstance(x, Tensor)]
    if following is not None:
        inputs = [*following.args, *following.kwargs.values()]
        passed = [i for i in tensors if any(x is out[i] for x in inputs)]
        if passed:
            return passed[0]
    return tensors[0]


def _place(block: _Seen, hidden: Any) -> int | str | None:
    """The argument that is ``hidden``, the same object or the same values."""
    items: list[tuple[int | str, Any]] = [*enumerate(block.args), *block.kwargs.items()]
    same = [k for k, v in items if v is hidden]
    equal = [k for k, v in items if isinstance(v, Tensor) and same_value(v, hidden)]
    return next(iter(same or equal), None)


def _argument(block: _Seen, place: int | str) -> Any:
    return block.kwargs.get(place) if isinstance(place, str) else block.args[place] if place < len(block.args) else None


def _first_tensor(block: _Seen) -> int | str | None:
    items: list[tuple[int | str, Any]] = [*enumerate(block.args), *block.kwargs.items()]
    return next((k for k, v in items if isinstance(v, Tensor) and v.is_floating_point()), None)


def prove(trial: Trial, calls: Mapping[int, Call], blocks: Sequence[str]) -> None:
    """Compare the calls of a run with those that were recorded without running a block.

    Raises NotOneAfterAnother where blocks cannot be run one after another: where hidden states change between two blocks, or
    where a block is called with something that an earlier block made.
    """
    previous: int | None = None
    for i in trial.calls:
        name = blocks[i]
        if previous is not None:
            left = _at(trial.passing[previous].out, trial.passing[previous].result)
            if left is not trial.entering[i] and not same_value(left, trial.entering[i]):
                raise NotOneAfterAnother(
                    f"{name} is called with hidden states other than those that leave the block before it: qkit runs "
                    f"blocks one after another: {ADVICE}"
                )
        previous = i
        recorded, run = leaves_of(calls[i]), leaves_of(trial.calls[i])
        differing = next((k for k in run if not same_value(run[k], recorded.get(k))), None)
        if differing is not None or run.keys() != recorded.keys():
            what = differing or next(iter(run.keys() ^ recorded.keys()))
            raise NotOneAfterAnother(
                f"{name} is called with {what}, which earlier blocks make or change: qkit runs blocks one after another: "
                f"{ADVICE}"
            )
