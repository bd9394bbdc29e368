"""Machines that ``qkit recommend --device`` knows by name."""

from __future__ import annotations

from dataclasses import dataclass

from qkit.errors import UsageError

CPU = "cpu"


@dataclass(frozen=True)
class Device:
    """platform: the kind of GPU as vLLM names it, or "cpu"; memory: bytes, by its maker; None: that of this machine"""

    name: str
    platform: str
    memory: int | None


_GB = 10**9
DEVICES = {
    d.name: d
    for d in (
        Device(CPU, "cpu", None),
        Device("t4", "sm75", 16 * _GB),
        Device("a100", "sm80", 80 * _GB),
        Device("rtx3090", "sm86", 24 * _GB),
        Device("l4", "sm89", 24 * _GB),
        Device("l40s", "sm89", 48 * _GB),
        Device("rtx4090", "sm89", 24 * _GB),
        Device("h100", "sm90", 80 * _GB),
        Device("h200", "sm90", 141 * _GB),
        Device("b200", "sm100", 180 * _GB),
        Device("rtx5090", "sm120", 32 * _GB),
    )
}


def find_device(name: str) -> Device:
    """The device of a name. Raises UsageError for one that is not known."""
    found = DEVICES.get(name.lower())
    if found is None:
        raise UsageError(f"--device {name}: expected one of {', '.join(DEVICES)}")
    return found
