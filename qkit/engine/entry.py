"""Calibration rows that enter a sequence of blocks: a tower, or the language model after it.

Modules before the first block run as in transformers, in the checkpoint's dtype, with the weights that the job has quantized so
far. Rows of a language model are padded to one length; those of a tower keep their shapes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qkit.calibration.block_calls import Call, NotOneAfterAnother, OneByOne, Passing, enter, merged, offloaded
from qkit.calibration.block_trial import ADVICE
from qkit.calibration.dataset import Calibration
from qkit.calibration.statistics import Rows
from qkit.diffusion.clock import time_of
from qkit.engine.discovered_calls import call_options_of, learn_calls, unlike_tokens
from qkit.engine.job import Job
from qkit.errors import BadCalibration, write_failure
from qkit.families.blocks import LANGUAGE, BlockSequence
from qkit.families.materialize import load_outer, release_outer
from qkit.families.structure import ModelStructure
from qkit.files.offload import OffloadedTensors
from qkit.planning.plan import Plan, parts
from qkit.tensor.activations import quantize_activations
from qkit.tensor.formats import Format
from qkit.tensor.input_transform import PLAIN, InputTransform
from qkit.tensor.qtensor import dequantize
from qkit.transforms.rotate import rotate_outer

BlockCalls = dict[int, Call | OneByOne]  # by the index of the block in its sequence


def embed(
    plan: Plan,
    structure: ModelStructure,
    job: Job,
    sequence: BlockSequence,
    path: Path,
    step: Callable[[], object],
    cache: Any = None,
    good: list[bool] | None = None,
    outer: torch.dtype | None = None,
) -> tuple[Rows, BlockCalls]:
    """Rows that enter the sequence, written to ``path``, and the calls of its blocks.

    cache: the KV cache of the calls, if there is one
    good:  state of rows that ``path`` holds already (of a later block); then only calls are recorded
    outer: dtype of what is before the blocks, and so of positions; None for the checkpoint's
    Raises BadCalibration where the sequence processes images and no row has one.
    """
    assert plan.calibration is not None
    if structure.is_recorded(sequence):
        raise NotOneAfterAnother(
            f"{structure.checkpoint.path}: the blocks of the {sequence.name} part cannot be run one after another: {ADVICE}"
        )
    calibration, language = plan.calibration, sequence.name == LANGUAGE
    streams, through = structure.family.streams, sequence.name in {t.name for t in structure.towers}
    call_options = {"return_dict": False} if streams else call_options_of(structure, cache)
    times = list[float]()

    def timed_samples() -> Iterator[dict[str, Any]]:
        for sample in calibration.calls(path.parent):
            times.extend([time_of(sample["timestep"])] if streams else [])
            yield {**sample, **call_options}

    device = plan.torch_device
    offload_file = OffloadedTensors(path.parent, device)
    count, length = calibration.tokens.shape
    dtype, row_calls, lead_shapes, width = (
        getattr(torch, plan.run_dtype),
        list[dict[int, Call]](),
        list[tuple[int, ...]](),
        0,
    )
    passing: dict[int, Passing] | None = None
    together = language and not streams  # rows make one tensor, and are run in batches
    once = together and calibration.inputs is None  # rows of a text are all called alike
    batch_calls: dict[int, Call] | None = None
    try:
        with _loaded_outer(plan, structure, job, outer), path.open("ab" if good else "wb") as f:
            if together and structure.is_discovered:
                learned = learn_calls(structure, sequence, calibration, call_options)
                passing, batch_calls = learned.passing, learned.calls
                together = once = batch_calls is not None
                dtype = torch.float32 if learned.widened else dtype
            for hidden, calls in enter(structure.model, sequence.paths, timed_samples(), through, streams, passing):
                width = hidden.shape[-1]
                lead_shapes.append(tuple(hidden.shape[:-1]))
                stored_calls = calls if together else offloaded(calls, offload_file, dtype)
                row_calls = [*([] if once else row_calls), stored_calls]
                if good is None:
                    padded = hidden.to(dtype)
                    if together:
                        padded = nn.functional.pad(padded, (0, 0, 0, length - hidden.shape[1]))
                    f.write(padded.contiguous().view(torch.uint8).numpy().reshape(-1).data)
                elif once:
                    break
                step()
    except OSError as e:
        raise write_failure(path, e) from e
    if together:
        # Blocks of a float16 model run in float32: values that float16 cannot hold are counted.
        largest = torch.finfo(torch.float16 if structure.dtype == torch.float16 else torch.float32).max
        rows = Rows(
            path=path,
            count=count,
            tokens=length,
            hidden=width,
            dtype=dtype,
            good=good or [True] * count,
            kinds=calibration.row_kinds,
            device=device,
            largest=largest,
        )
        language_calls = batch_calls or _as_one(calibration, row_calls)
        return rows, {i: call.to(dtype, device) for i, call in language_calls.items()}
    if not lead_shapes:
        raise BadCalibration(f"no calibration sample reaches the {sequence.name}: use image-text data, or skip it")
    longest = max(torch.Size(lead).numel() for lead in lead_shapes)
    kinds = calibration.row_kinds if language and not streams else None
    if kinds is not None and any(torch.Size(lead).numel() != length for lead in lead_shapes):
        raise unlike_tokens(structure)
    good = good or [True] * len(lead_shapes)
    rows = Rows(
        path=path,
        count=len(lead_shapes),
        tokens=longest,
        hidden=width,
        dtype=dtype,
        good=good,
        kinds=kinds,
        lead_shapes=tuple(lead_shapes),
        times=tuple(times),
        device=device,
    )
    return rows, {i: OneByOne(tuple(calls[i] for calls in row_calls)) for i in row_calls[0]}


def _as_one(calibration: Calibration, calls: list[dict[int, Call]]) -> dict[int, Call]:
    """Calls of the language model's blocks for a batch of rows."""
    lengths = [x["input_ids"].shape[1] for x in calibration.inputs or ()]
    return merged(calls, lengths) if lengths else calls[0]


