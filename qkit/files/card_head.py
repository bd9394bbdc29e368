"""The head of a card (README.md): the YAML that the Hugging Face Hub reads, between two lines of ---."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any

from qkit.errors import BadRecipe
from qkit.files.strictyaml import parse_yaml, to_yaml

LAYOUT_TAGS = ("compressed-tensors", "gptq", "awq", "modelopt", "mlx")
_HEAD = re.compile(rb"\A---[ \t]*\r?\n(.*?)^---[ \t]*\r?\n", re.DOTALL | re.MULTILINE)


def with_head(card: bytes, decided: Mapping[str, Any], wanted: Mapping[str, Any], drop: Collection[str] = ()) -> bytes:
    """The card with these fields in its head, which is else as it was.

    decided: replace what is there; wanted: set where nothing is, and lists are added to those that are there; drop: entries
    that such lists lose. Of a head that cannot be read only ``decided`` is set.
    """
    head = _HEAD.match(card)
    text, rest = (head[1], card[head.end() :]) if head else (b"", card)
    found = _read(text)
    fields = {name: value for name, value in decided.items() if found is None or found.get(name) != value}
    for name, value in wanted.items() if found is not None else ():
        there = found[name] if found and name in found else None
        if isinstance(value, list) and isinstance(there, (list, type(None))):
            kept = [entry for entry in there or [] if entry not in drop or entry in value]
            merged = [*kept, *(entry for entry in value if entry not in kept)]
            fields |= {name: merged} if merged != there else {}
        elif there is None and name not in fields:
            fields[name] = value
    for name in fields:
        text = re.sub(rb"^%s:.*\n([ \t-].*\n)*" % re.escape(name.encode()), b"", text, flags=re.MULTILINE)
    text += to_yaml(fields).encode() if fields else b""
    return b"---\n" + text + b"---\n" + rest if text else card


def head_fields(card: bytes) -> dict[str, Any] | None:
    """The fields of the head of a card; None where it is no YAML of names and values."""
    head = _HEAD.match(card)
    return {} if head is None else _read(head[1])


def _read(head: bytes) -> dict[str, Any] | None:
    """The fields of a head; None where it is no YAML of names and values."""
    try:
        found = parse_yaml(head, "card", "README.md")
    except BadRecipe:
        return None
    return {} if found is None else found if isinstance(found, dict) else None
