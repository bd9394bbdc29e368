"""Builds a model skeleton without weights from a config, and finds the family that describes it."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import nn

from qkit.errors import Unsupported
from qkit.families import Family, Tower, dit_discover, encoder
from qkit.families.declared import DECLARED
from qkit.families.matrices import fused_experts, matrix_of
from qkit.families.sharing import Reads, run_without_values
from qkit.files.foreign import foreign_errors

_FLOATS = {"Infinity": float("inf"), "-Infinity": float("-inf"), "NaN": float("nan")}
DISCOVERED = "discovered:"  # begins the names of families that nobody declared
# In the names of arguments that are no text.
_BEYOND_TEXT = ("pixel", "image", "video", "audio", "patches", "input_features", "input_values")
_ADVICE = "get the config of this model"


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
    from transformers import CONFIG_MAPPING  # seconds to import: only when needed

    kind = config.get("model_type")
    if kind not in CONFIG_MAPPING:
        raise Unsupported(
            f"{where}: model_type {kind!r} is not one that transformers has built in; code inside a checkpoint is "
            "never run: convert the model to a built-in architecture"
        )
    fault = f"{where}: config.json does not describe a model"
    with foreign_errors(fault, _ADVICE):
        parsed = parsed_config(config)
    if kind_of(config) in encoder.ENCODERS:
        with foreign_errors(fault, _ADVICE):
            return _encoder(kind_of(config), parsed, dtype)
    kind_of_model = _class_of(config, parsed, where)
    # transformers chooses the attention: sdpa where the class has it.
    with foreign_errors(fault, _ADVICE), torch.device("meta"):
        model = kind_of_model._from_config(parsed, dtype=dtype)
    return cast(nn.Module, model.eval())


def parsed_config(config: Mapping[str, Any]) -> Any:
    """transformers' config of a config.json, of a model type that it has built in. Raises what its class raises."""
    from transformers import AutoConfig

    return AutoConfig.for_model(**_decoded(config))


def _class_of(config: Mapping[str, Any], parsed: Any, where: str) -> Any:
    """transformers' class that config.json names, else its language model, or model of images and texts, of that type."""
    import transformers
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING, MODEL_MAPPING

    named = config.get("architectures")
    name = named[0] if isinstance(named, list) and named and isinstance(named[0], str) else ""
    cls: Any = getattr(transformers, name, None)
    of_model = isinstance(cls, type) and issubclass(cls, transformers.PreTrainedModel)
    if of_model and getattr(cls, "config_class", None) is type(parsed):
        return cls
    for mapping in (MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING, MODEL_MAPPING):
        if type(parsed) in mapping:
            return mapping[type(parsed)]
    raise Unsupported(f"{where}: transformers has no model for model_type {config.get('model_type')!r}")


def _decoded(node: Any) -> Any:
    """The config with infinities and NaN decoded, which transformers writes as {"__float__": "Infinity"}."""
    if isinstance(node, list):
        return [_decoded(child) for child in node]
    if not isinstance(node, Mapping):
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
    modules = {name for name, _ in model.named_modules()}
    for family in DECLARED:
        # A class without the outer module (an embedding model, whose blocks are in 'layers') is not what was declared.
        if model_type in family.model_types and modules.issuperset(family.blocks):
            return family
    if dit_discover.is_denoiser(model):
        return dit_discover.discover(model, model_type)
    return _discover(model, model_type)