@contextmanager
def _loaded_outer(plan: Plan, structure: ModelStructure, job: Job, dtype: torch.dtype | None = None) -> Iterator[None]:
    """Load all weights outside the blocks of the language model, with towers as the job quantized them, and release
    them after.
    """
    part_of_tensor = {s: i for i, b in list(enumerate(parts(plan, structure)))[: job.finished] for _, s in b.stored}
    statics, inputs = dict[str, Tensor | None](), dict[str, InputTransform]()

    def read(stored: str) -> Tensor:
        index, name = part_of_tensor.get(stored), stored.removesuffix(".weight")
        if index is None:
            return rotated[stored] if stored in rotated else structure.checkpoint.read_finite(stored)
        part = job.part(index)
        if stored in part:
            return job.read(part[stored])
        p = plan.linears.get(name)
        if name in plan.kept or p is None:  # of an expert's matrix the part has the whole tensor
            return structure.checkpoint.read(stored)
        q, statics[name] = job.quantized(index, name, p.weights)
        inputs[name] = job.inputs(index, name, p.shape[1], p.rotation)
        return inputs[name].weight_back(dequantize(q))

    table = structure.stored_name(f"{structure.family.embeddings}.weight")
    rotated = {table: rotate_outer(structure, plan.seed)[table]} if "rotate" in plan.transforms else {}
    load_outer(structure, read, dtype)
    handles = []
    for block in (b for tower in structure.towers for b in tower.blocks):
        for linear in block.linears:
            p = plan.linears.get(linear.name)
            if linear.name in statics and p is not None and p.activations is not None:
                owner = structure.model.get_submodule(f"{block.path}.{linear.param.removesuffix('.weight')}")
                hook = quantizing_hook(p.activations, statics[linear.name], inputs[linear.name])
                handles.append(owner.register_forward_pre_hook(hook))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        release_outer(structure)


def quantizing_hook(
    fmt: Format, static: Tensor | None, inputs: InputTransform = PLAIN
) -> Callable[[nn.Module, tuple[Any, ...]], tuple[Any, ...]]:
    """A forward pre-hook that quantizes the inputs of a linear, in the transformed basis. Gradients pass straight through."""

    def rounded(x: Tensor) -> Tensor:
        quantized = inputs.back(quantize_activations(inputs(x.detach()), fmt, static, inputs.residual))
        return x + (quantized - x).detach() if x.requires_grad else quantized

    return lambda _, args: (rounded(args[0]), *args[1:])
