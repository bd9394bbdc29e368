"""The model of a job before it was quantized."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from qkit.engine.job import Job
from qkit.families.structure import ModelStructure
from qkit.planning.plan import Plan, parts
from qkit.runtime import loading
from qkit.transforms.rotate import rotate_outer


def original_model(plan: Plan, structure: ModelStructure, job: Job) -> Any:
    """The model in float32 as the transforms of the job left it, before it was quantized."""
    model = loading.load(structure.checkpoint.path, dtype=torch.float32)
    if not plan.transforms and plan.key_exponents is None:
        return model
    if "rotate" in plan.transforms:
        rotated = rotate_outer(structure, plan.seed)
        for module in (structure.family.embeddings, structure.family.final_norm, structure.family.head):
            value = rotated[structure.stored_name(f"{module}.weight")].float()
            model.get_submodule(module).weight = nn.Parameter(value, requires_grad=False)
    for place, block in enumerate(parts(plan, structure)):
        module, part = model.get_submodule(block.path), job.part(place)
        weights = {f"{x.name}.weight": x for x in block.linears}
        for name, stored in block.stored:
            if stored in part and stored not in weights:
                module.get_parameter(name).data.copy_(job.read(part[stored]))
        for stored, linear in weights.items():
            found = part.get(f"{linear.name}:original", part.get(stored))
            if found is not None:
                linear.view(module).copy_(job.read(found))
    return model
