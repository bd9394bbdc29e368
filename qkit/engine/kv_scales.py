"""The scales of a KV cache for engines (--kv fp8, fp8_head, nvfp4), measured on the quantized model.

After the blocks of a job are done, its calibration rows pass through them once more with the quantized weights, a block in
memory at a time. So the scales
include the changes that transforms and solvers made to keys and values. An interrupted pass starts again.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from qkit.calibration.block_calls import NotOneAfterAnother
from qkit.calibration.block_runner import BlockRunner
from qkit.engine.entry import embed, quantizing_hook
from qkit.engine.job import Job
from qkit.errors import Unsupported
from qkit.families.blocks import BlockStructure
from qkit.families.materialize import load_block, release
from qkit.families.structure import ModelStructure
from qkit.files.owned import temp_path
from qkit.kvcache.scales import RangeCache, option_name, tensor_names
from qkit.planning.plan import Plan, parts
from qkit.system.parallel import Workers
from qkit.system.progress import Progress
from qkit.tensor.qtensor import dequantize

STAGE = "cache"  # of the journal


def measure_scales(plan: Plan, structure: ModelStructure, job: Job, pool: Workers, progress: Progress) -> None:
    """Measure and commit the scales of every block, as the checkpoint has them. Does nothing when they exist or the plan has
    none.
    """
    if plan.kv is None or not plan.static_cache or job.stage(STAGE) is not None:
        return
    kind = str(plan.kv["kind"])
    cache = RangeCache()
    assert plan.calibration is not None
    progress.start("embed the calibration rows", plan.calibration.samples)
    path = temp_path(job.path / "rows", "cache 0")
    try:
        rows, calls = embed(
            replace(plan, device="cpu"), structure, job, structure.sequences[-1], path, progress.step, cache
        )
    except NotOneAfterAnother as e:
        raise cannot_measure(structure, kind) from e
    offset = len(parts(plan, structure)) - len(structure.blocks)
    tensors: dict[str, Tensor] = {}
    for block, names in zip(structure.blocks, tensor_names(structure, kind), strict=True):
        progress.start(f"KV cache, block {block.index + 1}/{len(structure.blocks)}", len(list(rows.pieces())))
        module, handles = _solved(plan, structure, job, block, offset + block.index)
        call: Any = cache.counting(calls[block.index], rows.kinds)
        runner = BlockRunner(module, block, rows, call, pool)
        try:
            leaving, _ = runner.leave(temp_path(job.path / "rows", f"cache {block.index + 1}"), progress.step)
        finally:
            for handle in handles:
                handle.remove()
        release(module)
        rows.path.unlink()
        rows = leaving
        tensors.update(zip(names, cache.scales(block.index, structure.dtype, kind), strict=True))
    rows.path.unlink()
    job.commit(job.finished, tensors, {"stage": STAGE, "linears": {}}, None)


def cannot_measure(structure: ModelStructure, kind: str) -> Unsupported:
    """The error for a model whose blocks do more than pass hidden states on."""
    name = option_name(kind)
    return Unsupported(
        f"{structure.checkpoint.path}: the scales of --kv {name} are measured block after block, and the blocks of "
        "this model cannot be run one after another: leave --kv out"
    )


def _solved(
    plan: Plan, structure: ModelStructure, job: Job, block: BlockStructure, index: int
) -> tuple[nn.Module, list[Any]]:
    """The block with the tensors of its part, and handles of the hooks that quantize activations."""
    part_infos, statics, inputs = job.part(index), {}, {}

    def read(stored: str) -> Tensor:
        name = stored.removesuffix(".weight")
        if stored in part_infos:
            return job.read(part_infos[stored])
        if name in plan.kept:
            return structure.checkpoint.read(stored)
        p = plan.linears[name]
        q, statics[name] = job.quantized(index, name, p.weights)
        inputs[name] = job.inputs(index, name, p.shape[1], p.rotation)
        return inputs[name].weight_back(dequantize(q))

    module = load_block(structure, block, getattr(torch, plan.run_dtype), read)
    handles = []
    for linear in block.linears:
        p = plan.linears.get(linear.name)
        if p is not None and p.activations is not None and linear.expert is None:
            owner = module.get_submodule(linear.param.removesuffix(".weight"))
            hook = quantizing_hook(p.activations, statics[linear.name], inputs[linear.name])
            handles.append(owner.register_forward_pre_hook(hook))
    return module, handles
