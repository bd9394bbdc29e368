"""What llama.cpp computes for a model where its config leaves a choice: a model that asks for something else is refused.

llama.cpp has these written in its source for each architecture, and no key of a GGUF file changes them. Those of the
models in reports/gguf/architectures.py were seen as differences of log-probabilities; the others were read there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qkit.errors import Unsupported
from qkit.files.gguf_converter import INSTEAD
from qkit.files.safefile import shown

CONTEXT = "context_length"
_ROPES = ("default", "linear", "llama3")
_PLAIN = ("llama", "mistral", "qwen2", "qwen3")  # whose RoPE and activation llama.cpp has in one form
# Architectures of llama.cpp: of so many layers the last one sees all tokens, the others a window.
_PERIODS = {"gemma2": 2, "gemma3": 6, "gemma3n": 5, "cohere2": 4, "exaone4": 4, "gpt-oss": 2, "llama4": 4, "olmo2": 4}
_NO_ROPE = 4  # SmolLM3: every fourth layer is without
_SHARES = {"qwen2_moe": False, "qwen3_moe": True, "olmoe": False}  # whether the shares of chosen experts add up to one
_EQUAL_HEADS, _WINDOWED_EXAONE = ("olmoe", "phi"), 64
_LARGEST = {"gemma2": 46, "gemma3_text": 62}  # layers of the model that divides by the width of a head in the stream


def check_config(folder: Path, config: Mapping[str, Any]) -> None:
    """Raises Unsupported for what config.json alone tells."""
    rope = _rope(config)
    plain = config.get("model_type") in _PLAIN
    shares = _SHARES.get(str(config.get("model_type")), bool(config.get("norm_topk_prob")))
    refused = {
        f"hidden_act {shown(config.get('hidden_act'))}, expected silu": plain
        and config.get("hidden_act") not in ("silu", "swish"),
        f"rope_type {shown(rope)}, expected one of {', '.join(_ROPES)}": plain and rope not in _ROPES,
        "use_sliding_window is on, and llama.cpp lets every token see all before it": plain
        and bool(config.get("use_sliding_window")),
        "a rotary embedding for a part of each head": plain
        and config.get("partial_rotary_factor") not in (None, 1, 1.0),
        f"norm_topk_prob {shown(config.get('norm_topk_prob'))}, and llama.cpp has another": bool(
            config.get("norm_topk_prob", shares)
        )
        != shares,
        "other heads of keys than of queries, which llama.cpp does not load for this architecture": config.get(
            "model_type"
        )
        in _EQUAL_HEADS
        and config.get("num_key_value_heads") not in (None, config.get("num_attention_heads")),
        "sliding windows, which llama.cpp has for EXAONE 4 of 64 layers alone": config.get("model_type") == "exaone4"
        and bool(config.get("sliding_window"))
        and config.get("num_hidden_layers") != _WINDOWED_EXAONE,
        **_scale(config),
        **_layers_without_rope(config),
    }
    _refuse(folder, next((text for text, wrong in refused.items() if wrong), None))


def check_header(folder: Path, config: Mapping[str, Any], architecture: str, fields: Mapping[str, Any]) -> None:
    """Raises Unsupported for windows in other layers than llama.cpp has them in, where the header cannot say."""
    period, types = _PERIODS.get(architecture), config.get("layer_types")
    if period is None or not isinstance(types, list) or f"{architecture}.attention.sliding_window_pattern" in fields:
        return
    if not fields.get(f"{architecture}.attention.sliding_window"):
        return
    full = [i for i, kind in enumerate(types) if kind == "full_attention"]
    wanted = list(range(period - 1, len(types), period))
    fault = f"layer_types: full attention in layers {shown(full)}, and llama.cpp has it in {shown(wanted)}"
    _refuse(folder, fault if full != wanted else None)


def check_widths(
    folder: Path, architecture: str, fields: Mapping[str, Any], shapes: Mapping[str, Sequence[int]]
) -> None:
    """Raises Unsupported for an intermediate width that the header cannot say, so that llama.cpp does not load the file."""
    said, down = fields.get(f"{architecture}.feed_forward_length"), shapes.get("blk.0.ffn_down.weight")
    if isinstance(said, int) and down is not None and len(down) == 2 and said not in (0, down[1]):
        _refuse(folder, f"an intermediate width of {down[1]}, and llama.cpp has {said} for {architecture}")


def unseen_window(config: Mapping[str, Any], architecture: str, fields: Mapping[str, Any]) -> int | None:
    """The sliding window that llama.cpp does not apply: up to so many tokens it computes the same. None: there is none."""
    window = config.get("sliding_window")
    applied = fields.get(f"{architecture}.attention.sliding_window") and architecture != "phi3"
    if not isinstance(window, int) or window < 1 or applied or config.get("use_sliding_window") is False:
        return None
    types = config.get("layer_types")
    if isinstance(types, list) and "sliding_attention" not in types:
        return None
    return min(window, int(fields.get(f"{architecture}.{CONTEXT}") or window))


def _refuse(folder: Path, fault: str | None) -> None:
    if fault is not None:
        raise Unsupported(f"{folder}: config.json: {fault}: llama.cpp would compute another model: {INSTEAD}")


def _rope(config: Mapping[str, Any]) -> str:
    given = config.get("rope_parameters") or config.get("rope_scaling") or {}
    return str(given.get("rope_type", given.get("type", "default")))


def _scale(config: Mapping[str, Any]) -> dict[str, bool]:
    """Gemma divides products of queries and keys by the root of a number of its config, llama.cpp by that of a width."""
    scalar, layers = config.get("query_pre_attn_scalar"), _LARGEST.get(str(config.get("model_type")))
    if scalar is None or layers is None:
        return {}
    heads, head = config["num_attention_heads"], config.get("head_dim") or 256
    wanted = config["hidden_size"] // heads if config["num_hidden_layers"] == layers else head
    return {f"query_pre_attn_scalar {shown(scalar)}, and llama.cpp has {wanted}": scalar != wanted}


def _layers_without_rope(config: Mapping[str, Any]) -> dict[str, bool]:
    given = config.get("no_rope_layers")
    if config.get("model_type") != "smollm3" or not isinstance(given, list):
        return {}
    wanted = [int((i + 1) % _NO_ROPE != 0) for i in range(len(given))]
    return {f"no_rope_layers {shown(given)}, and llama.cpp has {shown(wanted)}": given != wanted}
