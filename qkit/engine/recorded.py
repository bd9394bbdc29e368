"""Calibration rows of every block, recorded in runs of the whole original model.

Blocks of an undeclared diffusion model may hand their results on in any way (joined, split, summed, as skips of a U-Net), so
no block is run after another. The model runs as diffusers runs it, and each block's own calls are its rows; a block that is
called several times in a run has that many rows. The errors of earlier blocks are not in these rows. The whole model is in
memory during these runs, as it is in the pipeline that gives the calls.
"""

from __future__ import annotations

import inspect
import shutil
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qkit.calibration.block_calls import Call, OffloadedArgument, OneByOne, mapped
from qkit.calibration.statistics import Rows
from qkit.diffusion.clock import time_of
from qkit.engine.job import Job
from qkit.errors import Unsupported, write_failure
from qkit.families.blocks import BlockStructure
from qkit.families.materialize import load_block, load_outer, release_outer
from qkit.families.structure import ModelStructure
from qkit.files.offload import OffloadedTensors
from qkit.planning.plan import Plan


@dataclass(frozen=True)
class SlotCall(Call):
    """A call whose rows are any one tensor of its arguments. slot: its place or its name; dtype: of that tensor."""

    slot: int | str = 0
    dtype: torch.dtype = torch.float32

    def __call__(self, block: nn.Module, hidden: Tensor, rows: slice = slice(None)) -> Tensor:
        """The first tensor that the block returns."""
        args = list(mapped(_stored, self.args))
        kwargs = {name: mapped(_stored, value) for name, value in self.kwargs.items()}
        if isinstance(self.slot, int):
            args[self.slot] = hidden.to(self.dtype)
        else:
            kwargs[self.slot] = hidden.to(self.dtype)
        return _first_tensor(block(*args, **kwargs))


def _stored(value: Any) -> Any:
    return value.offload_file[value.index] if isinstance(value, OffloadedArgument) else value


def _first_tensor(result: Any) -> Tensor:
    tensors: list[Tensor] = []
    mapped(
        lambda v: tensors.append(v) if isinstance(v, Tensor) else None, tuple(result) if _several(result) else result
    )
    return tensors[0]


def _several(result: Any) -> bool:
    return isinstance(result, (tuple, list))


@dataclass
class _Record:
    """What is recorded of one block. order: its linears, in the order of their first calls."""

    file: Any
    calls: list[Call] = field(default_factory=list)
    leads: list[tuple[int, ...]] = field(default_factory=list)
    good: list[bool] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    widths: set[int] = field(default_factory=set)
    order: dict[str, None] = field(default_factory=dict)


