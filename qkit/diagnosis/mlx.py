"""MLX's layout: the formats of layers, and the config against the tensors."""

from __future__ import annotations

from dataclasses import replace

import torch

from qkit.diagnosis.expected import Expected
from qkit.diagnosis.findings import Findings
from qkit.diagnosis.layers import Layer
from qkit.diagnosis.opened import Opened
from qkit.files.safefile import read_tensor
from qkit.tensor.formats import FORMATS, Format
from qkit.tensor.layouts.mlx import AFFINE, BITS, keyed_setting

_CONFIG = "get the config of this file, or quantize again"
_WORD = 32  # bits


def set_formats(opened: Opened, findings: Findings) -> None:
    """The formats and shapes of all layers, after a check of their tensors against the config."""
    for layer in opened.layers.values():
        said = opened.quantization.get(layer.name)
        if said is False:
            findings.fault("config", layer.name, "it is quantized", "a plain weight, as the config says", _CONFIG, 8)
        mode, bits, group = keyed_setting(opened.quantization, layer.name)
        fmt = FORMATS.get(str(mode)) if mode != AFFINE else _integers(bits, group)
        if fmt is None:
            found = f"mode {mode} with {bits} bits and group_size {group}"
            findings.fault("config", layer.name, found, "a mode that MLX has", _CONFIG, 8)
            continue
        _check_layer(layer, fmt, findings)


def _integers(bits: object, group: object) -> Format | None:
    sound = type(group) is int and group > 0 and bits in BITS
    return replace(FORMATS[f"int{bits}_asym"], group=group) if sound and isinstance(group, int) else None


def _check_layer(layer: Layer, fmt: Format, findings: Findings) -> None:
    needed = ("weight", "scales", "biases") if fmt.kind == "int" else ("weight", "scales")
    missing = [leaf for leaf in needed if leaf not in layer.leaves]
    if missing:
        expected = ", ".join(needed)
        findings.fault(
            "lost tensors", layer.name, f"it has no {' and no '.join(missing)}", expected, "quantize again", 9
        )
        return
    codes, group = layer.leaves["weight"], fmt.group or 1
    columns = codes.shape[-1] * _WORD // fmt.bits if codes.shape else 0
    grid = [*codes.shape[:-1], columns // group]
    for leaf in needed[1:]:
        info = layer.leaves[leaf]
        if codes.dtype != "U32" or list(info.shape) != grid or columns % group:
            findings.fault(
                "config", layer.name, f"its weight is {codes.dtype} {list(codes.shape)} and its {leaf} are {list(info.shape)}",
                f"U32 words of {fmt.bits} bits and {leaf} {grid}, as the config says", _CONFIG, 8,
            )  # fmt: skip
            return
    layer.shape, layer.packing = (*codes.shape[:-1], columns), "mlx"
    layer.weights = replace(FORMATS[f"int{fmt.bits}"], group=group) if _is_symmetric(layer, fmt) else fmt


def _is_symmetric(layer: Layer, fmt: Format) -> bool:
    """Whether each bias is half the range of codes times its scale."""
    if fmt.kind != "int":
        return False
    scale, bias = (read_tensor(layer.leaves[leaf]).to(torch.float64) for leaf in ("scales", "biases"))
    return torch.equal(bias, -(1 << (fmt.bits - 1)) * scale)


def check_plain(opened: Opened, expected: Expected, findings: Findings) -> None:
    """Plain weights of layers that have an entry in the config: loaders look for their scales."""
    for name, said in opened.quantization.items():
        if isinstance(said, dict) and name not in opened.layers and f"{name}.weight" in opened.plain:
            findings.fault("config", name, "the weight is plain", "a quantized one, as the config says", _CONFIG, 8)
