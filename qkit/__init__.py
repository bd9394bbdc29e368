"""qkit: post-training quantization, from a full-precision checkpoint to a packed, proven and loadable one."""

from __future__ import annotations

__version__ = "0.1.0"
