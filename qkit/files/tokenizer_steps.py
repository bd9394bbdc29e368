"""llama.cpp's name of the pre-tokenizer of a folder, told by the steps of tokenizer.json.

llama.cpp's converter knows pre-tokenizers by what well-known tokenizers make of one text. A tokenizer of the same kind with
another vocabulary is told here.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qkit.errors import Unsupported
from qkit.files.folder import load_json
from qkit.files.safefile import shown
from qkit.files.side_files import MOST_BYTES

_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_BYTES, _BYTES_ALONE = "ByteLevel", "ByteLevel without a regex"
_PRE = {
    (_BYTES,): "gpt-2",
    ("Digits one by one", _BYTES): "smollm",
    (f"Split {_SPLIT % ''}", _BYTES_ALONE): "qwen2",
    (f"Split {_SPLIT % '{1,3}'}", _BYTES_ALONE): "llama-bpe",
}


def pre_tokenizer(folder: Path) -> str:
    """The name. Raises Unsupported for a tokenizer that llama.cpp would not apply in the same way."""
    file = folder / "tokenizer.json"
    if not file.is_file():
        raise Unsupported("no tokenizer.json, and a GGUF file has its tokenizer inside: get the file")
    tokenizer = load_json(file, "tokenizer", MOST_BYTES)
    model = tokenizer.get("model") or {}
    steps = _steps(tokenizer.get("pre_tokenizer"))
    normal = tokenizer.get("normalizer") is None or tokenizer["normalizer"].get("type") == "NFC"
    if model.get("type") != "BPE" or model.get("byte_fallback") or steps not in _PRE or not normal:
        raise Unsupported(
            f"tokenizer.json is a {model.get('type')} tokenizer with the steps {shown(' + '.join(steps) or 'none')}, which "
            "neither llama.cpp's converter knows nor qkit, which tells byte-level BPE as in GPT-2, SmolLM, Qwen 2 and Llama 3"
        )
    return _PRE[steps]


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
