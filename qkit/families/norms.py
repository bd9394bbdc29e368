"""What a norm does to the values that it divides, as runs of a copy of it on random values show."""

from __future__ import annotations

import copy
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

_WIDTH = 64  # on which a norm without weights is tried


def normalizes(module: nn.Module) -> bool:
    """Whether a module is called a norm and has no weight at all."""
    called = "norm" in type(module).__name__.lower()
    return called and not any(True for _ in module.parameters()) and not any(True for _ in module.children())


def offset_of(norm: nn.Module) -> float | None:
    """What a norm adds to its weight, None where it does not commute with orthogonal matrices if all weights are equal."""
    tried: Any = copy.deepcopy(norm).to_empty(device="cpu").float()
    weight = getattr(tried, "weight", None)
    generator = torch.Generator("cpu").manual_seed(0)
    x = torch.randn(3, _WIDTH if weight is None else len(weight), generator=generator, device="cpu")
    v = nn.functional.normalize(torch.randn(x.shape[-1], 1, generator=generator, device="cpu"), dim=0)
    outputs = []
    with torch.no_grad(), suppress(RuntimeError, TypeError, ValueError, AttributeError):
        for value in (0.0, 1.0):
            for name, p in tried.named_parameters():
                p.fill_(value if name == "weight" else 0.5)
            outputs.append(tried(x))
            if not torch.allclose(tried(_reflected(x, v)), _reflected(outputs[-1], v), rtol=1e-3, atol=1e-4):
                return None
    if len(outputs) < 2:  # it reads more than one tensor
        return None
    if weight is None:
        return 0.0
    zero, one = (float(y.norm()) for y in outputs)
    return next((o for o in (0.0, 1.0) if one > 0 and abs(zero - o / (o + 1) * one) < 1e-3 * one), None)


def _reflected(x: Tensor, v: Tensor) -> Tensor:
    """The product with an orthogonal matrix, I - 2 v v^T."""
    return x - 2 * (x @ v) @ v.T
