"""Tiny configs of the transformers and U-Nets of diffusers, and arguments for a call of each.

A case is (settings of the class,
arguments of a call). Arguments are made when they are asked for: a tuple of numbers is a tensor
of random values of that shape; ``ids`` are whole numbers, ``ones`` ones; everything else is given as it is. Widths are 64 where
the class allows, so that groups of 32 weights are whole; two layers, or one of each kind.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Ids:
    """Whole numbers from 0 up to ``below``."""

    below: int
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Ones:
    """A tensor of ones. kind: its dtype."""

    shape: tuple[int, ...]
    kind: torch.dtype = torch.float32


def arguments(spec: Any, seed: int = 0) -> Any:
    """The arguments of a call that a case describes; another seed gives other values."""
    generator = torch.Generator().manual_seed(seed)

    def made(value: Any) -> Any:
        if isinstance(value, Ids):
            return torch.randint(value.below, value.shape, generator=generator)
        if isinstance(value, Ones):
            return torch.ones(value.shape, dtype=value.kind)
        if isinstance(value, dict):
            return {k: made(v) for k, v in value.items()}
        if isinstance(value, list):
            return [made(v) for v in value]
        if isinstance(value, tuple) and value and all(type(n) is int for n in value):
            return torch.randn(value, generator=generator)
        return value() if callable(value) else value

    return made(spec)


def time() -> Tensor:
    return torch.tensor([500.0])


def step() -> Tensor:
    return torch.tensor([500])


def noise() -> Tensor:
    return torch.tensor([0.5])


def grid() -> Tensor:
    """Positions of 4 x 4 patches, [16, 3]."""
    return torch.tensor([[0.0, i, j] for i in range(4) for j in range(4)])


def zeros() -> Tensor:
    """Positions of 8 words, [8, 3]."""
    return torch.zeros(8, 3)


HEADS = {"num_attention_heads": 2, "attention_head_dim": 32}
FOUR = {"in_channels": 4, "out_channels": 4}
BOTH = {"num_layers": 1, "num_single_layers": 1}
FLUX = {**HEADS, **BOTH, "in_channels": 16, "joint_attention_dim": 32, "axes_dims_rope": (8, 12, 12)}
FLUX_CALL = {
    "hidden_states": (1, 16, 16), "encoder_hidden_states": (1, 8, 32), "img_ids": grid, "txt_ids": zeros, "timestep": noise,
}  # fmt: skip
PICTURE = {"hidden_states": (1, 4, 8, 8), "encoder_hidden_states": (1, 7, 32)}
VIDEO = {"hidden_states": (1, 4, 2, 8, 8), "encoder_hidden_states": (1, 7, 32)}
WAN = {**HEADS, **FOUR, "text_dim": 32, "freq_dim": 32, "ffn_dim": 128, "num_layers": 2, "rope_max_seq_len": 32}
SIZES = {"original_size": Ids(8, (1, 2)), "target_size": Ids(8, (1, 2)), "crop_coords": Ids(8, (1, 2))}
SANA = {
    **HEADS, **FOUR, "num_layers": 2, "num_cross_attention_heads": 2, "cross_attention_head_dim": 32, "cross_attention_dim": 64,
    "caption_channels": 32,
}  # fmt: skip
HUNYUAN = {
    **HEADS, **FOUR, "num_refiner_layers": 1, "text_embed_dim": 32, "mlp_ratio": 2.0, "rope_axes_dim": (8, 12, 12),
}  # fmt: skip
QWEN = {
    **HEADS,
    "in_channels": 16,
    "out_channels": 4,
    "num_layers": 2,
    "joint_attention_dim": 32,
    "axes_dims_rope": (8, 12, 12),
}
QWEN_CALL = {
    "hidden_states": (1, 16, 16), "encoder_hidden_states": (1, 8, 32), "timestep": noise, "img_shapes": lambda: [(1, 4, 4)],
    "encoder_hidden_states_mask": Ones((1, 8), torch.long),
}  # fmt: skip
LUMINA = {
    "sample_size": 16, "hidden_size": 64, "num_layers": 2, "num_attention_heads": 2, "num_kv_heads": 1, "multiple_of": 32,
}  # fmt: skip
