"""Builds a model skeleton without weights from a config, and finds the family that describes it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import nn

from qkit.errors import Unsupported
from qkit.families import Family, dit_discover, encoder, vlm
from qkit.families.blocks import Group
from qkit.families.declared import DECLARED
from qkit.files.schema import foreign_errors

_FLOATS = {"Infinity": float("inf"), "-Infinity": float("-inf"), "NaN": float("nan")}
_ADVICE = "get the config of this model"
# Models whose blocks are called with numbers of a whole batch (positions of every head), which are recorded of one row.
BY_BATCH = ("bloom",)
# Siblings of an undeclared architecture that by these names read one input.
_SHARED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("query", "key", "value"), ("w1", "w3"))


def kind_of(config: Mapping[str, Any]) -> str:
    """The kind of model in config.json: its model_type, or the class of a diffusion transformer or a text encoder."""
    architectures = config.get("architectures")
    if isinstance(architectures, list) and architectures and architectures[0] in encoder.ENCODERS:
        return str(architectures[0])
    return str(config.get("_class_name", config.get("model_type")))


def build_skeleton(config: dict[str, Any], where: str, dtype: torch.dtype) -> nn.Module:
    """The model's modules on the meta device: shapes and names, no memory.

    Raises Unsupported for an architecture that transformers does not have built in (no code of a checkpoint is
    ever run), BadCheckpoint for a config that it rejects.
    """
    if "_class_name" in config:
        return _denoiser(config, where, dtype)
    from transformers import (  # seconds to import: only when needed
        CONFIG_MAPPING,
        MODEL_FOR_CAUSAL_LM_MAPPING,
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
        AutoConfig,
        AutoModelForCausalLM,
        AutoModelForImageTextToText,
    )

    kind = config.get("model_type")
    if kind not in CONFIG_MAPPING:
        raise Unsupported(
            f"{where}: model_type {kind!r} is not one that transformers has built in; code inside a checkpoint is "
            "never run: convert the model to a built-in architecture"
        )
    fault = f"{where}: config.json does not describe a model"
    with foreign_errors(fault, _ADVICE):
        parsed = AutoConfig.for_model(**_decoded(config))
    if kind_of(config) in encoder.ENCODERS:
        with foreign_errors(fault, _ADVICE):
            return _encoder(kind_of(config), parsed, dtype)
    declared = next((f for f in vlm.FAMILIES if kind in f.model_types), None)
    text = getattr(getattr(parsed, "text_config", None), "model_type", None)
    if declared is not None and text not in declared.text_types:
        raise Unsupported(
            f"{where}: the language model inside this {kind} is {text!r}; expected one of {', '.join(declared.text_types)}"
        )
    mapping = MODEL_FOR_CAUSAL_LM_MAPPING if declared is None else MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    if type(parsed) not in mapping:
        raise Unsupported(f"{where}: transformers has no causal language model for model_type {kind!r}")
    # A class without sdpa refuses it where it is named.
    attention = "sdpa" if getattr(mapping[type(parsed)], "_supports_sdpa", False) else "eager"
    auto = AutoModelForCausalLM if declared is None else AutoModelForImageTextToText
    with foreign_errors(fault, _ADVICE), torch.device("meta"):
        model = auto.from_config(parsed, attn_implementation=attention, dtype=dtype)
    return cast(nn.Module, model.eval())


def _decoded(node: Any) -> Any:
    """The config with infinities and NaN decoded, which transformers writes as {"__float__": "Infinity"}."""
    if isinstance(node, list):
        return [_decoded(child) for child in node]
    if not isinstance(node, dict):
        return node
    if node.keys() == {"__float__"}:
        return _FLOATS.get(str(node["__float__"]), node)
    return {key: _decoded(child) for key, child in node.items()}


def _encoder(name: str, config: Any, dtype: torch.dtype) -> nn.Module:
    """A text encoder on the meta device."""
    import transformers

    with torch.device("meta"):
        model = getattr(transformers, name)(config)
    for p in model.parameters():
        p.data = p.data.to(dtype)
    return cast(nn.Module, model.eval())


def _denoiser(config: dict[str, Any], where: str, dtype: torch.dtype) -> nn.Module:
    """A diffusion transformer or a U-Net on the meta device; its computed buffers (positions) have their values."""
    name = config["_class_name"]
    try:
        import diffusers
        from accelerate import init_empty_weights
    except ImportError as e:
        raise Unsupported(f"{where}: {name} needs diffusers: pip install 'qkit[diffusion]'") from e
    found = dit_discover.denoiser_class(name, diffusers)
    if found is None:
        raise Unsupported(
            f"{where}: _class_name {name!r} is no transformer or U-Net of diffusers {diffusers.__version__}; code inside a "
            "checkpoint is never run: use the folder of one, or a newer diffusers"
        )
    settings = {k: v for k, v in config.items() if k != "quantization_config"}
    with foreign_errors(f"{where}: config.json does not describe a model", _ADVICE), init_empty_weights():
        model = found.from_config(settings)
    for p in model.parameters():
        p.data = p.data.to(dtype)
    return cast(nn.Module, model.eval())


def family_of(model: nn.Module, model_type: str) -> Family:
    """The declared family of that model type, else one discovered from the module tree."""
    for family in DECLARED:
        if model_type in family.model_types:
            return family
    if dit_discover.is_denoiser(model):
        return dit_discover.discover(model, model_type)
    return _discover(model, model_type)


def _discover(model: nn.Module, model_type: str) -> Family:
    lists = [(name, m) for name, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m)]
    uniform = [(n, m) for n, m in lists if len({type(child) for child in m}) == 1]
    if not uniform:
        raise Unsupported(
            f"model_type {model_type!r} is not declared and has no list of equal blocks to quantize; found the module "
            f"lists {[n for n, _ in lists] or 'none'}"
        )
    path, blocks = max(uniform, key=lambda item: sum(p.numel() for p in item[1].parameters()))
    for index, block in enumerate(blocks):
        linears = {n: m for n, m in block.named_modules() if isinstance(m, nn.Linear)}
        owned = {f"{n}.{p}" for n, m in linears.items() for p, _ in m.named_parameters(recurse=False)}
        strange = [(n, tuple(p.shape)) for n, p in block.named_parameters() if p.dim() >= 2 and n not in owned]
        if strange or not linears:
            listed = ", ".join(f"{n} {s}" for n, s in strange[:4]) or "no linear layer"
            raise Unsupported(
                f"model_type {model_type!r} is not declared, and its blocks ({path}) hold weights that are not plain "
                f"linears, first in block {index}: {listed}; quantizing only a part of them is refused"
            )
    names = dict.fromkeys(n for block in blocks for n, m in block.named_modules() if isinstance(m, nn.Linear))
    groups: list[Group] = []
    for name in names:
        parent, _, leaf = name.rpartition(".")
        shared = next((s for s in _SHARED if leaf in s), (leaf,))
        members = tuple(f"{parent}.{s}" if parent else s for s in shared)
        members = members if all(m in names for m in members) else (name,)
        if all(name not in g.linears for g in groups):
            groups.append(Group(members))
    return Family(
        name=f"discovered:{model_type}", model_types=(model_type,), blocks=(path,), groups=tuple(groups), embeddings=""
    )
