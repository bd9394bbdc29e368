"""The calibration rows as they enter a sequence of blocks: a tower, or the language model behind it.

What comes before the first block runs as transformers runs it, in the checkpoint's dtype, with everything that the job has
quantized so far in its place. Rows of a language model are filled up to one length; those of a tower keep their shapes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qkit.calibration.block_calls import Call, OneByOne, enter, merged, offloaded
from qkit.calibration.dataset import Calibration
from qkit.calibration.statistics import Rows
from qkit.diffusion.clock import time_of
from qkit.engine.job import Job
from qkit.errors import BadCalibration, write_failure
from qkit.families.blocks import LANGUAGE, BlockSequence
from qkit.families.materialize import load_outer, release_outer
from qkit.families.structure import ModelStructure
from qkit.files.offload import OffloadedTensors
from qkit.kvcache.argument import with_cache
from qkit.planning.plan import Plan, parts
from qkit.tensor.activations import quantize_activations
from qkit.tensor.formats import Format
from qkit.tensor.input_transform import PLAIN, InputTransform
from qkit.tensor.qtensor import dequantize
from qkit.transforms.rotate import rotate_outer

Calls = dict[int, Call | OneByOne]  # by the index of the block in its sequence


def embed(
    plan: Plan,
    structure: ModelStructure,
    job: Job,
    sequence: BlockSequence,
    path: Path,
    step: Callable[[], object],
    cache: Any = None,
    good: list[bool] | None = None,
) -> tuple[Rows, Calls]:
    """The rows that enter the sequence, written to ``path``, and how its blocks are called, with ``cache`` as the KV cache if
    there is one.

    good: rows that are in ``path`` already and have come further; of those only the calls are looked at. Raises
    BadCalibration where no row has a picture and the sequence looks at pictures.
    """
    assert plan.calibration is not None
    calibration, language = plan.calibration, sequence.name == LANGUAGE
    streams, through = structure.family.streams, sequence.name in {t.name for t in structure.towers}
    given = (
        {"return_dict": False} if streams else {**with_cache(structure.model, cache), "use_cache": cache is not None}
    )
    times = list[float]()

    def noted() -> Iterator[dict[str, Any]]:
        for sample in calibration.calls(path.parent):
            times.extend([time_of(sample["timestep"])] if streams else [])
            yield {**sample, **given}

    offload_file = OffloadedTensors(path.parent)
    count, length = calibration.tokens.shape
    dtype, seen, lead_shapes, width = (
        getattr(torch, plan.run_dtype),
        list[dict[int, Call]](),
        list[tuple[int, ...]](),
        0,
    )
    once = language and calibration.inputs is None  # rows of a text are all called alike
    try:
        with _before(plan, structure, job), path.open("ab" if good else "wb") as f:
            for hidden, calls in enter(structure.model, sequence.paths, noted(), through, streams):
                width = hidden.shape[-1]
                lead_shapes.append(tuple(hidden.shape[:-1]))
                made = calls if language else offloaded(calls, offload_file, dtype)
                seen = [*([] if once else seen), made]
                if good is None:
                    whole = hidden.to(dtype)
                    if language:
                        whole = nn.functional.pad(whole, (0, 0, 0, length - hidden.shape[1]))
                    f.write(whole.contiguous().view(torch.uint8).numpy().reshape(-1).data)
                elif once:
                    break
                step()
    except OSError as e:
        raise write_failure(path, e) from e
    if language:
        # Blocks of a float16 model run in float32: what would have overflowed is seen.
        largest = torch.finfo(torch.float16 if structure.dtype == torch.float16 else torch.float32).max
        rows = Rows(
            path=path,
            count=count,
            tokens=length,
            hidden=width,
            dtype=dtype,
            good=good or [True] * count,
            kinds=calibration.kinds,
            largest=largest,
        )
        return rows, {i: call.to(dtype) for i, call in _as_one(calibration, seen).items()}
    if not lead_shapes:
        raise BadCalibration(f"no calibration sample reaches the {sequence.name}: use image-text data, or skip it")
    most = max(torch.Size(lead).numel() for lead in lead_shapes)
    good = good or [True] * len(lead_shapes)
    rows = Rows(
        path=path,
        count=len(lead_shapes),
        tokens=most,
        hidden=width,
        dtype=dtype,
        good=good,
        kinds=None,
        lead_shapes=tuple(lead_shapes),
        times=tuple(times),
    )
    return rows, {i: OneByOne(tuple(calls[i] for calls in seen)) for i in range(len(sequence.blocks))}


def _as_one(calibration: Calibration, calls: list[dict[int, Call]]) -> dict[int, Call]:
    """How blocks of the language model are called with a batch of rows."""
    lengths = [x["input_ids"].shape[1] for x in calibration.inputs or ()]
    return merged(calls, lengths) if lengths else calls[0]


@contextmanager
def _before(plan: Plan, structure: ModelStructure, job: Job) -> Iterator[None]:
    """With the weights of everything outside the blocks of the language model; towers as the job has left them."""
    done = {s: i for i, b in list(enumerate(parts(plan, structure)))[: job.finished] for _, s in b.stored}
    statics, inputs = dict[str, Tensor | None](), dict[str, InputTransform]()

    def read(stored: str) -> Tensor:
        place, name = done.get(stored), stored.removesuffix(".weight")
        if place is None:
            return structure.checkpoint.read_finite(stored)
        part = job.part(place)
        if stored in part:
            return job.read(part[stored])
        p = plan.linears[name]
        q, statics[name] = job.quantized(place, name, p.weights)
        inputs[name] = job.inputs(place, name, p.shape[1], p.rotation)
        return inputs[name].weight_back(dequantize(q))

    load_outer(structure, read)
    if "rotate" in plan.transforms:
        table = structure.family.embeddings + ".weight"
        structure.model.get_parameter(table).data.copy_(
            rotate_outer(structure, plan.seed)[structure.stored_name(table)]
        )
    handles = []
    for block in (b for tower in structure.towers for b in tower.blocks):
        for linear in block.linears:
            p = plan.linears.get(linear.name)
            if linear.name in statics and p is not None and p.activations is not None:
                owner = structure.model.get_submodule(f"{block.path}.{linear.param.removesuffix('.weight')}")
                hook = quantizing(p.activations, statics[linear.name], inputs[linear.name])
                handles.append(owner.register_forward_pre_hook(hook))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        release_outer(structure)


def quantizing(
    fmt: Format, static: Tensor | None, inputs: InputTransform = PLAIN
) -> Callable[[nn.Module, tuple[Any, ...]], tuple[Any, ...]]:
    """A forward pre-hook of linears: their inputs in that activation format, behind a transform and back again. Gradients pass
    as if nothing were rounded."""

    def rounded(x: Tensor) -> Tensor:
        made = inputs.back(quantize_activations(inputs(x.detach()), fmt, static, inputs.residual))
        return x + (made - x).detach() if x.requires_grad else made

    return lambda _, args: (rounded(args[0]), *args[1:])
