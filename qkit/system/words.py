"""Numbers as text for people."""

from __future__ import annotations


def megabytes(n: float) -> str:
    """A number of bytes as text, in MB (10^6 bytes), or in GB from 1 GB on."""
    return f"{n / 1e9:.2f} GB" if n >= 1e9 else f"{n / 1e6:.2f} MB"


def exact_megabytes(n: float) -> str:
    """A number of bytes as text, in MB and exact to the byte, so that a value just above a limit looks different."""
    return f"{n / 1e6:.6f}".rstrip("0").rstrip(".") + " MB"


def times(ratio: float) -> str:
    """The ratio in words, '3.2 times', '1,400 times': two digits, since operations are not seconds."""
    return f"{float(f'{ratio:.2g}'):,g} times"


def duration(seconds: float) -> str:
    """A time in words, to about two digits: '40 s', '12 min', '3.5 hours'."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 90 * 60 else f"{seconds / 3600:.2g} hours"
