"""The keys of a GGUF file against its tensors: counts, widths, the tokenizer, what is lost."""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

from qkit.diagnosis.findings import Findings
from qkit.diagnosis.opened import AGAIN
from qkit.diagnosis.sidefiles import template_fault
from qkit.files.gguf import TYPES, GgufHeader, GgufTensor

_BLOCK = re.compile(r"blk\.(\d{1,6})\.(.+)")
_NEEDED = ("block_count", "embedding_length", "context_length", "attention.head_count")
_TOKENIZER = "tokenizer.ggml"
_MERGED = ("gpt2",)  # kinds of tokenizers that cannot do without merges
_CONVERT = "convert the model again"


def check_keys(header: GgufHeader, findings: Findings) -> None:
    """The keys by themselves, and against the tensors."""
    keys, tensors = header.values, {t.name: t for t in header.tensors}
    name = keys.get("general.architecture")
    if not isinstance(name, str):
        findings.fault(
            "config", "general.architecture", "the key is not there", "the architecture of the model", AGAIN, 9
        )
        return
    for t in header.tensors:
        if t.nbytes is None:
            findings.fault(
                "unknown types",
                t.name,
                f"its type is {t.dtype}",
                f"one of {', '.join(sorted(n for n, _, _ in TYPES.values()))}",
                "convert the model again, with a type that llama.cpp has",
                8,
            )
    if name in ("clip", "mmproj"):
        return
    for key in _NEEDED:
        if f"{name}.{key}" not in keys:
            findings.fault("config", f"{name}.{key}", "the key is not there", "a number", _CONVERT, 8)
    _check_blocks(name, keys, tensors, findings)
    _check_widths(name, keys, tensors, findings)
    _check_tokenizer(header, tensors, findings)


def number_of(keys: dict[str, Any], name: str) -> int | None:
    """A whole number of the header; of a list whose entries are equal, one of them."""
    value = keys.get(name)
    if isinstance(value, list) and value and len(set(value)) == 1:
        value = value[0]
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _check_blocks(name: str, keys: dict[str, Any], tensors: dict[str, GgufTensor], findings: Findings) -> None:
    for needed in ("token_embd.weight", "output_norm.weight"):
        if needed not in tensors and not (
            needed == "output_norm.weight"
            and any("output_norm" in n or ("_norm" in n and "blk" not in n) for n in tensors)
        ):
            findings.fault("lost tensors", needed, "the tensor is not in the file", "one in every model", _CONVERT, 9)
    blocks: dict[int, set[str]] = {}
    for tensor in tensors:
        if match := _BLOCK.fullmatch(tensor):
            blocks.setdefault(int(match[1]), set()).add(match[2])
    count = number_of(keys, f"{name}.block_count")
    extra = number_of(keys, f"{name}.nextn_predict_layers") or 0
    if count is not None and blocks and max(blocks) + 1 not in (count, count + extra, count - extra):
        findings.fault(
            "config",
            f"{name}.block_count",
            f"{count}, and the file has blocks up to {max(blocks)}",
            f"{max(blocks) + 1}",
            _CONVERT,
            9,
        )
    missing = sorted(set(range(min(count or 0, 10_000))) - set(blocks)) if blocks else []
    if missing and missing[0] < max(blocks):
        findings.fault(
            "lost tensors",
            [f"blk.{i}" for i in missing],
            "the block is not in the file",
            f"{count} blocks",
            _CONVERT,
            9,
        )
    usual = Counter(leaf for leaves in blocks.values() for leaf in leaves)
    for number, leaves in sorted(blocks.items()):
        for leaf, times in usual.items():
            if (
                leaf not in leaves
                and times >= min(0.75 * len(blocks), len(blocks) - 1)
                and len(blocks) > 2
                and _of_one_kind(leaf, leaves, blocks)
            ):
                findings.fault(
                    "lost tensors",
                    f"blk.{number}.{leaf}",
                    f"the tensor is not in the file, and {times} of {len(blocks)} blocks have it",
                    "the same tensors in each block",
                    _CONVERT,
                    8,
                )
    if extra and count is not None and max(blocks, default=0) < count - extra:
        findings.fault(
            "lost MTP layers",
            f"{name}.nextn_predict_layers",
            f"it is {extra}, and no block of that kind is there",
            f"{extra} blocks",
            _CONVERT,
            7,
        )


def _of_one_kind(leaf: str, leaves: set[str], blocks: dict[int, set[str]]) -> bool:
    """Whether a block without a tensor is of the kind that has it: no other leaf of it is one that only such blocks have."""
    having = [other for other in blocks.values() if leaf in other]
    usual = Counter(other for found in blocks.values() for other in found)
    own = {other for other in leaves if usual[other] > 1} - set().union(*having)
    return not own


