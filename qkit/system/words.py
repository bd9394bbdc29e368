"""How numbers are said to people."""

from __future__ import annotations


def megabytes(n: float) -> str:
    """10^6 bytes, or 10^9 from 1 GB up."""
    return f"{n / 1e9:.2f} GB" if n >= 1e9 else f"{n / 1e6:.2f} MB"


def exact_megabytes(n: float) -> str:
    """10^6 bytes, to the byte: a limit and what misses it by little are not to look alike."""
    return f"{n / 1e6:.6f}".rstrip("0").rstrip(".") + " MB"
