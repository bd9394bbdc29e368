"""The quantization of a model and the tool that made it, read from config and tensor names. Other tools' ways are known,
too."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from qkit.errors import QkitError
from qkit.files.folder import load_json
from qkit.files.safefile import TensorInfo
from qkit.files.sources.opening import mlx_quantization

_LINES = 16  # formats that are named
_KEYS = (
    "bits", "w_bit", "group_size", "q_group_size", "sym", "desc_act", "zero_point", "fmt", "quant_algo", "load_in_4bit",
    "load_in_8bit", "bnb_4bit_quant_type", "bnb_4bit_use_double_quant", "weight_block_size", "activation_scheme",
    "kv_cache_quant_algo", "version", "format", "quant_type", "data_type", "mode",
)  # fmt: skip
_MODELOPT = "hf_quant_config.json"
# By the last part of a tensor's name, for a folder whose config says nothing.
_TRACES = {
    "weight_packed": "compressed-tensors",
    "qweight": "GPTQ or AWQ",
    "weight_scale_inv": "FP8 in blocks",
    "weight_scale_2": "ModelOpt NVFP4",
    "SCB": "bitsandbytes, 8 bits",
}


def one_line(value: object, limit: int = 80) -> str:
    """Text from a file on one line, at most ``limit`` characters long."""
    text = "".join(c if c.isprintable() else "?" for c in str(value)[: limit + 1])
    return text if len(text) <= limit else text[: limit - 3] + "..."


def describe_quantization(config: Mapping[str, Any], folder: Path, tensors: Mapping[str, TensorInfo]) -> list[str]:
    """One line for each number format; none for a model that is not quantized."""
    quantization = config.get("quantization_config", config.get("compression_config"))
    quantization = mlx_quantization(config) or quantization
    if quantization is None:
        quantization = _modelopt(folder)
    if quantization is not None and not isinstance(quantization, Mapping):
        return [f"quantization_config is a {type(quantization).__name__}, which no tool writes"]
    if quantization is None:
        leaves = {name.rpartition(".")[2] for name in tensors}
        traces = [tool for leaf, tool in _TRACES.items() if leaf in leaves]
        return [f"the config says nothing, and the tensors look like {' and '.join(traces)}"] if traces else []
    method = quantization.get("quant_method", quantization.get("quant_algo"))
    name = one_line(method) if isinstance(method, str) else "a method without a name"
    groups = quantization.get("config_groups")
    if isinstance(groups, Mapping):
        lines = [f"{name}: {_group(group)}" for group in groups.values()]
        if len(lines) > _LINES:
            lines = [*lines[:_LINES], f"{name}: and {len(lines) - _LINES} more groups"]
        return list(dict.fromkeys(lines)) or [name]
    parts = [f"{key} {one_line(quantization[key], 40)}" for key in _KEYS if quantization.get(key) not in (None, False)]
    return [f"{name}: {', '.join(parts)}" if parts else name]


def _group(group: Any) -> str:
    if not isinstance(group, Mapping):
        return "a group that is no object"
    weights, inputs = _numbers(group.get("weights")), _numbers(group.get("input_activations"))
    form = group.get("format")
    stored = f", stored as {one_line(form, 40)}" if isinstance(form, str) else ""
    return f"weights {weights}, activations {inputs}{stored}"


def _numbers(args: Any) -> str:
    if not isinstance(args, Mapping):
        return "as they are"
    size = args.get("group_size", args.get("block_structure"))
    group = f" of {one_line(size, 20)}" if size is not None else ""
    zero = "" if args.get("symmetric", True) else ", asymmetric"
    live = ", dynamic" if args.get("dynamic") else ""
    kind = {"int": "INT", "float": "FP"}.get(str(args.get("type")), one_line(args.get("type"), 12))
    return f"{kind}{one_line(args.get('num_bits'), 12)} by {one_line(args.get('strategy'), 20)}{group}{zero}{live}"


def _modelopt(folder: Path) -> Any:
    """What NVIDIA's ModelOpt keeps in a file of its own."""
    content = _read(folder / _MODELOPT)
    quantization = content.get("quantization")
    return {"quant_method": "modelopt", **quantization} if isinstance(quantization, Mapping) else None


def _read(path: Path) -> dict[str, Any]:
    try:
        content = load_json(path, "config") if path.is_file() else {}
    except QkitError:
        return {}
    return content if isinstance(content, dict) else {}


def find_quantizer(
    config: Mapping[str, Any], record: Mapping[str, Any], folder: Path, names: Collection[str], quantized: bool
) -> str | None:
    """The name of the tool that quantized a model, as far as its files say."""
    if record:
        recipe = record.get("recipe")
        recipe = recipe if isinstance(recipe, Mapping) else {}
        how = ", ".join(one_line(recipe[k], 60) for k in ("scheme", "method") if isinstance(recipe.get(k), str))
        return f"qkit {one_line(record.get('qkit_version'), 20)}" + (f" ({how})" if how else "")
    quantization = config.get("quantization_config")
    quantization = quantization if isinstance(quantization, Mapping) else {}
    if "autoround_version" in quantization:
        return f"AutoRound {one_line(quantization['autoround_version'], 20)}"
    meta = quantization.get("meta")
    if isinstance(meta, Mapping) and meta.get("quantizer"):
        tools = meta["quantizer"]
        return one_line(", ".join(map(str, tools)) if isinstance(tools, list) else tools, 60)
    if quantization.get("quant_method") == "compressed-tensors" and "recipe.yaml" in names:
        return f"llm-compressor (compressed-tensors {one_line(quantization.get('version'), 20)})"
    producer = quantization.get("producer", _read(folder / _MODELOPT).get("producer"))
    if isinstance(producer, Mapping):
        return " ".join(one_line(producer[k], 30) for k in ("name", "version") if k in producer)
    if quantization.get("quant_method") == "compressed-tensors":
        return f"a tool that writes compressed-tensors {one_line(quantization.get('version'), 20)}"
    return "nobody says" if quantized else None
