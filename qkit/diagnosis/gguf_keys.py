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
    """Whether a block without a tensor is of the kind that has it: no other leaf of it is one that only other blocks have."""
    having = [other for other in blocks.values() if leaf in other]
    known = _known_leaves()
    own = {other for other in leaves if not known or other.rpartition(".")[0] in known} - set().union(*having)
    return not own


def _known_leaves() -> set[str]:
    """What llama.cpp calls the tensors of a block; empty without the library gguf."""
    try:
        import gguf
    except ImportError:
        return set()
    names = (str(name) for name in gguf.TENSOR_NAMES.values())
    return {name.removeprefix("blk.{bid}.") for name in names if name.startswith("blk.{bid}.")}


def _check_widths(name: str, keys: dict[str, Any], tensors: dict[str, GgufTensor], findings: Findings) -> None:
    width, inner = number_of(keys, f"{name}.embedding_length"), number_of(keys, f"{name}.feed_forward_length")
    wanted: list[tuple[str, int, int | None, str]] = [
        ("token_embd.weight", 0, width, "embedding_length"),
        ("output_norm.weight", 0, width, "embedding_length"),
        ("blk.0.attn_norm.weight", 0, width, "embedding_length"),
        ("blk.0.ffn_gate.weight", 1, inner, "feed_forward_length"),
        ("blk.0.ffn_down.weight", 0, inner, "feed_forward_length"),
        ("blk.0.ffn_gate_exps.weight", 2, number_of(keys, f"{name}.expert_count"), "expert_count"),
    ]
    for tensor, axis, value, key in wanted:
        info = tensors.get(tensor)
        if info is not None and value is not None and axis < len(info.shape) and info.shape[axis] != value:
            _differs(f"{name}.{key}", tensor, value, info.shape[axis], findings)
    _check_heads(name, keys, tensors, findings)


def _differs(key: str, tensor: str, value: int, found: int, findings: Findings) -> None:
    what = f"it is {value}, and {tensor} has {found}"
    findings.fault("config", [key, tensor], what, f"{found}", _CONVERT, 8)


def _check_heads(name: str, keys: dict[str, Any], tensors: dict[str, GgufTensor], findings: Findings) -> None:
    """The rows of queries and keys: heads of one size. Queries may carry a gate of their own size."""
    query, key = (tensors.get(f"blk.0.attn_{leaf}.weight") for leaf in "qk")
    heads = number_of(keys, f"{name}.attention.head_count")
    shared = number_of(keys, f"{name}.attention.head_count_kv") or heads
    if not heads or not shared or query is None or key is None or min(len(query.shape), len(key.shape)) < 2:
        return
    rows, fewer = query.shape[1], key.shape[1]
    if rows * shared in (fewer * heads, 2 * fewer * heads) and fewer % shared == 0:
        return
    found = f"{heads} and {shared}, and blk.0 has {rows} rows of queries and {fewer} of keys"
    where = [f"{name}.attention.head_count", f"{name}.attention.head_count_kv", query.name, key.name]
    findings.fault("config", where, found, "numbers of heads that divide them into heads of one size", _CONVERT, 8)


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
