"""Parameters and buffers that no checkpoint has, since the model computes them (the sinusoids of Marian's positions)."""

from __future__ import annotations

from collections.abc import Container
from typing import Any

import torch
from torch import Tensor, nn

from qkit.families.block_builder import persistent_buffers


def unsaved_parameters(model: nn.Module, stored: Container[str]) -> dict[str, Tensor]:
    """{parameter: value} of those that the class says are not saved and the file does not have, as its initializer computes
    them. One that it draws at random is left out, since nothing tells its value.

    stored: names of the tensors in the file
    """
    owner: Any = model
    names = [n for n in getattr(owner, "_keys_to_ignore_on_save", None) or () if n not in stored]
    parameters = dict(model.named_parameters())
    values = {}
    for name in names:
        if name in parameters and hasattr(owner, "_init_weights"):
            first, second = (_initialized(owner, name, seed) for seed in range(2))
            if torch.equal(first, second):
                values[name] = first
    return values


def _initialized(model: Any, name: str, seed: int) -> Tensor:
    """The value that the model's initializer gives a parameter; the parameter itself stays as it is."""
    module = model.get_submodule(name.rpartition(".")[0])
    kept = dict(module.named_parameters(recurse=False))
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            for n, p in kept.items():
                module.register_parameter(n, nn.Parameter(torch.zeros_like(p, device="cpu"), requires_grad=False))
            model._init_weights(module)
        value: Tensor = getattr(module, name.rpartition(".")[2]).data.clone()
        return value
    finally:
        for n, p in kept.items():
            module.register_parameter(n, p)


def computed_buffers(model: nn.Module) -> dict[str, Tensor]:
    """{name: value} of buffers that are not stored, as the initializer of the model that has them computes them."""
    buffers = {n: b for n, b in model.named_buffers() if n not in {s for s, _ in persistent_buffers(model)}}
    if not any(b.is_meta for b in buffers.values()):
        return {n: b.clone() for n, b in buffers.items()}
    owners = {n.rpartition(".")[0] for n in buffers}
    models: dict[str, Any] = {
        n: m for n, m in model.named_modules() if hasattr(m, "_init_weights") and hasattr(m, "base_model_prefix")
    }
    for module in model.modules():
        for name in module._non_persistent_buffers_set:
            buffer = module._buffers[name]
            if buffer is not None and buffer.is_meta:
                module._buffers[name] = torch.zeros_like(buffer, device="cpu")
    for name, module in model.named_modules():
        if name in owners or name in models:
            inside = max((n for n in models if not n or name == n or name.startswith(n + ".")), key=len)
            models[inside]._init_weights(module)
    return {n: b.clone() for n, b in model.named_buffers() if n in buffers}
