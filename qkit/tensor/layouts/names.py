"""Names of linears that engines load as one: a rule about the parts has to name the whole too."""

from __future__ import annotations

from collections.abc import Iterable

FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}


def with_fused(names: Iterable[str]) -> set[str]:
    """The names, and those under which vLLM looks for a rule where it fuses what all of them are about."""
    known = set(names)
    whole = set(known)
    for parent in {name.rpartition(".")[0] for name in known}:
        for fused, parts in FUSED.items():
            if all(f"{parent}.{part}" in known for part in parts):
                whole.add(f"{parent}.{fused}")
    return whole
