"""What norms are, and what they do, as runs of a copy on random values show."""

from __future__ import annotations

import copy
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

_WIDTH = 64  # on which a norm without a weight is tried
_FAILS = (RuntimeError, TypeError, ValueError, AttributeError)  # of norms that read more than one tensor


def is_norm(module: nn.Module) -> bool:
    """Whether a module normalizes and then scales every channel by a weight of its own."""
    weight = getattr(module, "weight", None)
    return "norm" in type(module).__name__.lower() and isinstance(weight, Tensor) and weight.dim() == 1


def has_no_weight(module: nn.Module) -> bool:
    """Whether a module is called a norm and has no weight at all."""
    called = "norm" in type(module).__name__.lower()
    return called and not any(True for _ in module.parameters()) and not any(True for _ in module.children())


def norm_offset(norm: nn.Module) -> float | None:
    """What a norm adds to its weight before it multiplies by it (0, or 1 in Gemma); 0 for one without a weight.

    None where it is neither: then dividing the weight does not divide the output.
    """
    tried, x, generator = _copy(norm)
    if getattr(tried, "weight", None) is None:
        return 0.0
    gain, bias = torch.rand(x.shape[-1], generator=generator, device="cpu"), getattr(tried, "bias", None)
    s = torch.rand(x.shape[-1], generator=generator, device="cpu") + 0.5
    with torch.no_grad(), suppress(*_FAILS):
        tried.weight.data = gain
        if bias is not None:
            bias.data.fill_(0.5)
        expected = tried(x) / s
        if bias is not None:
            bias.data = bias.data / s
        for offset in (0.0, 1.0):
            tried.weight.data = (gain + offset) / s - offset
            if torch.allclose(tried(x), expected, rtol=1e-4, atol=1e-5):
                return offset
    return None


def commutes_with_rotations(norm: nn.Module) -> bool:
    """Whether an orthogonal matrix passes through a norm whose weights are equal, as it does through RMSNorm."""
    tried, x, generator = _copy(norm)
    v = nn.functional.normalize(torch.randn(x.shape[-1], 1, generator=generator, device="cpu"), dim=0)

    def reflected(y: Tensor) -> Tensor:
        return y - 2 * (y @ v) @ v.T  # the product with an orthogonal matrix, I - 2 v v^T

    with torch.no_grad(), suppress(*_FAILS):
        for p in tried.parameters():
            p.fill_(0.5)
        return torch.allclose(tried(reflected(x)), reflected(tried(x)), rtol=1e-3, atol=1e-4)
    return False


def _copy(norm: nn.Module) -> tuple[Any, Tensor, torch.Generator]:
    """A copy with memory, in float32; inputs for it, float32 [4, width]; a source of more random numbers."""
    copied: Any = copy.deepcopy(norm)
    without_memory = any(t.is_meta for t in (*copied.parameters(), *copied.buffers()))
    tried = (copied.to_empty(device="cpu") if without_memory else copied).float()
    weight = getattr(tried, "weight", None)
    generator = torch.Generator("cpu").manual_seed(0)
    return (
        tried,
        torch.randn(4, _WIDTH if weight is None else len(weight), generator=generator, device="cpu"),
        generator,
    )
