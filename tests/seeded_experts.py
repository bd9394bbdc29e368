"""Defects of experts that are stored one by one: see ``seeded_files``."""

import json
from pathlib import Path

from seeded_files import Edit, Seed, both, config, plain, put, tensors


def expert_seeds(original: Path, layer: str, leaves: tuple[str, str, str]) -> list[Seed]:
    """Experts stored one by one. layer: their module; leaves: of gate, down and up"""
    gate, down, _ = leaves
    return [
        Seed(
            "an expert is plain",
            both(
                plain(f"{layer}.1.{down}", original),
                config(lambda c: c["quantization_config"]["ignore"].append(f"{layer}.1.{down}")),
            ),
            ("experts",),
            f"{layer}.1",
        ),
        Seed(
            "an expert is lost",
            tensors(lambda t: [t.pop(n) for n in [*t] if n.startswith(f"{layer}.2.")]),
            ("experts", "lost tensors"),
            f"{layer}",
        ),
        Seed(
            "a matrix of an expert is lost",
            tensors(lambda t: [t.pop(n) for n in [*t] if n.startswith(f"{layer}.0.{gate}.")]),
            ("experts", "lost tensors"),
            f"{layer}",
        ),
        Seed(
            "more experts in the config",
            config(lambda c: c.update({k: c[k] + 1 for k in ("num_experts", "num_local_experts") if k in c})),
            ("experts", "shapes"),
            "",
        ),
        Seed("experts in two group sizes", coarser(f"{layer}.1.{down}"), ("experts",), f"{layer}.1.{down}"),
    ]


def coarser(name: str) -> Edit:
    """A linear in groups twice as large, with a group of config_groups that says so."""

    def say(found: dict) -> None:
        groups = found["quantization_config"]["config_groups"]
        group = json.loads(json.dumps(groups["group_0"]))
        group["targets"] = [name]
        group["weights"]["group_size"] *= 2
        groups["group_1"] = group

    return both(config(say), put(f"{name}.weight_scale", lambda t: t[:, ::2]))
