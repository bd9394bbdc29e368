"""What works where ``qkit convert`` refuses: the other layouts that hold a model, or the command that quantizes it anew."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from qkit.tensor.formats import SCHEMES, Format
from qkit.tensor.layouts import mlx
from qkit.tensor.layouts.gptq import BITS
from qkit.tensor.layouts.table import LAYOUTS, refusal

Shapes = Mapping[str, tuple[int, int]]
_GROUPS = (128, 64, 32)


def anew(folder: Path, export: str, shapes: Shapes, bits: int = 4) -> str:
    """The command that quantizes a model anew for a layout, with a scheme that it has for all linears of these shapes; without
    a layout of another tool where it has none.

    bits: of a weight of the source, which the scheme has too where the layout has it
    """
    kept = bits if bits in BITS else 8 if bits > 4 else 4
    schemes = {
        "gptq": (f"W{kept}A16",),
        "awq": ("W4A16",),
        "mlx": (f"W{bits if bits in mlx.BITS else kept}A16",),
        "modelopt": ("NVFP4A16", "FP8_DYNAMIC")[:: 1 if bits < 8 else -1],
    }
    for name in schemes.get(export, ()):
        weights, group = _fitted(SCHEMES[name].weights, shapes)
        pairs = dict.fromkeys(shapes, (weights, SCHEMES[name].activations))
        if refusal(LAYOUTS[export], pairs, shapes, []) is None:
            return _command(folder, name, f"{group} --export {export}")
    return _command(folder, "W4A16", "")


def _fitted(weights: Format, shapes: Shapes) -> tuple[Format, str]:
    """A format with groups that divide all linears, and the option that says so; one scale for a channel where none do."""
    if weights.kind != "int":
        return weights, ""
    group = next((g for g in _GROUPS if all(columns % g == 0 for _, columns in shapes.values())), None)
    option = "" if group == _GROUPS[0] else f" --group-size {group or -1}"
    return replace(weights, group=group, strategy="channel" if group is None else "group"), option


def _command(folder: Path, scheme: str, more: str) -> str:
    return f"qkit quantize --model {shlex.quote(str(folder))} --scheme {scheme.lower()}{more} --out OUT"