def _discover(model: nn.Module, model_type: str) -> Family:
    """A family whose blocks are the lists of modules that hold matrices: those of the decoder, and before them towers."""
    lists = _outermost_lists(model)
    if not lists:
        raise Unsupported(
            f"model_type {model_type!r} has no list of blocks with matrices; found the module lists "
            f"{[n for n, m in model.named_modules() if isinstance(m, nn.ModuleList)] or 'none'}: qkit quantizes blocks"
        )
    paths = {n: [f"{n}.{i}" for i, _ in enumerate(model.get_submodule(n).children())] for n in lists}
    names = {id(m): n for n, m in model.named_modules()}
    embeddings, head = (_name_of(model, f"get_{end}_embeddings", names) for end in ("input", "output"))
    reads = run_without_values(model, [path for found in paths.values() for path in found], embeddings)
    ran = [n for n, found in paths.items() if any(reads.calls[path] for path in found) or _reads_text(model, reads)]
    main = _main_lists(model, ran or lists)
    others = [n for n in lists if n not in main]
    unseen = not reads.whole and _reads_text_alone(model)  # the run stopped before it reached all that a text does
    towers = tuple(
        Tower(name, (n,), on_text=unseen or n in ran)
        for n, name in zip(others, _tower_names(others, main[0]), strict=True)
    )
    return Family(
        name=f"{DISCOVERED}{model_type}",
        model_types=(model_type,),
        blocks=tuple(main),
        groups=(),
        embeddings=embeddings,
        final_norm=_final_norm(reads, embeddings, head),
        head=head,
        towers=towers,
        reads=reads,
    )


def _final_norm(reads: Reads, embeddings: str, head: str) -> str:
    """The norm whose output the head reads. A tied head has the matrix of the embeddings."""
    seen = reads.stream.reads
    return next((seen[n] for n in (f"{head}.weight", f"{embeddings}.weight") if n in seen), "") if head else ""


def _reads_text(model: nn.Module, reads: Reads) -> bool:
    """Whether all blocks run on a text although the run did not get to them: those of an encoder and a decoder of text."""
    both = bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))
    return both and not reads.whole and _reads_text_alone(model)


def _reads_text_alone(model: nn.Module) -> bool:
    """Whether a model has no argument for pictures, films or sound."""
    base: Any = getattr(model, "base_model", model)
    return not any(word in name for name in inspect.signature(base.forward).parameters for word in _BEYOND_TEXT)


def _outermost_lists(model: nn.Module) -> list[str]:
    """Lists of modules that hold matrices or experts, which are in no other such list, in the order of the model."""
    found: list[str] = []
    for name, module in model.named_modules():
        if not isinstance(module, nn.ModuleList) or any(name.startswith(f"{outer}.") for outer in found):
            continue
        if all(isinstance(child, nn.ModuleList) for child in module):  # lists of lists, which are no blocks (Funnel)
            continue
        inside = [m for child in module for m in child.modules() if m is not child]
        if any(matrix_of(m) or any(fused_experts(m)) for m in inside):
            found.append(name)
    return found


def _main_lists(model: nn.Module, lists: list[str]) -> list[str]:
    """The lists of the language model, or of the decoder; where there is none, the list with the most parameters."""
    decoder = getattr(model, "get_decoder", lambda: None)()
    path = next((n for n, m in model.named_modules() if m is decoder), "") if decoder is not model else ""
    inside = [n for n in lists if not path or n.startswith(f"{path}.")] or lists
    largest = max(inside, key=lambda n: sum(p.numel() for p in model.get_submodule(n).parameters()))
    parent = largest.rpartition(".")[0]
    return [n for n in inside if n.rpartition(".")[0] == parent or len(inside) == 1]


def _tower_names(paths: list[str], main: str) -> list[str]:
    """A name for each part of a model; a second one of the same name gets a number."""
    names: list[str] = []
    for path in paths:
        name = _tower_name(path, main)
        count = sum(n.rstrip("0123456789") == name for n in names)
        names.append(f"{name}{count + 1}" if count else name)
    return names


def _tower_name(path: str, main: str) -> str:
    """A name for a part of a model: of the first module on the way to its blocks that the language model does not share."""
    for part in path.split("."):
        if part not in main.split(".") and part not in ("model", "layers", "blocks"):
            for known in ("vision", "visual", "audio", "encoder"):
                if known in part:
                    return "vision" if known == "visual" else known
            return part
    return path.replace(".", "_")


def _name_of(model: nn.Module, getter: str, names: dict[int, str]) -> str:
    try:
        return names.get(id(getattr(model, getter)()), "")
    except (AttributeError, NotImplementedError):  # a model without one
        return ""
