"""Which modules and parameters of a block are matrix products, and why others are none."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from qkit.families.blocks import FusedExperts, Stack

ROUTER_REASON = "it routes tokens to experts: small, and an error changes the route"
TABLE_REASON = "it is a table, or a layer that is not linear"
CONVOLUTION_REASON = "it is a convolution"
SHARED_REASON = "several blocks share it"
UNKNOWN_REASON = "it is several matrices in one tensor, and its module has no interface of experts that qkit knows"
BIAS_REASON = "it is a bias: it is added"
OWN_PRODUCT_REASON = "its module is a linear with a forward of its own, which does more than multiply"
_SAMPLE_WIDTH = 1 << 26  # values of a weight up to which a module with a forward of its own is tried out
_ROUTERS = ("router", "gate", "gating", "shared_expert_gate", "wg")


def matrix_of(module: nn.Module) -> tuple[int, int, bool] | None:
    """(outputs, inputs, transposed) of a module that multiplies its input by a weight; None for another."""
    if isinstance(module, nn.Linear):
        return (module.out_features, module.in_features, False) if _is_plain(module) else None
    if type(module).__name__ == "Conv1D" and type(module).__module__ == "transformers.pytorch_utils":
        inputs, outputs = module.get_parameter("weight").shape
        return outputs, inputs, True
    return None


def _is_plain(module: nn.Linear) -> bool:
    if type(module).forward is nn.Linear.forward:
        return True
    if module.weight.numel() > _SAMPLE_WIDTH:
        return False
    kind: Any = type(module)
    return _multiplies(kind, module.out_features, module.in_features, module.bias is not None)


@cache
def _multiplies(kind: Any, outputs: int, inputs: int, bias: bool) -> bool:
    """Whether a subclass of nn.Linear returns what nn.Linear does, as a run on random values shows."""
    try:
        module = kind(inputs, outputs, bias=bias)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for p in module.parameters():
                p.copy_(torch.randn(p.shape, generator=generator))
            x = torch.randn(2, 3, inputs, generator=generator)
            found = module(x)
        expected = nn.functional.linear(x, module.weight, module.bias)
        return (
            isinstance(found, Tensor) and found.shape == expected.shape and torch.allclose(found, expected, atol=1e-4)
        )
    except (TypeError, ValueError, RuntimeError, AttributeError):  # built or called in a way of its own
        return False


def routes(name: str, block: nn.Module) -> bool:
    """Whether a module chooses among routed experts, or is a part of what does. name: of the module inside the block"""
    parts = name.split(".")
    around = [block.get_submodule(".".join(parts[: i + 1])) for i in range(len(parts))]
    if "router" in parts or any("router" in type(m).__name__.lower() for m in around):
        return True
    outputs = (matrix_of(around[-1]) or (0,))[0]
    fused = list(fused_experts(block))
    for i, part in enumerate(parts):
        beside = [x for x in fused if x.module.rpartition(".")[0] == ".".join(parts[:i])]
        # All inside a module that is called a gate and lies beside experts, or a matrix with an output for each of them.
        if part in _ROUTERS and beside and (i + 1 < len(parts) or any(outputs <= x.count for x in beside)):
            return True
    return False


def fused_experts(block: nn.Module) -> Iterator[FusedExperts]:
    """The modules of a block that have transformers' interface of routed experts.

    It is that of ``transformers.integrations.moe.use_experts_implementation``, whose decorator says how weights lie.
    """
    for name, module in block.named_modules():
        fused: Any = module
        if not all(hasattr(fused, a) for a in ("has_gate", "is_transposed", "is_concatenated", "down_proj")):
            continue
        first = "gate_up_proj" if fused.has_gate else "up_proj"
        down = fused.down_proj
        if isinstance(down, Tensor) and down.dim() == 3:
            yield FusedExperts(
                module=name,
                count=down.shape[0],
                first=first,
                down="down_proj",
                halves=bool(fused.has_gate and fused.is_concatenated),
                transposed=bool(fused.is_transposed),
            )


# Modules with stacked matrices that have not that interface: {class: {parameter: whether it is [count, in, out]}}.
_STACKS = {
    "Llama4TextExperts": {"gate_up_proj": True, "down_proj": True},
    "JetMoeParallelExperts": {"weight": False},
    "LongcatFlashExperts": {"gate_up_proj": False, "down_proj": False},
    "SwiGLUExperts": {"gate_up_proj": True, "down_proj": True},
    "Step3p7Experts": {"gate_up_proj": False, "down_proj": False},
    "InklingSharedExperts": {"gate_proj": False, "up_proj": False, "down_proj": False},
}


def stacks_of(block: nn.Module) -> Iterator[Stack]:
    """The stacked matrices of a block."""
    for name, module in block.named_modules():
        for leaf, transposed in _STACKS.get(type(module).__name__, {}).items():
            param = getattr(module, leaf)
            if param is not None:
                yield Stack(f"{name}.{leaf}", param.shape[0], transposed)


def reason_of(param: str, block: nn.Module) -> str:
    """Why a parameter or buffer of two or more dimensions is no matrix product. param: its name inside the block"""
    name, _, leaf = param.rpartition(".")
    owner = block.get_submodule(name)
    if isinstance(owner, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        return CONVOLUTION_REASON
    if name and routes(name, block):
        return ROUTER_REASON
    if "bias" in leaf:
        return BIAS_REASON
    shape = getattr(owner, leaf).shape
    if leaf != "weight" and len(shape) == 3 and shape[0] > 1:
        return UNKNOWN_REASON
    return OWN_PRODUCT_REASON if isinstance(owner, nn.Linear) else TABLE_REASON
