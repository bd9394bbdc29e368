"""FP8 in blocks, MXFP4 of gpt-oss and ModelOpt: the formats of layers, and the config against the tensors."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from qkit.diagnosis.expected import Expected, weight_names
from qkit.diagnosis.findings import Findings
from qkit.diagnosis.layers import Layer, count
from qkit.diagnosis.opened import Opened
from qkit.diagnosis.words import in_quantized_stack, names_layer, not_converted
from qkit.tensor.formats import Format

_CONFIG = "get the config of this file, or quantize again"
_MODELOPT = "hf_quant_config.json"
_PLAIN_ALWAYS = ("lm_head", "gate", "router", "shared_expert_gate", "embed_tokens", "wte", "weights_proj")


def set_fp8(opened: Opened, findings: Findings) -> None:
    """FP8 with a scale for each block, channel or tensor (DeepSeek, Qwen3-FP8)."""
    asked = opened.quantization.get("weight_block_size")
    block = (
        asked
        if isinstance(asked, list) and len(asked) == 2 and all(isinstance(n, int) and n > 0 for n in asked)
        else None
    )
    for layer in opened.layers.values():
        codes, scale = layer.codes, layer.scale
        if codes is None or scale is None or len(codes.shape) < 2:
            lost = "weight" if codes is None else "scale"
            findings.fault(
                "lost tensors", layer.name, f"it has no {lost}", "a weight and its scale", "quantize again", 9
            )
            continue
        if not codes.dtype.startswith("F8_") and codes.dtype != "I8":
            findings.fault(
                "config", layer.name, f"its weight is {codes.dtype}, beside a scale", "F8_E4M3",
                "remove the scale, or quantize again: engines multiply the plain weight by it", 8,
            )  # fmt: skip
            continue
        width = codes.shape[-1] * (2 if codes.dtype == "I8" else 1)
        layer.shape = (*codes.shape[:-1], width)
        _check_grid(layer, block, findings)


def _check_grid(layer: Layer, block: list[int] | None, findings: Findings) -> None:
    scale, shape = layer.scale, layer.shape
    assert scale is not None and shape is not None
    grid = scale.shape[-2:] if len(scale.shape) > 1 else (*scale.shape, 1)
    wanted = (-(-shape[-2] // block[0]), -(-shape[-1] // block[1])) if block else None
    if count(scale) == 1 and math.prod(shape[:-2]) == 1:
        layer.weights = Format(name="fp8", kind="fp8", bits=8, strategy="tensor")
    elif wanted is not None and tuple(grid) == wanted:
        layer.weights = Format(
            name="fp8_block", kind="fp8", bits=8, strategy="block", block=(block[0], block[1]) if block else None
        )
    elif tuple(grid) == (shape[-2], 1):
        layer.weights = Format(name="fp8_channel", kind="fp8", bits=8, strategy="channel")
    elif block is None and len(grid) == 2 and all(grid) and shape[-2] % grid[0] == 0 and shape[-1] % grid[1] == 0:
        layer.weights = Format(
            name="fp8_block", kind="fp8", bits=8, strategy="block", block=(shape[-2] // grid[0], shape[-1] // grid[1])
        )
    else:
        expected = (
            f"{list(wanted)}: config.json says blocks of {block[0]}x{block[1]}"
            if wanted and block
            else "[1], or a grid"
        )
        findings.fault(
            "config", layer.name, f"its scales are {list(scale.shape)} for a weight {list(shape)}", expected, _CONFIG, 8
        )
    layer.packing = "FP8"


def set_mxfp4(opened: Opened, findings: Findings) -> None:
    """Experts in NAME_blocks and NAME_scales."""
    for layer in opened.layers.values():
        blocks, scales = layer.leaves.get("blocks"), layer.leaves.get("scales")
        if blocks is None or scales is None:
            lost = "blocks" if blocks is None else "scales"
            findings.fault(
                "lost tensors", layer.name, f"it has no {layer.name}_{lost}", "blocks and scales", "quantize again", 9
            )
            continue
        if (
            len(blocks.shape) != 4
            or blocks.shape[-1] != 16
            or scales.shape != blocks.shape[:-1]
            or scales.dtype != "U8"
        ):
            findings.fault(
                "shapes", layer.name, f"blocks are {list(blocks.shape)}, scales {scales.dtype} {list(scales.shape)}",
                "[experts, rows, groups, 16], and U8 without the last", "quantize again", 8,
            )  # fmt: skip
            continue
        layer.shape = (blocks.shape[0], blocks.shape[2] * 32, blocks.shape[1])
        layer.weights = Format(name="mxfp4", kind="fp4", bits=4, strategy="group", group=32, scale="e8m0")
        layer.packing = "MXFP4"


def set_modelopt(opened: Opened, findings: Findings) -> None:
    """NVFP4 and FP8 as ModelOpt stores them."""
    _check_files(opened, findings)
    algorithms = _algorithms(opened)
    for layer in opened.layers.values():
        codes, scale = layer.leaves.get("weight"), layer.scale
        if codes is None or scale is None:
            lost = "weight" if codes is None else "weight_scale"
            findings.fault(
                "lost tensors", layer.name, f"it has no {lost}", "a weight and its scales", "quantize again", 9
            )
            continue
        looks = _modelopt_layer(layer, codes.dtype, findings)
        said = algorithms.get(layer.name, algorithms.get("", ""))
        if said and looks and not said.upper().replace("-", "_").startswith(looks) and looks not in said.upper():
            findings.fault("config", layer.name, f"its tensors are {looks}", f"{said}, as the config says", _CONFIG, 8)


def _modelopt_layer(layer: Layer, dtype: str, findings: Findings) -> str:
    """Set the format; the algorithm that the tensors look like."""
    codes, scale = layer.leaves["weight"], layer.scale
    assert scale is not None
    if dtype == "U8" and scale.dtype == "F8_E4M3" and len(codes.shape) >= 2:
        layer.shape = (*codes.shape[:-1], codes.shape[-1] * 2)
        if "weight_scale_2" not in layer.leaves:
            findings.fault(
                "lost tensors", layer.name, "it has no weight_scale_2", "the global scale of NVFP4", "quantize again", 9
            )
        groups = scale.shape[-1] if scale.shape else 0
        size = layer.shape[-1] // groups if groups and layer.shape[-1] % groups == 0 else 0
        if size != 16 or scale.shape[:-1] != codes.shape[:-1]:
            findings.fault(
                "config", layer.name, f"its scales are {list(scale.shape)} for a weight {list(layer.shape)}",
                f"{[*layer.shape[:-1], layer.shape[-1] // 16]}, one for 16 columns", _CONFIG, 8,
            )  # fmt: skip
            return "NVFP4"
        layer.weights = Format(name="nvfp4", kind="fp4", bits=4, strategy="tensor_group", group=16, scale="e4m3")
        layer.activations = replace(layer.weights, dynamic=True) if "input_scale" in layer.leaves else None
        layer.packing = "ModelOpt NVFP4"
        return "NVFP4"
    if dtype == "F8_E4M3":
        layer.shape = codes.shape
        one = count(scale) == 1
        layer.weights = Format(
            name="fp8" if one else "fp8_channel", kind="fp8", bits=8, strategy="tensor" if one else "channel"
        )
        token = replace(layer.weights, name="fp8_token", strategy="token", dynamic=True)
        layer.activations = token if not one else layer.weights if "input_scale" in layer.leaves else None
        layer.packing = "ModelOpt FP8"
        return "FP8"
    if dtype == "U8":
        return _nibbles(layer, findings)
    findings.fault(
        "config", layer.name, f"its weight is {dtype}, beside a scale", "U8 (4 bits) or F8_E4M3 (FP8)", _CONFIG, 8
    )
    return ""


def _nibbles(layer: Layer, findings: Findings) -> str:
    """MXFP4, with two columns in a byte, and INT4, with two rows."""
    codes, scale = layer.leaves["weight"], layer.scale
    assert scale is not None
    floats = scale.dtype == "U8"
    name, layer.packing = ("MXFP4", "ModelOpt MXFP4") if floats else ("W4A16", "ModelOpt INT4")
    shape = tuple(codes.shape)
    if len(shape) == 2:
        layer.shape = shape = (shape[0], 2 * shape[1]) if floats else (2 * shape[0], shape[1])
    groups = scale.shape[-1] if len(scale.shape) == 2 else 0
    size = shape[-1] // groups if groups and shape[-1] % groups == 0 else 0
    if len(shape) != 2 or not size or scale.shape[0] != shape[0] or (floats and size != 32):
        findings.fault(
            "config", layer.name, f"its scales are {list(scale.shape)} for a weight {list(shape)}",
            f"one for {'32' if floats else 'a group of'} columns of each row", _CONFIG, 8,
        )  # fmt: skip
        return name
    if floats:
        layer.weights = Format(name="mxfp4", kind="fp4", bits=4, strategy="group", group=32, scale="e8m0")
    else:
        layer.weights = Format(name="int4", kind="int", bits=4, strategy="group", group=size)
    return name


def _algorithms(opened: Opened) -> dict[str, str]:
    """{layer: algorithm}, "" for all others."""
    found: dict[str, str] = {}
    for source in (opened.quantization, _inner(opened)):
        algorithm = source.get("quant_algo")
        if isinstance(algorithm, str) and algorithm.upper() != "MIXED_PRECISION":
            found.setdefault("", algorithm)
        layers = source.get("quantized_layers")
        for name, entry in layers.items() if isinstance(layers, dict) else ():
            if isinstance(entry, dict) and isinstance(entry.get("quant_algo"), str):
                found[name] = entry["quant_algo"]
    return found


def _inner(opened: Opened) -> dict[str, Any]:
    content = opened.beside.get(_MODELOPT, {}).get("quantization")
    return content if isinstance(content, dict) else {}


def _check_files(opened: Opened, findings: Findings) -> None:
    inner = _inner(opened)
    for key in ("quant_algo", "kv_cache_quant_algo", "group_size"):
        both = inner.get(key) is not None and opened.quantization.get(key) is not None
        if both and inner[key] != opened.quantization[key]:
            findings.fault(
                "config", f"{_MODELOPT}: {key}", f"{inner[key]}, and config.json says {opened.quantization[key]}",
                "both files say the same", "keep the one that the tensors agree with", 7,
            )  # fmt: skip


def check_plain(opened: Opened, expected: Expected, findings: Findings) -> None:
    """Plain linears that no list names, and quantized ones that one names."""
    kept = [*not_converted(opened), *_ignored(opened)]
    for name in opened.layers:
        if any(names_layer(entry, name) for entry in kept):
            findings.fault(
                "config", name, "it is quantized, and the list of layers that are not names it", "a plain weight",
                "take it out of the list: engines would load its codes as a plain weight", 8,
            )  # fmt: skip
    if opened.method == "mxfp4" or (opened.method == "modelopt" and len(_algorithms(opened)) > 1):
        return
    for name in weight_names(opened):
        leaf = name.rpartition(".")[2]
        known = name in expected.linears if expected.model is not None else leaf.endswith("proj")
        if name in opened.layers or leaf in _PLAIN_ALWAYS or not (known or ".experts." in name):
            continue
        if in_quantized_stack(opened, name) and not any(names_layer(entry, name) for entry in kept):
            findings.fault(
                "config", name, "the weight is plain, and nothing in the config says so", "an entry in the list of layers "
                "that are not quantized", "add it: engines would look for its scale", 8,
            )  # fmt: skip


def _ignored(opened: Opened) -> list[str]:
    found = [opened.quantization.get("ignore"), _inner(opened).get("exclude_modules")]
    return [x for entries in found if isinstance(entries, list) for x in entries if isinstance(x, str)]
