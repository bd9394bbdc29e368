"""Parameters that transformers does not save, since the model's class computes them (the sinusoids of Marian's positions)."""

from __future__ import annotations

from collections.abc import Container
from typing import Any

import torch
from torch import Tensor, nn


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
