"""One block of a run: it is read from the shards, transformed, and solved on calibration rows.

This code names no format, method or model: the tables of solvers and transforms declare what they need.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qkit.calibration.block_calls import Call, OneByOne
from qkit.calibration.block_runner import BlockRunner
from qkit.calibration.reading import Reading
from qkit.calibration.statistics import Rows, Stats, StatsRequest
from qkit.engine.entry import quantizing_hook
from qkit.engine.job import Job
from qkit.engine.learning import learn_block
from qkit.engine.parts import part_tensors
from qkit.engine.proof import unproved_groups
from qkit.engine.solving import LinearResult, solve_groups, uses_inputs
from qkit.families.blocks import BlockStructure, LinearGroup
from qkit.families.materialize import load_block
from qkit.families.structure import ModelStructure
from qkit.files.owned import temp_path
from qkit.planning.plan import Plan, has_static
from qkit.solvers.table import SOLVERS
from qkit.system.parallel import Workers
from qkit.system.progress import Progress
from qkit.tensor.activations import quantize_activations, static_scale
from qkit.tensor.input_transform import InputTransform
from qkit.tensor.qtensor import dequantize
from qkit.transforms.keys import scale_keys
from qkit.transforms.state import BlockState
from qkit.transforms.table import TRANSFORMS

# A need: for each block {linear: float32 [rows, tokens], what a token counts in its Hessian}.
LOSS_GRADIENTS = "loss_gradients"


@dataclass(frozen=True, kw_only=True)
class Run:
    """Context of a run, shared by all its steps.

    original_passes: {need: one value for each block of the language model}, from ``workflows.original_passes``
    """

    plan: Plan
    structure: ModelStructure
    job: Job
    pool: Workers
    progress: Progress
    original_passes: Mapping[str, Sequence[Any]] = field(default_factory=dict)

    def running_in(self, dtype: torch.dtype) -> Run:
        """The run, with blocks in the dtype of their rows, where that is wider than planned."""
        name = str(dtype).removeprefix("torch.")
        return self if self.plan.run_dtype == name else replace(self, plan=replace(self.plan, run_dtype=name))


@dataclass(frozen=True, kw_only=True)
class BlockStep:
    """One block of a run.

    place:  index of its part in the job
    last:   it is the last block of its sequence, so its outputs are not needed
    learns: learned rounding follows once its linears are solved
    tries:  several recipes are compared
    recorded: its rows come from runs of the whole original model
    """

    state: BlockState
    name: str
    place: int
    last: bool
    learns: bool
    tries: bool
    recorded: bool = False

    def part(self, results: list[LinearResult], plan: Plan) -> dict[str, Tensor]:
        "The tensors to commit, with weights as transforms left them where a later stage looks at these."
        return part_tensors(results, self.state, bool(plan.significant or plan.learning("e2e_steps")), plan.kept)


@dataclass(frozen=True)
class SolvedBlock:
    """Results of a block, whose module holds the quantized weights.

    handles: of the hooks that quantize activations; notes: further fields of the block's journal entry
    """

    results: list[LinearResult]
    handles: list[Any]
    notes: dict[str, Any]


def load_state(run: Run, block: BlockStructure, language: bool) -> BlockState:
    """The block as read, after transforms of stage 'load'. language: it belongs to the language model."""
    plan, structure = run.plan, run.structure
    dtype = getattr(torch, plan.run_dtype if plan.needs_rows else plan.dtype)
    state = BlockState(
        structure=structure, block=block, module=load_block(structure, block, dtype, device=plan.torch_device)
    )
    state.distort = plan.inputs == "distort"
    state.doubled = {x.name: p.residual for x in block.linears if (p := plan.linears.get(x.name))}
    if language:
        state.original_values = {need: values[block.index] for need, values in run.original_passes.items()}
        for transform in plan.transforms:
            if TRANSFORMS[transform].stage == "load":
                TRANSFORMS[transform].apply(state, plan.schemes, plan.seed)
        if plan.key_exponents is not None:
            scale_keys(state, plan.key_exponents[block.index])
    return state


def solve_block(run: Run, step: BlockStep, runner: BlockRunner, rows: Rows, call: Call | OneByOne) -> SolvedBlock:
    """Results of one recipe: transforms, solvers and learned rounding.

    rows: those of the runner, and held-out rows where several recipes are compared
    """
    plan, state, progress = run.plan, step.state, run.progress
    for transform in plan.transforms:
        if TRANSFORMS[transform].stage == "stats":
            if run.structure.is_discovered and run.structure.family.streams is None:
                state.unproved |= unproved_groups(state, rows, call)
            progress.start(f"{step.name}, {transform}", len(list(rows.pieces())))
            request = StatsRequest(hessian=False, ranges=True, expert_share=plan.recipe["expert_share"])
            state.stats = runner.capture(state.block.groups, request, progress.step, keep=False)
            TRANSFORMS[transform].apply(state, plan.schemes, plan.seed)
            state.write_back()
    original_weights = {x.name: state.weight(x).clone() for x in state.block.linears} if step.learns else {}
    results, handles = _solve_stages(run, step, runner)
    if not step.learns or not results:  # none: rules leave the whole block as it is
        return SolvedBlock(results, handles, {})
    runner.close()
    targets = run.job.rows_path(step.place + 1, original=True)
    seed = plan.seed + step.place
    learned, entry = learn_block(
        state, step.name, results, original_weights, runner.rows, targets, call, seed, run.pool, progress
    )
    return SolvedBlock(learned, handles, entry)


def _solve_stages(run: Run, step: BlockStep, runner: BlockRunner) -> tuple[list[LinearResult], list[Any]]:
    """Results of all linears, and handles of the hooks that quantize activations.

    Stages are solved in order: quantized weights are written to the module before the next stage captures its inputs.
    """
    plan, state, progress = run.plan, step.state, run.progress
    piece_count, results, handles = len(list(runner.rows.pieces())), [], []
    planned = [p for x in state.block.linears if (p := plan.linears.get(x.name))]
    needs_inputs = uses_inputs(planned, step.learns)
    for i, groups in enumerate(runner.stages):
        progress.start(f"{step.name}, layers {i + 1} of {len(runner.stages)}", 2 * piece_count)
        inputs = {g.key: state.inputs(g, p.rotation) for g in groups if (p := plan.linears.get(g.linears[0].name))}
        saved, stats = saved_inputs(run, step, runner.rows), dict[str, Stats]()
        if needs_inputs:
            request = _stats_request(plan, groups)
            readings = {g.key: _reading(plan, state, g, inputs[g.key], request) for g in groups if g.key in inputs}
            stats = runner.capture(groups, request, progress.step, True, readings, saved)
        by_linear = {x.name: inputs[g.key] for g in groups if g.key in inputs for x in g.linears}
        solved = solve_groups(state, plan, groups, stats, run.pool)
        for r in solved:
            r.linear.view(state.module).copy_(by_linear[r.plan.name].weight_back(dequantize(r.qtensor)))
        handles += quantize_inputs(state, solved)
        if needs_inputs:
            runner.solved(groups, progress.step)
        results += solved
    return results, handles


def quantize_inputs(state: BlockState, results: list[LinearResult]) -> list[Any]:
    """Handles of new hooks that quantize the inputs of linears; experts in a fused module have none."""
    group_of = {x.name: g for g in state.block.groups for x in g.linears}
    handles = []
    for r in results:
        if r.plan.activations is not None and r.linear.expert is None:
            module = state.module.get_submodule(r.linear.param.removesuffix(".weight"))
            inputs = state.inputs(group_of[r.plan.name], r.plan.rotation)
            handles.append(module.register_forward_pre_hook(quantizing_hook(r.plan.activations, r.static, inputs)))
    return handles


def _stats_request(plan: Plan, groups: tuple[LinearGroup, ...]) -> StatsRequest:
    planned = [p for g in groups for x in g.linears if (p := plan.linears.get(x.name))]
    hessian = any(SOLVERS[p.solver].needs_hessian or p.rank for p in planned)
    ranges = not hessian or any(map(has_static, planned))  # either tells the energy of every channel
    return StatsRequest(hessian, ranges, plan.recipe["expert_share"])


def _reading(
    plan: Plan, state: BlockState, group: LinearGroup, inputs: InputTransform, request: StatsRequest
) -> Reading:
    """What becomes of the inputs of a group before its layers are solved.

    Quantized inputs are for Hessians alone. A static scale is known only after all inputs were seen, so that of each piece of
    them stands for it (our choice).
    """
    planned = plan.linears[group.linears[0].name]
    dtypes = {p.drift_dtype(plan.run_dtype) for x in group.linears if (p := plan.linears.get(x.name))}

    def rounded(x: Tensor) -> Tensor:
        assert planned.activations is not None
        static = None
        if has_static(planned):
            peak = float(x.abs().amax()) if x.numel() else 0.0
            static = torch.tensor([static_scale(peak, planned.activations)], device=x.device)
        return quantize_activations(x, planned.activations, static, inputs.residual)

    return Reading(
        transform=inputs,
        divided=state.divided.get(group.key),
        rounding=rounded if request.hessian and planned.activations is not None else None,
        weights=_token_weights(group, state.original_values.get(LOSS_GRADIENTS, {}), plan.torch_device),
        drift=torch.bfloat16 if dtypes == {"bfloat16"} else torch.float32,
    )


def _token_weights(group: LinearGroup, by_linear: Mapping[str, Tensor], device: torch.device) -> Tensor | None:
    """float32 [rows, tokens], the mean of those of the group's layers; None where they have none."""
    weights = [by_linear[x.name] for x in group.linears if x.name in by_linear]
    return torch.stack(weights).mean(0).to(device) if weights else None


def saved_inputs(run: Run, step: BlockStep, rows: Rows) -> dict[str, Path]:
    """{submodule: file of its inputs in the original model}, where solvers need them.

    Experts have none, since other rows may reach them there; rows of different shapes are not saved.
    """
    if "original_inputs" not in run.plan.needs or rows.lead_shapes:
        return {}
    hooks = {g.hook for g in step.state.block.groups if g.expert is None and g.hook}
    return {h: temp_path(rows.path.parent, f"{h}.original") for h in sorted(hooks)}
