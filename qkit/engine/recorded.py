"""Calibration rows of every block, recorded in runs of the whole original model.

Blocks of an undeclared diffusion model may hand their results on in any way (joined, split, summed, as skips of a U-Net), and
those of some language models do more than pass hidden states on: they run several times, or read keys and values that an
earlier block made. So no block is run after another. The model runs as its library runs it, and each block's own calls are its
rows; a block that is called several times in a run has that many rows. The errors of earlier blocks are not in these rows. The
whole model is in memory during these runs; where a language model does not fit, its blocks are read again in each run.
"""

from __future__ import annotations

import copy
import inspect
import shutil
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qkit.calibration.block_calls import Call, OffloadedArgument, OneByOne, mapped
from qkit.calibration.statistics import Rows
from qkit.diffusion.clock import time_of
from qkit.engine.block_step import Run
from qkit.engine.discovered_calls import DoesNotRun, call_options_of, runs_on_text, unlike_tokens, widen
from qkit.engine.forecast import whole_fits
from qkit.engine.job import Job
from qkit.engine.original_rows import ORIGINAL
from qkit.errors import Unsupported, write_failure
from qkit.families.blocks import BlockSequence, BlockStructure, LinearGroup
from qkit.families.materialize import load_block, load_outer, release, release_outer
from qkit.families.structure import ModelStructure
from qkit.families.text_arguments import text_arguments
from qkit.files.offload import OffloadedTensors
from qkit.kvcache.argument import is_cache, tensors_within
from qkit.planning.plan import Plan
from qkit.runtime.loading import load_checkpoint
from qkit.transforms.table import TRANSFORMS


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
    if isinstance(value, _CacheState):
        return copy.deepcopy(value.cache)
    return value.offload_file[value.index] if isinstance(value, OffloadedArgument) else value


