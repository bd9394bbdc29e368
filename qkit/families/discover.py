"""From a config to a model skeleton without weights, and to the family that describes it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn

from qkit.blocks import Group
from qkit.errors import BadCheckpoint, Unsupported
from qkit.families import Family, dit, encoder, vlm
from qkit.families.declared import DECLARED

_DENOISERS = {name: family for family in dit.FAMILIES for name in family.model_types}
# Siblings of an undeclared architecture that by these names read one input.
_SHARED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("query", "key", "value"), ("w1", "w3"))


def kind_of(config: Mapping[str, Any]) -> str:
    """What config.json calls the model: its model_type, or the class of a diffusion transformer or of a text encoder."""
    made = config.get("architectures")
    if isinstance(made, list) and made and made[0] in encoder.ENCODERS:
        return str(made[0])
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
    try:
        parsed = AutoConfig.for_model(**config)
        if kind_of(config) in encoder.ENCODERS:
            return _encoder(kind_of(config), parsed, dtype)
        declared = next((f for f in vlm.FAMILIES if kind in f.model_types), None)
        text = getattr(getattr(parsed, "text_config", None), "model_type", None)
        if declared is not None and text not in declared.text_types:
            raise Unsupported(
                f"{where}: the language model inside this {kind} is {text!r}; expected one of {', '.join(declared.text_types)}"
            )
        if type(parsed) not in (
            MODEL_FOR_CAUSAL_LM_MAPPING if declared is None else MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
        ):
            raise Unsupported(f"{where}: transformers has no causal language model for model_type {kind!r}")
        with torch.device("meta"):
            model = (AutoModelForCausalLM if declared is None else AutoModelForImageTextToText).from_config(
                parsed, attn_implementation="sdpa", dtype=dtype
            )
    except (StrictDataclassError, ValueError, TypeError, RuntimeError, ArithmeticError, LookupError) as e:
        raise BadCheckpoint(f"{where}: config.json does not describe a model: {str(e).splitlines()[0]}") from e
    return cast(nn.Module, model.eval())


def _encoder(name: str, config: Any, dtype: torch.dtype) -> nn.Module:
    """A text encoder on the meta device."""
    import transformers

    with torch.device("meta"):
        model = getattr(transformers, name)(config)
    for p in model.parameters():
        p.data = p.data.to(dtype)
    return cast(nn.Module, model.eval())


def _denoiser(config: dict[str, Any], where: str, dtype: torch.dtype) -> nn.Module:
    """A diffusion transformer on the meta device; its computed buffers (positions) have their values."""
    name = config["_class_name"]
    if not isinstance(name, str) or name not in _DENOISERS:
        unet = isinstance(name, str) and "UNet" in name
        raise Unsupported(
            f"{where}: _class_name {name!r} is "
            + (
                "a U-Net; qkit quantizes diffusion transformers"
                if unet
                else "not a diffusion transformer that qkit knows"
            )
            + f": expected one of {', '.join(_DENOISERS)}"
        )
    try:
        import diffusers
        from accelerate import init_empty_weights
    except ImportError as e:
        raise Unsupported(f"{where}: {name} needs diffusers: pip install 'qkit[diffusion]'") from e
    kept = {k: v for k, v in config.items() if k != "quantization_config"}
    try:
        with init_empty_weights():
            model = getattr(diffusers, name).from_config(kept)
    except (ValueError, TypeError, RuntimeError, ArithmeticError, LookupError, AttributeError) as e:
        raise BadCheckpoint(f"{where}: config.json does not describe a model: {str(e).splitlines()[0]}") from e
    for p in model.parameters():
        p.data = p.data.to(dtype)
    return cast(nn.Module, model.eval())


def family_of(model: nn.Module, model_type: str) -> Family:
    """The declared family of that model type, else one discovered from the module tree."""
    for family in DECLARED:
        if model_type in family.model_types:
            return family
    return _discover(model, model_type)


def _discover(model: nn.Module, model_type: str) -> Family:
    lists = [(name, m) for name, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m)]
    same = [(n, m) for n, m in lists if len({type(child) for child in m}) == 1]
    if not same:
        raise Unsupported(
            f"model_type {model_type!r} is not declared and has no list of equal blocks to quantize; found the module "
            f"lists {[n for n, _ in lists] or 'none'}"
        )
    path, blocks = max(same, key=lambda item: sum(p.numel() for p in item[1].parameters()))
    first = blocks[0]
    linears = {n: m for n, m in first.named_modules() if isinstance(m, nn.Linear)}
    owned = {f"{n}.{p}" for n, m in linears.items() for p, _ in m.named_parameters(recurse=False)}
    strange = [(n, tuple(p.shape)) for n, p in first.named_parameters() if p.dim() >= 2 and n not in owned]
    if strange or not linears:
        seen = ", ".join(f"{n} {s}" for n, s in strange[:4]) or "no linear layer"
        raise Unsupported(
            f"model_type {model_type!r} is not declared, and its blocks ({path}) hold weights that are not plain "
            f"linears: {seen}; quantizing only a part of them is refused"
        )
    groups: list[Group] = []
    for name in linears:
        parent, _, leaf = name.rpartition(".")
        shared = next((s for s in _SHARED if leaf in s), (leaf,))
        members = tuple(f"{parent}.{s}" if parent else s for s in shared)
        members = members if all(m in linears for m in members) else (name,)
        if all(name not in g.linears for g in groups):
            groups.append(Group(members))
    return Family(f"discovered:{model_type}", (model_type,), blocks=(path,), groups=tuple(groups), embeddings="")
