"""The original model of a job, with its transforms but without quantization."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from qkit.engine.job import Job
from qkit.families.structure import ModelStructure
from qkit.planning.plan import Plan, parts
from qkit.runtime import loading
from qkit.transforms.rotate import rotated_parameters


def original_model(plan: Plan, structure: ModelStructure, job: Job) -> Any:
    """The transformers model in float32, with the job's transforms applied and nothing quantized."""
    model = loading.load_checkpoint(structure.checkpoint, torch.float32)
    if not plan.transforms and plan.key_exponents is None:
        return model
    if "rotate" in plan.transforms:
        for name, value in rotated_parameters(structure, plan.seed).items():
            module = model.get_submodule(name.rpartition(".")[0])
            module.weight = nn.Parameter(value.float(), requires_grad=False)
    for index, block in enumerate(parts(plan, structure)):
        module, part_infos = model.get_submodule(block.path), job.part(index)
        weights = {f"{x.name}.weight": x for x in block.linears}
        for name, stored in block.stored:
            if stored in part_infos and stored not in weights:
                module.get_parameter(name).data.copy_(job.read(part_infos[stored]))
        for stored, linear in weights.items():
            info = part_infos.get(f"{linear.name}:original", part_infos.get(stored))
            if info is not None:
                linear.view(module).copy_(job.read(info))
    return model
