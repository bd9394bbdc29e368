"""What the tiny models of the sweep are called with, and what is compared of a call."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from sweep_pictures import with_picture
from sweep_shrink import TOKENS
from torch import Tensor

LENGTH = 48


def result(output: Any) -> Tensor:
    """What is compared of a call of a model, float32: its logits, or the last hidden state of a model without a head."""
    found = output.logits if getattr(output, "logits", None) is not None else output[0]
    return found.float().masked_fill(found.float().abs() > 1e30, 0)  # tokens that a class forbids


def call(model: Any, inputs: dict[str, Any]) -> Tensor:
    """The result of a call, float32."""
    if type(model).__name__ == "Llama4ForConditionalGeneration":  # cannot be called in transformers 5.24
        model, inputs = model.language_model, {"input_ids": inputs["input_ids"]}
    cached = "use_cache" in inspect.signature(model.forward).parameters
    model.config.get_text_config().use_cache = False
    with torch.inference_mode():
        return result(model(**inputs, **({"use_cache": False} if cached else {}))).contiguous()


def inputs_of(name: str, model: Any, seed: int = 1) -> dict[str, Any]:
    """Random inputs, of the kinds that the class asks for: tokens, sound, pictures, states of another model."""
    chance = torch.Generator().manual_seed(seed)
    config, accepts = model.config, inspect.signature(model.forward).parameters
    if hasattr(config, "backbone_hidden_size"):  # a draft model: it reads states of the model that it helps
        return _draft(config, chance)
    if any(word in n for n in accepts for word in ("pixel_values", "flattened_patches")):
        pictured = with_picture(model, chance)
        if pictured is not None:
            return pictured
    rows = 1 if name.endswith(":sequence") else 2  # without a padding token one row is all that classifiers take
    tokens = torch.randint(5, _vocabulary(config), (rows, LENGTH), generator=chance)
    main = getattr(model, "main_input_name", "input_ids")
    found: dict[str, Any] = {}
    if main == "input_values":
        found[main] = torch.randn(rows, *((1,) if config.model_type == "omniasr_ctc" else ()), 8000, generator=chance)
    elif config.model_type == "speech-encoder-decoder":
        found["input_values"] = torch.randn(rows, 8000, generator=chance)
    elif main == "input_features":
        found[main] = _features(config, rows, chance)
    else:
        found["input_ids"] = tokens
    if name.endswith(":sequence"):  # encoder-decoders look for the one end of the text
        found["input_ids"][:, -1] = end if isinstance(end := getattr(config, "eos_token_id", 2), int) else 2
    elif "decoder_input_ids" in accepts and (
        getattr(config, "is_encoder_decoder", False) or hasattr(config, "canvas_length")
    ):
        found["decoder_input_ids"] = tokens[:, :16].clone()
    if config.model_type == "kyutai_speech_to_text":
        found["input_ids"] = tokens[..., None].repeat(1, 1, config.num_codebooks + 1) % 2000
    if config.model_type == "dia":  # a token for each channel of sound
        found["decoder_input_ids"] = tokens[:, :16, None].repeat(1, 1, config.decoder_config.num_channels) % 1000
    if config.model_type == "voxtral_realtime":  # sound is added to every token
        found["input_features"] = torch.randn(rows, config.audio_config.num_mel_bins, 8 * LENGTH, generator=chance)
    return found


def _vocabulary(config: Any) -> int:
    return min(TOKENS, getattr(config.get_text_config(), "vocab_size", None) or TOKENS)


def _features(config: Any, rows: int, chance: torch.Generator) -> Tensor:
    """Mel features: [rows, bins, frames] for Whisper and its kin, [rows, frames, bins] for others."""
    parts = [config, *(getattr(config, n, None) for n in ("encoder_config", "audio_config"))]
    sizes = ("num_mel_bins", "feature_projection_input_dim", "input_dim")
    bins = next((getattr(p, n) for p in parts for n in sizes if getattr(p, n, None)), 80)
    if config.model_type == "granite_speech5_ctc":
        bins *= 4  # frames come stacked
    if hasattr(config, "max_source_positions") and config.model_type == "whisper":
        return torch.randn(rows, bins, 2 * config.max_source_positions, generator=chance)
    return torch.randn(rows, 64, bins, generator=chance)


def _draft(config: Any, chance: torch.Generator) -> dict[str, Any]:
    """One token to draft after 48 that are known, as the class is used; it fails on more in transformers 5.24."""
    text, rows = config.get_text_config(), 2
    states = torch.randn(rows, 1, 2 * config.backbone_hidden_size, generator=chance)
    shared = {}
    for layer, kind in enumerate(text.layer_types):
        own = text.per_layer_config[layer]
        shape = (2, rows, own.num_key_value_heads, LENGTH, own.head_dim)
        shared[kind] = tuple(torch.randn(shape, generator=chance))
    return {"inputs_embeds": states, "shared_kv_states": shared, "position_ids": torch.tensor([[LENGTH]])}


def write(inputs: dict[str, Any], path: Path) -> None:
    """Keep inputs in a file, so that all that load the model are called with the same."""
    flat = {}
    for name, value in inputs.items():
        if isinstance(value, dict):
            flat |= {
                f"{name}|{key}|{i}": part.contiguous() for key, parts in value.items() for i, part in enumerate(parts)
            }
        else:
            flat[name] = value.contiguous()
    save_file(flat, path)


def read(path: Path) -> dict[str, Any]:
    """The inputs that ``write`` kept."""
    found: dict[str, Any] = {}
    for name, value in sorted(load_file(path).items()):
        outer, _, inner = name.partition("|")
        if inner:
            found.setdefault(outer, {}).setdefault(inner.partition("|")[0], []).append(value)
        else:
            found[outer] = value
    return found