class _CachedTensor(OffloadedArgument):
    """A tensor of a KV cache; a copy of the cache has the tensor itself."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        return self.offload_file[self.index]


@dataclass(frozen=True)
class _CacheState:
    """A KV cache as it was when a block was called: some models fill one in every run. Its tensors are offloaded."""

    cache: Any


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
    """What is recorded of one block. order: its linears, in the order of their first calls; samples: that of each call."""

    path: Path
    file: Any
    calls: list[Call] = field(default_factory=list)
    leads: list[tuple[int, ...]] = field(default_factory=list)
    good: list[bool] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    samples: list[int] = field(default_factory=list)
    widths: set[int] = field(default_factory=set)
    order: dict[str, None] = field(default_factory=dict)


class _Offload:
    """Offloads arguments; a tensor that several blocks get unchanged is stored once."""

    def __init__(self, folder: Path, device: torch.device) -> None:
        self._file = OffloadedTensors(folder, device)
        self._known: dict[int, tuple[weakref.ref[Tensor], int, int]] = {}

    def put(self, value: Any) -> Any:
        """What is kept of an argument, or of a value inside it."""
        if is_cache(value):
            return _CacheState(
                copy.deepcopy(value, {id(t): _CachedTensor(*self._place(t)) for t in tensors_within(value)})
            )
        return OffloadedArgument(*self._place(value)) if isinstance(value, Tensor) else value

    def _place(self, value: Tensor) -> tuple[OffloadedTensors, int]:
        """The file and the place there."""
        reference, version, place = self._known.get(id(value), (lambda: None, -1, -1))
        if reference() is not value or version != value._version:
            place = len(self._file)
            self._file.append(value.detach())
            self._known[id(value)] = (weakref.ref(value), value._version, place)
        return self._file, place


def recorded_blocks(
    run: Run, sequence: BlockSequence, first_part: int
) -> Iterator[tuple[BlockStructure, Rows | None, OneByOne | None]]:
    """Yield the remaining blocks of a sequence with their rows and calls; None for a block that does not run.

    first_part: index of the part of its first block
    """
    plan, job = run.plan, run.job
    assert plan.calibration is not None
    early = [t for t in plan.transforms if TRANSFORMS[t].stage == "load"]
    if early:
        raise Unsupported(
            f"{run.structure.checkpoint.path}: method {early[0]} rewrites all blocks before they run, and the inputs of these "
            "blocks have to be recorded in the original model, which has other values: use smoothquant or awq"
        )
    run.progress.start("record the inputs of all blocks", plan.calibration.samples)
    remaining = {first_part + b.index: b for b in sequence.blocks[job.finished - first_part :]}
    recorded = record_inputs(plan, run.structure, job, remaining, run.progress.step)
    for place, block in remaining.items():
        ordered, rows, calls = recorded.get(place, (block, None, None))
        if rows is not None and plan.needs & ORIGINAL:
            rows = with_originals(rows, job.rows_path(place, original=True))
        yield ordered, rows, calls


def record_inputs(
    plan: Plan, structure: ModelStructure, job: Job, blocks: Mapping[int, BlockStructure], step: Callable[[], object]
) -> dict[int, tuple[BlockStructure, Rows, OneByOne]]:
    """{place: (block, its rows, their calls)} of the given blocks that run; groups of a block are put into running order.

    blocks: by the indices of their parts in the job. Raises Unsupported for a block of a diffusion model that it does not call
    as a whole, and for a model that does not run.
    """
    dtype = getattr(torch, plan.run_dtype)
    model_runs = runs_on_text(structure) if structure.family.streams is None else nullcontext()
    try:
        with model_runs:
            records = _recorded(plan, structure, job, blocks, step, dtype)
    except DoesNotRun:
        if dtype == torch.float32:
            raise
        with runs_on_text(structure):  # some models mix float32 with what they are in
            records = _recorded(plan, structure, job, blocks, step, torch.float32)
        dtype = torch.float32
    ran = {i: b for i, b in blocks.items() if records[i].calls or structure.family.streams is not None}
    return {i: _finished(plan, structure, b, records[i], dtype) for i, b in ran.items()}


def _recorded(
    plan: Plan,
    structure: ModelStructure,
    job: Job,
    blocks: Mapping[int, BlockStructure],
    step: Callable[[], object],
    dtype: torch.dtype,
) -> dict[int, _Record]:
    """What is recorded of each block in runs of the model in ``dtype``."""
    assert plan.calibration is not None
    records: dict[int, _Record] = {}
    folder = job.rows_path(0).parent
    try:
        with ExitStack() as stack:
            model = stack.enter_context(_whole_model(structure, dtype))
            # A language model runs without its head.
            runs: Any = model if structure.family.streams else getattr(model, "base_model", model)
            offload, at = _Offload(folder, plan.torch_device), _At()
            options = _options(structure, model)
            for place, block in blocks.items():
                path = job.rows_path(place)
                records[place] = _Record(path, stack.enter_context(path.open("wb")))
                for handle in _watch(model, block, records[place], offload, dtype, at):
                    stack.callback(handle.remove)
            for at.sample, sample in enumerate(plan.calibration.calls(folder)):
                at.time = time_of(sample["timestep"]) if "timestep" in sample else 0.0
                with torch.no_grad():
                    runs(**text_arguments(runs, {**sample, **options}))
                step()
    except OSError as e:
        raise write_failure(folder, e) from e
    return records


def _options(structure: ModelStructure, model: nn.Module) -> dict[str, Any]:
    """Arguments of the model beside the sample."""
    if structure.family.streams is None:
        return call_options_of(structure, None)
    return {"return_dict": False} if "return_dict" in inspect.signature(model.forward).parameters else {}


@contextmanager
def _whole_model(structure: ModelStructure, dtype: torch.dtype) -> Iterator[nn.Module]:
    """The original model with all its weights; a language model that does not fit into memory has those of the block that
    runs alone.
    """
    language = structure.family.streams is None
    if language and whole_fits(structure, dtype.itemsize):
        yield load_checkpoint(structure.checkpoint, dtype)
        return
    handles = []
    load_outer(structure)
    if language and dtype != structure.dtype:
        widen(structure.model)
    for block in structure.blocks:
        if language:
            handles += _loading(structure, block, dtype)
        else:
            load_block(structure, block, dtype)
    try:
        yield structure.model
    finally:
        for handle in handles:
            handle.remove()
        release_outer(structure)


def _loading(structure: ModelStructure, block: BlockStructure, dtype: torch.dtype) -> list[Any]:
    """Handles of hooks that load a block when it is called, and release it after."""
    module = structure.model.get_submodule(block.path)

    def load(*_: Any) -> None:
        load_block(structure, block, dtype)

    def unload(*_: Any) -> None:
        release(module)

    return [module.register_forward_pre_hook(load, prepend=True), module.register_forward_hook(unload)]


@dataclass
class _At:
    """The sample that is run, and its timestep."""

    sample: int = 0
    time: float = 0.0


def _watch(
    model: nn.Module, block: BlockStructure, record: _Record, offload: _Offload, dtype: torch.dtype, at: _At
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
        record.times.append(at.time)
        record.samples.append(at.sample)
        record.file.write(hidden.detach().to(dtype).contiguous().view(torch.uint8).numpy().reshape(-1).data)

    module = model.get_submodule(block.path)
    yield module.register_forward_pre_hook(entered, with_kwargs=True)
    for group in _apart(block):
        yield module.get_submodule(group.hook).register_forward_pre_hook(_noting(record, group.hook))


def _apart(block: BlockStructure) -> list[LinearGroup]:
    """Groups that are solved one after another: all but experts."""
    return [g for g in block.groups if g.expert is None and g.hook]


def _noting(record: _Record, name: str) -> Callable[..., None]:
    return lambda *_: record.order.setdefault(name)


def _slot(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> int | str | None:
    """The place of the first floating-point tensor with three dimensions or more, else with two."""
    places: list[tuple[int | str, Any]] = [*enumerate(args), *kwargs.items()]
    tensors = [(place, v) for place, v in places if isinstance(v, Tensor) and v.is_floating_point() and v.dim() >= 2]
    return next((p for p, v in tensors if v.dim() >= 3), next((p for p, _ in tensors), None))


def _finished(
    plan: Plan, structure: ModelStructure, block: BlockStructure, record: _Record, dtype: torch.dtype
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
    apart = sorted(_apart(block), key=lambda g: order.get(g.hook, len(order)))
    groups = (*apart, *(g for g in block.groups if g not in apart))
    rows = Rows(
        path=record.path,
        count=len(record.calls),
        tokens=max(torch.Size(lead).numel() for lead in record.leads),
        hidden=record.widths.pop(),
        dtype=dtype,
        good=record.good,
        lead_shapes=tuple(record.leads),
        times=tuple(record.times) if structure.family.streams else (),
        kinds=_kinds(plan, structure, record),
        device=plan.torch_device,
    )
    return replace(block, groups=groups), rows, OneByOne(tuple(record.calls))


def _kinds(plan: Plan, structure: ModelStructure, record: _Record) -> Tensor | None:
    """The kinds of the tokens of all rows. Raises Unsupported where not all tokens count and rows have other entries."""
    calibration = plan.calibration
    kinds = None if calibration is None else calibration.row_kinds
    if calibration is None or kinds is None:
        return None
    if all(torch.Size(lead).numel() == kinds.shape[1] for lead in record.leads):
        return kinds[record.samples]
    if calibration.mask is None:
        return None
    raise unlike_tokens(structure)


def with_originals(rows: Rows, original: Path) -> Rows:
    """The rows, with a copy of them as those of the original model, which they are."""
    shutil.copyfile(rows.path, original)
    return replace(rows, original=original)
