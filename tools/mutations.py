"""Seeded mutations of files: bytes of any, and nodes of JSON. The same random numbers give the same file."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

DEEP = "@deep@"  # a string that is written as nested brackets instead
_WORDS = (
    "", " ", "x", "\0", "\ud800", "\u202e", "a" * 3000, "../x", "/etc/passwd", "..", "float16", "torch.bfloat16", "auto",
    "true", "1", "1e400", "re:(a+)+$", "re:[", "re:(.*)*(.*)*(.*)*x", "*", "[!a", "Linear", "model", "gpt2", "mamba", "llama",
    "gemma3", "mixtral", "LlamaForCausalLM", "LlamaModel", "BertModel", "w4a16", "int8", "gptq", "__class__", "{{ x }}",
)  # fmt: skip
_NUMBERS = (
    0, 1, -1, 2, 3, 7, 64, 1000, 2**15, 2**31 - 1, 2**31, 2**32, 2**53 + 1, 2**63, -(2**63), 10**30, 10**300, 0.5, -0.0, 1e-320,
    1e308, -1e308, float("nan"), float("inf"), float("-inf"),
)  # fmt: skip
_SHAPES: tuple[Any, ...] = (
    None, True, False, [], {}, [[]], [{}], [None], {"": None}, {"a": {"b": []}}, [0] * 300, ["x"] * 300, [1, "1"], DEEP,
    {"__float__": "Infinity"}, {"__float__": "x"}, {"model_type": "llama"}, {"rope_type": "yarn"}, {"quant_method": "gptq"},
)  # fmt: skip

_PIECES = (b"\xff\xfe", b"\n", b"{", b"[" * 2000, b'"', b"\xed\xa0\x80", b"- ", b": ", b"&a ", b"*a")


def nodes(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The places of all values in a JSON document, the document itself first."""
    yield path
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in inside:
        yield from nodes(child, (*path, key))


def at(value: Any, path: tuple[Any, ...]) -> Any:
    """The value at a place."""
    for key in path:
        value = value[key]
    return value


def other(value: Any, rng: random.Random) -> Any:
    """What a value might become: something near it, or anything."""
    if rng.random() < 0.4:
        if isinstance(value, bool):
            return not value
        if isinstance(value, (int, float)):
            return rng.choice(
                (value + 1, value - 1, value * 2, -value, value // 2, value * 1000, float(value), str(value))
            )
        if isinstance(value, str) and value:
            cut = rng.randrange(len(value))
            near = (value[:cut], value[cut:], value.upper(), value + value, value + "x", [value], value[:cut] + "\n")
            return rng.choice(near)
        if isinstance(value, list) and value:
            return rng.choice((value[1:], value * 2, value[::-1], value[0], dict(enumerate(map(str, value)))))
        if isinstance(value, dict) and value:
            return rng.choice(([*value], [*value.values()], next(iter(value.values())), [value]))
    return copy.deepcopy(rng.choice(rng.choice((_WORDS, _NUMBERS, _SHAPES))))


def mutated_json(document: Any, rng: random.Random, favourite: tuple[Any, ...] = ()) -> bytes:
    """The document with one to three nodes changed, removed, doubled or exchanged; favourite: the place to do that below."""
    document = copy.deepcopy(document)
    double = ""
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        try:
            start = favourite if rng.random() < 0.5 else ()
            places = list(nodes(at(document, start), start))
        except (KeyError, IndexError, TypeError):
            places = list(nodes(document))
        path = rng.choice(places)
        if not path:
            if rng.random() < 0.1:
                document = other(document, rng)
            continue
        parent, key = at(document, path[:-1]), path[-1]
        action = rng.random()
        if action < 0.65:
            parent[key] = other(parent[key], rng)
        elif action < 0.77:
            del parent[key]
        elif action < 0.87:
            parent[key] = copy.deepcopy(at(document, rng.choice(places)))
        elif isinstance(parent, dict) and action < 0.95:
            parent[rng.choice((str(key) + "x", str(key).upper(), rng.choice(_WORDS)))] = parent.pop(key)
        else:
            double = str(key)
    try:
        text = json.dumps(document, ensure_ascii=rng.random() < 0.7)
    except ValueError:
        return b"{}"
    depth = rng.choice((70, 500, 5000, 100_000))
    text = text.replace(f'"{DEEP}"', "[" * depth + "]" * depth)
    if double:
        text = text.replace(f'"{double}":', f'"{double}": 1, "{double}":', 1)
    return text.encode("utf-8", "surrogatepass")


def mutated_bytes(data: bytes, rng: random.Random) -> bytes:
    """The bytes with one to four places flipped, cut out, doubled or filled in, or with an end that is missing."""
    found = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 4))):
        size = len(found)
        place, length = rng.randrange(size + 1), rng.choice((1, 1, 2, 8, 100))
        action = rng.randrange(8)
        if action == 0 and size:
            found[place % size] ^= 1 << rng.randrange(8)
        elif action == 1:
            del found[place:]
        elif action == 2:
            del found[place : place + length]
        elif action == 3:
            found[place:place] = bytes(rng.randrange(256) for _ in range(length))
        elif action == 4:
            found[place:place] = found[max(0, place - length) : place]
        elif action == 5:
            found[place : place + length] = b"\0" * length
        elif action == 6:
            found[place:place] = rng.choice(_PIECES)
        elif action == 7 and size:
            found[place % size] = rng.randrange(256)
    return bytes(found)


def mutated_json_file(file: Path, rng: random.Random, favourite: tuple[Any, ...] = (), bytewise: float = 0.15) -> bytes:
    """A JSON file with nodes changed, or, as often as ``bytewise`` says, bytes."""
    data = file.read_bytes()
    if rng.random() < bytewise:
        return mutated_bytes(data, rng)
    return mutated_json(json.loads(data), rng, favourite)


def mutated_yaml(document: dict[str, Any], text: bytes, rng: random.Random) -> bytes:
    """JSON is YAML; one in three is changed as the text that people write."""
    if rng.random() < 0.35:
        return mutated_bytes(text, rng)
    return mutated_json(document, rng, ("rules",))
