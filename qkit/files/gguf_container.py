"""The container of a GGUF file: which models llama.cpp runs, and what it has to know of them besides the weights.

What the library gguf knows is taken from it: names of tensors, keys, special tokens. What is ours is the table of
architectures, with what llama.cpp computes for them, so that a model which computes something else is refused; and the name of
the pre-tokenizer, which is told by the steps of tokenizer.json.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qkit.errors import Unsupported
from qkit.files.folder import load_json
from qkit.files.safefile import shown
from qkit.files.side_files import MOST_BYTES
from qkit.system.extras import needs, require

MODEL = "model.gguf"
SCALE = ".scale"  # behind the name of a linear: what the products of its NVFP4 weight are multiplied with
ROPE = "rope_freqs.weight"  # the tensor of a container's factors of frequencies
WHAT = "a result in GGUF"
# By model_type: llama.cpp's architecture, and whether it wants the rows of q and k in pairs (its RoPE turns neighbours).
ARCHITECTURES = {
    "llama": ("llama", True),
    "mistral": ("llama", True),
    "qwen2": ("qwen2", False),
    "qwen3": ("qwen3", False),
}
_PAIRED = {"attn_q": "num_attention_heads", "attn_k": "num_key_value_heads"}
_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# llama.cpp's name of a pre-tokenizer, by its steps.
_BYTES, _BYTES_ALONE = "ByteLevel", "ByteLevel without a regex"
_PRE = {
    (_BYTES,): "gpt-2",
    ("Digits one by one", _BYTES): "smollm",
    (f"Split {_SPLIT % ''}", _BYTES_ALONE): "qwen2",
    (f"Split {_SPLIT % '{1,3}'}", _BYTES_ALONE): "llama-bpe",
}
_ROPES = ("default", "linear", "llama3")
_NORMAL, _CONTROL, _USER, _UNUSED = 1, 3, 4, 5  # types of tokens


@dataclass(frozen=True)
class Container:
    """What llama.cpp has to know of a model.

    architecture: as llama.cpp calls it; fields: {key: value} of its hyperparameters and the tokenizer, in the types of Python
    names: {tensor of the checkpoint: (its name in GGUF, heads whose rows are interleaved, 0: none)}
    rope: float32 factors of the frequencies, a tensor of their own; None where they are not changed
    """

    architecture: str
    fields: dict[str, Any]
    names: dict[str, tuple[str, int]]
    rope: list[float] | None


def container(folder: Path, config: Mapping[str, Any], tensors: list[str]) -> Container:
    """The container of a model. tensors: of the result, by their names in the checkpoint.

    Raises Unsupported for a model that llama.cpp does not run, or computes differently, and without the library gguf.
    """
    require(WHAT, "gguf", "gguf")
    kind = str(config.get("model_type"))
    if kind not in ARCHITECTURES:
        raise Unsupported(
            f"{folder}: model_type {shown(kind)}, and qkit writes GGUF for {', '.join(ARCHITECTURES)}: use another scheme, for "
            "instance w4a16"
        )
    architecture, paired = ARCHITECTURES[kind]
    _check_computation(folder, config)
    rope = _rope(config)
    return Container(
        architecture,
        {**_fields(architecture, config, rope), **tokenizer_fields(folder, int(config["vocab_size"]))},
        _names(folder, architecture, config, tensors, paired),
        _rope_factors(config, rope) if rope["rope_type"] == "llama3" else None,
    )


def _check_computation(folder: Path, config: Mapping[str, Any]) -> None:
    rope_type = _rope(config)["rope_type"]
    refused = {
        f"hidden_act {shown(config.get('hidden_act'))}, expected silu": config.get("hidden_act")
        not in ("silu", "swish"),
        f"rope_type {shown(rope_type)}, expected one of {', '.join(_ROPES)}": rope_type not in _ROPES,
        "use_sliding_window is on, and llama.cpp lets every token see all before it": bool(
            config.get("use_sliding_window")
        ),
        "a rotary embedding for a part of each head": config.get("partial_rotary_factor") not in (None, 1, 1.0),
    }
    fault = next((text for text, wrong in refused.items() if wrong), None)
    if fault is not None:
        raise Unsupported(f"{folder}: config.json: {fault}: llama.cpp would compute another model; use another scheme")


def _rope(config: Mapping[str, Any]) -> dict[str, Any]:
    """What config.json says of RoPE, in the newer spelling."""
    given = config.get("rope_parameters") or config.get("rope_scaling") or {}
    return {"rope_theta": config.get("rope_theta", 10000.0), "rope_type": given.get("type", "default"), **given}


def _head_size(config: Mapping[str, Any]) -> int:
    return int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])


def _fields(architecture: str, config: Mapping[str, Any], rope: Mapping[str, Any]) -> dict[str, Any]:
    heads, size = int(config["num_attention_heads"]), _head_size(config)
    fields: dict[str, Any] = {
        "block_count": int(config["num_hidden_layers"]),
        "context_length": int(config["max_position_embeddings"]),
        "embedding_length": int(config["hidden_size"]),
        "feed_forward_length": int(config["intermediate_size"]),
        "attention.head_count": heads,
        "attention.head_count_kv": int(config.get("num_key_value_heads") or heads),
        "attention.key_length": size,
        "attention.value_length": size,
        "attention.layer_norm_rms_epsilon": float(config["rms_norm_eps"]),
        "rope.dimension_count": size,
        "rope.freq_base": float(rope["rope_theta"]),
        "vocab_size": int(config["vocab_size"]),
    }
    if rope["rope_type"] == "linear":
        fields["rope.scaling.type"] = "linear"
        fields["rope.scaling.factor"] = float(rope["factor"])
    return {f"{architecture}.{key}": value for key, value in fields.items()}


def _rope_factors(config: Mapping[str, Any], rope: Mapping[str, Any]) -> list[float]:
    """What llama.cpp divides the frequencies by, for Llama 3's scaling of RoPE."""
    size, factor = _head_size(config), float(rope["factor"])
    low, high = float(rope["low_freq_factor"]), float(rope["high_freq_factor"])
    original = float(rope["original_max_position_embeddings"])
    factors = []
    for i in range(0, size, 2):
        wavelength = 2 * math.pi * float(rope["rope_theta"]) ** (i / size)
        smooth = (original / wavelength - low) / (high - low)
        factors.append(1.0 if smooth > 1 else factor if smooth < 0 else 1 / ((1 - smooth) / factor + smooth))
    return factors


