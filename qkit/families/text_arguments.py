"""How a model of transformers is called on rows of a text, whatever its arguments are named."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn


def text_arguments(base: Any, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of a model on rows of a text, as it takes them: a decoder behind an encoder reads the text, too, one token
    later, as it does in training; and the tokens may be its 'inputs', without a name of their own."""
    tokens = arguments.get("input_ids")
    accepts = inspect.signature(base.forward).parameters
    if tokens is not None and "input_ids" not in accepts and getattr(base, "main_input_name", "") == "inputs":
        return {"inputs": tokens, **{k: v for k, v in arguments.items() if k != "input_ids"}}
    if tokens is None or "decoder_input_ids" not in accepts or "decoder_input_ids" in arguments or _speaks(base):
        return dict(arguments)
    begun = torch.cat([torch.full_like(tokens[:, :1], decoder_start(base.config)), tokens[:, :-1]], 1)
    return {**arguments, "decoder_input_ids": begun}


# Arguments that tokens alone are enough for, or that choose how to run: by their names, or what these begin with.
_OF_TEXT = {
    "input_ids", "inputs", "inputs_embeds", "attention_mask", "position_ids", "cache", "past_key_values", "use_cache", "labels",
    "logits_to_keep", "token_type_ids", "cache_position", "head_mask", "langs", "lengths", "cache_params", "num_items_in_batch",
}  # fmt: skip
_BEGIN_OF_TEXT = ("decoder_", "encoder_", "cross_attn_", "output_", "return_")


def beyond_text(model: nn.Module) -> list[str]:
    """Names of a model's arguments that rows of a text do not fill: pictures, sound, states of another model."""
    accepts = inspect.signature(model.forward).parameters
    named = (n for n, p in accepts.items() if p.kind is not p.VAR_KEYWORD)
    return [n for n in named if n not in _OF_TEXT and not n.startswith(_BEGIN_OF_TEXT)]


def _speaks(base: Any) -> bool:
    """Whether the decoder reads no tokens of a text but others, several at a time: it begins by itself (Dia, which speaks)."""
    decoder: Any = getattr(base, "get_decoder", lambda: None)()
    if not hasattr(decoder, "get_input_embeddings"):
        return False
    try:
        return not isinstance(decoder.get_input_embeddings(), nn.Embedding)
    except NotImplementedError:  # it has no table of tokens
        return True


def decoder_start(config: Any) -> int:
    """The token that the decoder of a model begins with."""
    parts = (config, getattr(config, "decoder", None), config.get_text_config(decoder=True))
    names = ("decoder_start_token_id", "bos_token_id", "pad_token_id")
    found = (getattr(part, name, None) for part in parts for name in names)
    return next((i for i in found if isinstance(i, int)), 0)