def _check_widths(name: str, keys: dict[str, Any], tensors: dict[str, GgufTensor], findings: Findings) -> None:
    width = number_of(keys, f"{name}.embedding_length")
    heads, shared = number_of(keys, f"{name}.attention.head_count"), number_of(keys, f"{name}.attention.head_count_kv")
    size = number_of(keys, f"{name}.attention.key_length") or (width // heads if width and heads else None)
    keys_of = (shared or heads or 0) * size if size and heads else None
    wanted: list[tuple[str, int, int | None, str]] = [
        ("token_embd.weight", 0, width, "embedding_length"),
        ("output_norm.weight", 0, width, "embedding_length"),
        ("blk.0.attn_norm.weight", 0, width, "embedding_length"),
        ("blk.0.ffn_gate.weight", 1, number_of(keys, f"{name}.feed_forward_length"), "feed_forward_length"),
        ("blk.0.ffn_up.weight", 1, number_of(keys, f"{name}.feed_forward_length"), "feed_forward_length"),
        ("blk.0.attn_q.weight", 1, heads * size if heads and size else None, "attention.head_count times the length of a key"),
        ("blk.0.attn_k.weight", 1, keys_of, "attention.head_count_kv times the length of a key"),
        ("blk.0.ffn_gate_exps.weight", 2, number_of(keys, f"{name}.expert_count"), "expert_count"),
    ]  # fmt: skip
    gated = name not in ("qwen3next", "qwen35", "qwen35moe")  # their queries carry a gate
    for tensor, axis, value, key in wanted:
        info = tensors.get(tensor)
        if info is None or value is None or axis >= len(info.shape) or info.shape[axis] == value:
            continue
        if tensor.endswith(("ffn_up.weight", "attn_q.weight")) and not gated:
            continue
        if tensor.endswith("ffn_up.weight") and info.shape[axis] == 2 * value:  # gate and up in one
            continue
        findings.fault(
            "config",
            [f"{name}.{key.partition(' ')[0]}", tensor],
            f"{key} is {value}, and {tensor} has {info.shape[axis]}",
            f"{info.shape[axis]}",
            _CONVERT,
            8,
        )


def _check_tokenizer(header: GgufHeader, tensors: dict[str, GgufTensor], findings: Findings) -> None:
    keys, lengths = header.values, header.lengths
    tokens = lengths.get(f"{_TOKENIZER}.tokens")
    if tokens is None or f"{_TOKENIZER}.model" not in keys:
        findings.fault(
            "tokenizer",
            f"{_TOKENIZER}.tokens",
            "no tokenizer is in the file",
            "the tokenizer of the model",
            "convert the model again, with its tokenizer",
            7,
        )
        return
    table = tensors.get("token_embd.weight")
    rows = table.shape[1] if table is not None and len(table.shape) > 1 else None
    if rows is not None and rows != tokens:
        findings.fault(
            "vocabulary",
            "token_embd.weight",
            f"it has {rows} rows, and the tokenizer {tokens} tokens",
            "as many rows as tokens",
            _CONVERT,
            8,
        )
    size = number_of(keys, f"{keys['general.architecture']}.vocab_size")
    if size is not None and size != tokens:
        findings.fault(
            "vocabulary",
            f"{keys['general.architecture']}.vocab_size",
            f"{size}, and the tokenizer has {tokens} tokens",
            str(tokens),
            _CONVERT,
            7,
        )
    for key in ("token_type", "scores"):
        found = lengths.get(f"{_TOKENIZER}.{key}")
        if found is not None and found != tokens:
            findings.fault(
                "tokenizer", f"{_TOKENIZER}.{key}", f"{found} entries for {tokens} tokens", "one for each", _CONVERT, 7
            )
    if keys.get(f"{_TOKENIZER}.model") in _MERGED and not lengths.get(f"{_TOKENIZER}.merges"):
        findings.fault(
            "tokenizer", f"{_TOKENIZER}.merges", "there are none", "the merges of a BPE tokenizer", _CONVERT, 7
        )
    for key, value in keys.items():
        if key.startswith(_TOKENIZER) and key.endswith("_token_id") and isinstance(value, int) and value >= tokens:
            findings.fault("special tokens", key, f"{value} of {tokens} tokens", f"a token below {tokens}", _CONVERT, 7)
    template = keys.get("tokenizer.chat_template")
    if template is None:
        findings.note("chat template", "tokenizer.chat_template", "there is none: engines take a default")
    elif isinstance(template, str) and (fault := template_fault(template)) is not None:
        findings.fault(
            "chat template", "tokenizer.chat_template", f"it cannot be parsed: {fault}", "a jinja template", _CONVERT, 7
        )
