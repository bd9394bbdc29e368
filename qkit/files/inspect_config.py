"""How a model is quantized, and by whom, as its config and its tensors say: the ways of other tools, too."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from qkit.errors import QkitError
from qkit.files.folder import load_json
from qkit.files.safefile import TensorInfo

_LINES = 16  # formats that are named
_KEYS = (
    "bits", "w_bit", "group_size", "q_group_size", "sym", "desc_act", "zero_point", "fmt", "quant_algo", "load_in_4bit",
    "load_in_8bit", "bnb_4bit_quant_type", "bnb_4bit_use_double_quant", "weight_block_size", "activation_scheme",
    "kv_cache_quant_algo", "version", "format", "quant_type", "data_type",
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


def word(value: object, limit: int = 80) -> str:
    """What a file says, on one line and no longer than that."""
    text = "".join(c if c.isprintable() else "?" for c in str(value)[: limit + 1])
    return text if len(text) <= limit else text[: limit - 3] + "..."


def described_quantization(config: Mapping[str, Any], folder: Path, tensors: Mapping[str, TensorInfo]) -> list[str]:
    """Lines about formats; none for a model that is not quantized."""
    said = config.get("quantization_config", config.get("compression_config"))
    if said is None:
        said = _modelopt(folder)
    if said is not None and not isinstance(said, Mapping):
        return [f"quantization_config is a {type(said).__name__}, which no tool writes"]
    if said is None:
        leaves = {name.rpartition(".")[2] for name in tensors}
        traces = [what for leaf, what in _TRACES.items() if leaf in leaves]
        return [f"the config says nothing, and the tensors look like {' and '.join(traces)}"] if traces else []
    method = said.get("quant_method", said.get("quant_algo"))
    name = word(method) if isinstance(method, str) else "a method without a name"
    groups = said.get("config_groups")
    if isinstance(groups, Mapping):
        lines = [f"{name}: {_group(group)}" for group in groups.values()]
        if len(lines) > _LINES:
            lines = [*lines[:_LINES], f"{name}: and {len(lines) - _LINES} more groups"]
        return list(dict.fromkeys(lines)) or [name]
    parts = [f"{key} {word(said[key], 40)}" for key in _KEYS if said.get(key) not in (None, False)]
    return [f"{name}: {', '.join(parts)}" if parts else name]


def _group(group: Any) -> str:
    if not isinstance(group, Mapping):
        return "a group that is no object"
    weights, inputs = _numbers(group.get("weights")), _numbers(group.get("input_activations"))
    form = group.get("format")
    stored = f", stored as {word(form, 40)}" if isinstance(form, str) else ""
    return f"weights {weights}, activations {inputs}{stored}"


def _numbers(args: Any) -> str:
    if not isinstance(args, Mapping):
        return "as they are"
    size = args.get("group_size", args.get("block_structure"))
    group = f" of {word(size, 20)}" if size is not None else ""
    zero = "" if args.get("symmetric", True) else ", asymmetric"
    live = ", dynamic" if args.get("dynamic") else ""
    kind = {"int": "INT", "float": "FP"}.get(str(args.get("type")), word(args.get("type"), 12))
    return f"{kind}{word(args.get('num_bits'), 12)} by {word(args.get('strategy'), 20)}{group}{zero}{live}"


def _modelopt(folder: Path) -> Any:
    """What NVIDIA's ModelOpt keeps in a file of its own."""
    found = _read(folder / _MODELOPT)
    said = found.get("quantization")
    return {"quant_method": "modelopt", **said} if isinstance(said, Mapping) else None


def _read(path: Path) -> dict[str, Any]:
    try:
        found = load_json(path, "config") if path.is_file() else {}
    except QkitError:
        return {}
    return found if isinstance(found, dict) else {}


def made_by(
    config: Mapping[str, Any], record: Mapping[str, Any], folder: Path, names: Collection[str], quantized: bool
) -> str | None:
    """The tool that quantized a model, as far as its files say."""
    if record:
        recipe = record.get("recipe")
        recipe = recipe if isinstance(recipe, Mapping) else {}
        how = ", ".join(word(recipe[k], 60) for k in ("scheme", "method") if isinstance(recipe.get(k), str))
        return f"qkit {word(record.get('qkit_version'), 20)}" + (f" ({how})" if how else "")
    said = config.get("quantization_config")
    said = said if isinstance(said, Mapping) else {}
    if "autoround_version" in said:
        return f"AutoRound {word(said['autoround_version'], 20)}"
    meta = said.get("meta")
    if isinstance(meta, Mapping) and meta.get("quantizer"):
        tools = meta["quantizer"]
        return word(", ".join(map(str, tools)) if isinstance(tools, list) else tools, 60)
    if said.get("quant_method") == "compressed-tensors" and "recipe.yaml" in names:
        return f"llm-compressor (compressed-tensors {word(said.get('version'), 20)})"
    producer = said.get("producer", _read(folder / _MODELOPT).get("producer"))
    if isinstance(producer, Mapping):
        return " ".join(word(producer[k], 30) for k in ("name", "version") if k in producer)
    if said.get("quant_method") == "compressed-tensors":
        return f"a tool that writes compressed-tensors {word(said.get('version'), 20)}"
    return "nobody says" if quantized else None