def _names(
    folder: Path, architecture: str, config: Mapping[str, Any], tensors: list[str], paired: bool
) -> dict[str, tuple[str, int]]:
    with needs(WHAT, "gguf"):
        import gguf
    arch = next(a for a, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    known = gguf.get_tensor_name_map(arch, int(config["num_hidden_layers"]))
    names: dict[str, tuple[str, int]] = {}
    for tensor in tensors:
        found = known.get_name(tensor, try_suffixes=(".weight", ".bias", SCALE))
        if found is None:
            raise Unsupported(
                f"{folder}: llama.cpp's {architecture} has no place for tensor {shown(tensor)}: use another scheme, for "
                "instance w4a16"
            )
        leaf = found.split(".")[-2]
        rows = paired and leaf in _PAIRED and not found.endswith(SCALE)
        heads = int(config.get(_PAIRED[leaf]) or config["num_attention_heads"]) if rows else 0
        names[tensor] = (found, heads)
    return names


# ---- the tokenizer ---------------------------------------------------------------------------------------------


def tokenizer_fields(folder: Path, vocabulary: int) -> dict[str, Any]:
    """The keys of the tokenizer in a folder. Raises Unsupported for one that llama.cpp would not apply in the same way."""
    with needs(WHAT, "gguf"):
        import gguf
    if not (folder / "tokenizer.json").is_file():
        raise Unsupported(f"{folder}: no tokenizer.json, and a GGUF file has its tokenizer inside: get the file")
    tokenizer = load_json(folder / "tokenizer.json", "tokenizer", MOST_BYTES)
    model = tokenizer.get("model") or {}
    steps = _steps(tokenizer.get("pre_tokenizer"))
    normal = tokenizer.get("normalizer") is None or tokenizer["normalizer"].get("type") == "NFC"
    if model.get("type") != "BPE" or model.get("byte_fallback") or steps not in _PRE or not normal:
        raise Unsupported(
            f"{folder / 'tokenizer.json'}: a {model.get('type')} tokenizer with the steps "
            f"{shown(' + '.join(steps) or 'none')}, and qkit knows how llama.cpp writes "
            "byte-level BPE as in GPT-2, SmolLM, Qwen 2 and Llama 3: use another scheme"
        )
    tokens = {i: (text, _NORMAL) for text, i in model["vocab"].items()}
    for added in tokenizer.get("added_tokens") or ():
        tokens[added["id"]] = (added["content"], _CONTROL if added.get("special") else _USER)
    if tokens and max(tokens) >= vocabulary:
        raise Unsupported(
            f"{folder / 'tokenizer.json'}: token {max(tokens)} and a vocabulary of {vocabulary} in config.json: use a "
            "tokenizer of this model"
        )
    listed = [tokens.get(i, (f"[PAD{i}]", _UNUSED)) for i in range(vocabulary)]
    special = gguf.SpecialVocab(folder, load_merges=True, n_vocab=vocabulary)
    keys: dict[str, Any] = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": _PRE[steps],
        "tokenizer.ggml.tokens": [text for text, _ in listed],
        "tokenizer.ggml.token_type": [kind for _, kind in listed],
        "tokenizer.ggml.merges": list(special.merges),
        "tokenizer.ggml.add_bos_token": bool(special.add_special_token.get("bos", False)),
    }
    names = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding", "eot": "eot", "eom": "eom"}
    keys |= {f"tokenizer.ggml.{names[k]}_token_id": i for k, i in special.special_token_ids.items() if k in names}
    if isinstance(special.chat_template, str):
        keys["tokenizer.chat_template"] = special.chat_template
    return keys


def _steps(pre: Mapping[str, Any] | None) -> tuple[str, ...]:
    """The steps of a pre-tokenizer in words."""
    if pre is None:
        return ()
    if pre.get("type") == "Sequence":
        return tuple(step for inner in pre.get("pretokenizers") or () for step in _steps(inner))
    if pre.get("type") == "ByteLevel" and not pre.get("add_prefix_space"):
        return (_BYTES if pre.get("use_regex", True) else _BYTES_ALONE,)
    if pre.get("type") == "Digits" and pre.get("individual_digits"):
        return ("Digits one by one",)
    if pre.get("type") == "Split" and pre.get("behavior") == "Isolated" and not pre.get("invert"):
        return (f"Split {(pre.get('pattern') or {}).get('Regex')}",)
    return (str(pre.get("type")),)
