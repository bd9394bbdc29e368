"""Rules for what can be packed: how channels of a head are grouped."""

from __future__ import annotations

from qkit.errors import UsageError
from qkit.kvcache.policy import CachePolicy


def channel_group(head_dim: int, limit: int) -> int:
    """Channels of a group: the largest divisor of head_dim that is a multiple of 8 and at most ``most``."""
    return max(n for n in range(8, min(head_dim, limit) + 1, 8) if head_dim % n == 0)


def check_head_dim(head_dim: int, policy: CachePolicy) -> None:
    """Raises UsageError for heads whose codes do not fill 16-bit words."""
    step = 16 if 3 in policy.widths or policy.kind == "nvfp" else 8
    if head_dim % step:
        raise UsageError(f"kv policy {policy.name}: heads of {head_dim} channels; expected a multiple of {step}")