class _Offload:
    """Offloads arguments; a tensor that several blocks get unchanged is stored once."""

    def __init__(self, folder: Path) -> None:
        self._file = OffloadedTensors(folder)
        self._known: dict[int, tuple[weakref.ref[Tensor], int, OffloadedArgument]] = {}

    def put(self, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        reference, version, place = self._known.get(id(value), (lambda: None, -1, None))
        if reference() is not value or version != value._version:
            place = OffloadedArgument(self._file, len(self._file))
            self._file.append(value.detach())
            self._known[id(value)] = (weakref.ref(value), value._version, place)
        return place


def record_inputs(
    plan: Plan, structure: ModelStructure, job: Job, blocks: tuple[BlockStructure, ...], step: Callable[[], object]
) -> dict[int, tuple[BlockStructure, Rows, OneByOne]]:
    """{index: (block, its rows, their calls)} of the given blocks; groups of a block are put into running order.

    Raises Unsupported for a block that the model does not call as a whole.
    """
    assert plan.calibration is not None
    dtype, folder = getattr(torch, plan.run_dtype), job.rows_path(0).parent
    records: dict[int, _Record] = {}
    try:
        with ExitStack() as stack:
            model = stack.enter_context(_whole_model(structure, dtype))
            offload, time = _Offload(folder), [0.0]
            options = {"return_dict": False} if "return_dict" in inspect.signature(model.forward).parameters else {}
            for block in blocks:
                file = stack.enter_context(job.rows_path(block.index).open("wb"))
                records[block.index] = _Record(file)
                for handle in _watch(model, block, records[block.index], offload, dtype, time):
                    stack.callback(handle.remove)
            for sample in plan.calibration.calls(folder):
                time[0] = time_of(sample["timestep"]) if "timestep" in sample else 0.0
                with torch.no_grad():
                    model(**{**sample, **options})
                step()
    except OSError as e:
        raise write_failure(folder, e) from e
    return {b.index: _finished(structure, b, records[b.index], job, dtype) for b in blocks}


@contextmanager
def _whole_model(structure: ModelStructure, dtype: torch.dtype) -> Iterator[nn.Module]:
    """The original model with all its weights."""
    load_outer(structure)
    for block in structure.blocks:
        load_block(structure, block, dtype)
    try:
        yield structure.model
    finally:
        release_outer(structure)


def _watch(
    model: nn.Module, block: BlockStructure, record: _Record, offload: _Offload, dtype: torch.dtype, time: list[float]
) -> Iterator[Any]:
    """Handles of hooks that record the calls of a block, and the order of its linears."""

    def entered(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        slot = _slot(args, kwargs)
        if slot is None:
            raise Unsupported(
                f"{block.path} is called without a tensor of hidden states of its own: use a method without calibration "
                "(rtn with a weight-only scheme)"
            )
        hidden: Tensor = args[slot] if isinstance(slot, int) else kwargs[slot]
        rest = tuple(None if i == slot else mapped(offload.put, a) for i, a in enumerate(args))
        named = {k: None if k == slot else mapped(offload.put, v) for k, v in kwargs.items()}
        record.calls.append(SlotCall(rest, named, slot=slot, dtype=hidden.dtype))
        record.leads.append(tuple(hidden.shape[:-1]))
        record.widths.add(hidden.shape[-1])
        record.good.append(bool(hidden.isfinite().all()))
        record.times.append(time[0])
        record.file.write(hidden.detach().to(dtype).contiguous().view(torch.uint8).numpy().reshape(-1).data)

    module = model.get_submodule(block.path)
    yield module.register_forward_pre_hook(entered, with_kwargs=True)
    for group in block.groups:
        yield module.get_submodule(group.hook).register_forward_pre_hook(_noting(record, group.hook))


def _noting(record: _Record, name: str) -> Callable[..., None]:
    return lambda *_: record.order.setdefault(name)


def _slot(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> int | str | None:
    """The place of the first floating-point tensor with three dimensions or more, else with two."""
    places: list[tuple[int | str, Any]] = [*enumerate(args), *kwargs.items()]
    tensors = [(place, v) for place, v in places if isinstance(v, Tensor) and v.is_floating_point() and v.dim() >= 2]
    return next((p for p, v in tensors if v.dim() >= 3), next((p for p, _ in tensors), None))


def _finished(
    structure: ModelStructure, block: BlockStructure, record: _Record, job: Job, dtype: torch.dtype
) -> tuple[BlockStructure, Rows, OneByOne]:
    where = structure.checkpoint.path
    if not record.calls:
        raise Unsupported(
            f"{where}: no calibration sample calls {block.path} as a whole, so its inputs cannot be recorded: skip it "
            "with a rule, or use a method without calibration (rtn with a weight-only scheme)"
        )
    if len(record.widths) > 1:
        raise Unsupported(
            f"{where}: {block.path} is called with tensors of several widths ({sorted(record.widths)}): use samples of one "
            "size, or a method without calibration (rtn with a weight-only scheme)"
        )
    order = {name: i for i, name in enumerate(record.order)}
    groups = tuple(sorted(block.groups, key=lambda g: order.get(g.hook, len(order))))
    rows = Rows(
        path=job.rows_path(block.index),
        count=len(record.calls),
        tokens=max(torch.Size(lead).numel() for lead in record.leads),
        hidden=record.widths.pop(),
        dtype=dtype,
        good=record.good,
        lead_shapes=tuple(record.leads),
        times=tuple(record.times),
    )
    return replace(block, groups=groups), rows, OneByOne(tuple(record.calls))


def with_originals(rows: Rows, original: Path) -> Rows:
    """The rows, with a copy of them as those of the original model, which they are."""
    shutil.copyfile(rows.path, original)
    return replace(rows, original=original)
