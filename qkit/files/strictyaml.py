"""A YAML reader for files that people write by hand: small, plain, and strict about anything with two meanings.

Recipes and budgets decide what happens to a model, so a key given twice, an alias or a tag is an error here and not a
rule of precedence to know by heart. The text is read as a stream of events and never reaches a constructor of the YAML
library: what comes out is dicts, lists, str, int, float, bool and None, and nothing else can.

Plain scalars follow the core schema of YAML 1.2: ``true`` and ``false`` are booleans, ``null``, ``~`` and an empty
value are None, ``10`` and ``1e-3`` are numbers, everything else is text: ``no``, ``yes``, ``on``, ``1:30`` and
``2026-01-01`` stay strings, unlike in YAML 1.1.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml

from qkit.errors import BadRecipe, IOFailure

MAX_BYTES = 1_000_000
MAX_DEPTH = 20
MAX_INT = 2**63 - 1

_INT = re.compile(r"[-+]?[0-9]+\Z")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?\Z")
_NOT_FINITE = re.compile(r"([-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN))\Z")
_WORDS: dict[str, bool | None] = {
    **dict.fromkeys(("true", "True", "TRUE"), True),
    **dict.fromkeys(("false", "False", "FALSE"), False),
    **dict.fromkeys(("null", "Null", "NULL", "~", ""), None),
}


class LineDict(dict[str, Any]):
    """A mapping of the file that also knows the line of each key (counted from 1), for errors found later."""

    lines: dict[str, int]


def load_yaml(path: Path, label: str, limit: int = MAX_BYTES) -> Any:
    """The content of a YAML file as plain values; mappings are ``LineDict``. An empty file gives None.

    label: what the file is, for messages: 'recipe', 'budget'; limit: bytes at most.
    Raises BadRecipe, with file and line, for: a file that is too large, not UTF-8, not YAML, more than one document, duplicate
    keys, keys that are not text, anchors, aliases, tags, nesting deeper than 20, integers outside 64 bits, NaN and
    infinity. Raises IOFailure when the file cannot be read.
    """
    if path.exists() and not path.is_file() and not path.is_dir():  # reading could last for ever
        raise BadRecipe(f"{label} {path} is a pipe or a device: use a YAML file")
    try:
        with path.open("rb") as file:
            data = file.read(limit + 1)
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError) as error:
        raise BadRecipe(f"{label} {path}: there is no such file: use the path of a YAML file") from error
    except OSError as error:
        raise IOFailure(f"{label} {path} cannot be read: {error.strerror}") from error
    return parse_yaml(data, label, str(path), limit)


def parse_yaml(data: bytes, label: str, source: str, limit: int = MAX_BYTES) -> Any:
    """``load_yaml`` of bytes in memory; ``source`` names them in messages."""
    where = f"{label} {source}"
    if len(data) > limit:
        raise BadRecipe(f"{where} is larger than {limit} bytes; this cannot be a {label} written by hand")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise BadRecipe(f"{where}: byte {error.start} is not UTF-8; save the file as UTF-8 text") from error
    reader = _YamlReader(where)
    try:
        return reader.document(iter(yaml.parse(text, Loader=yaml.SafeLoader)))
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f", line {mark.line + 1}" if mark else ""
        hint = "; text that starts with '>' needs quotes" if "chomping" in str(error.problem) else ""
        raise BadRecipe(f"{where}{line}: not valid YAML: {error.problem or error.context}{hint}") from error
    except (yaml.YAMLError, ValueError, OverflowError) as error:  # characters, or an escape for one, that do not exist
        raise BadRecipe(f"{where}: not valid YAML: {' '.join(str(error).split())}") from error


def to_yaml(data: Any) -> str:
    """The text of plain values, which ``load_yaml`` reads back as they are."""
    return yaml.dump(data, Dumper=_YamlWriter, sort_keys=False, default_flow_style=None, allow_unicode=True, width=120)


def check_keys(mapping: LineDict, keys: Iterable[str], where: str) -> None:
    """Raises BadRecipe for the first key that is not ``keys``, with its line and the nearest known one."""
    keys = list(keys)
    for key in mapping:
        if key not in keys:
            raise unknown_key(key, keys, f"{where}, line {mapping.lines[key]}")


def unknown_key(key: str, keys: Sequence[str], where: str) -> BadRecipe:
    """The error for a key that nothing here understands; of a dotted key the first part is compared as well."""
    nearest = get_close_matches(key, keys, n=1) or get_close_matches(key.partition(".")[0], keys, n=1)
    advice = f"did you mean '{nearest[0]}'?" if nearest else f"known keys: {', '.join(keys)}"
    return BadRecipe(f"{where}: unknown key {key!r}; {advice}")


class _YamlReader:
    """Builds values from parse events; one instance per file."""

    def __init__(self, where: str) -> None:
        self.where = where

    def document(self, events: Iterator[Any]) -> Any:
        value: Any = None
        documents = 0
        for event in events:
            if isinstance(event, yaml.DocumentStartEvent):
                documents += 1
                if documents > 1:
                    raise self.bad(event, "a second document starts here; write one document per file")
            elif isinstance(event, yaml.NodeEvent):
                value = self.value(event, events, 1)
        return value

    def value(self, event: Any, events: Iterator[Any], depth: int) -> Any:
        if isinstance(event, yaml.AliasEvent):
            raise self.bad(event, f"alias '*{event.anchor}' is not allowed; write the value out")
        if event.anchor is not None:
            raise self.bad(event, f"anchor '&{event.anchor}' is not allowed; write the value out where it is needed")
        if event.tag is not None:
            raise self.bad(event, f"tag {event.tag!r} is not allowed; write plain values")
        if depth > MAX_DEPTH:
            raise self.bad(event, f"nested deeper than {MAX_DEPTH} levels")
        if isinstance(event, yaml.SequenceStartEvent):
            return self.sequence(events, depth)
        if isinstance(event, yaml.MappingStartEvent):
            return self.mapping(events, depth)
        return self.scalar(event)

    def sequence(self, events: Iterator[Any], depth: int) -> list[Any]:
        items = []
        for event in events:
            if isinstance(event, yaml.SequenceEndEvent):
                break
            items.append(self.value(event, events, depth + 1))
        return items

    def mapping(self, events: Iterator[Any], depth: int) -> LineDict:
        result = LineDict()
        result.lines = {}
        for event in events:
            if isinstance(event, yaml.MappingEndEvent):
                break
            if not isinstance(event, yaml.ScalarEvent):
                raise self.bad(event, "a key must be plain text")
            self.value(event, events, depth + 1)  # refuses anchors and tags on keys too
            key = event.value
            if not key or not key.isprintable():
                raise self.bad(event, f"key {key!r} is empty or has characters that cannot be printed")
            if key in result:
                raise self.bad(event, f"key {key!r} is given twice, first on line {result.lines[key]}; keep one")
            result.lines[key] = _line(event)
            result[key] = self.value(next(events), events, depth + 1)
        return result

    def scalar(self, event: Any) -> Any:
        text: str = event.value
        if not event.implicit[0]:  # quoted or a block: text as it stands
            return text
        if text in _WORDS:
            return _WORDS[text]
        if _NOT_FINITE.match(text):
            raise self.bad(event, f"{text} is not a number that can be used here: use a finite one")
        if _INT.match(text):
            if len(text) > 20 or abs(int(text)) > MAX_INT:
                raise self.bad(event, f"integer {text[:24]} of {len(text)} characters does not fit 64 bits")
            return int(text)
        if _FLOAT.match(text):
            number = float(text)
            if not math.isfinite(number):
                raise self.bad(event, f"number {text[:24]} is too large")
            return number
        return text

    def bad(self, event: Any, problem: str) -> BadRecipe:
        return BadRecipe(f"{self.where}, line {_line(event)}: {problem}")


class _YamlWriter(yaml.SafeDumper):
    """Writes every value out, and quotes text that the reader would take for something else."""

    def ignore_aliases(self, data: Any) -> bool:
        return True

    def serialize(self, node: yaml.Node) -> None:
        """The outermost mapping has a line for each key, also where all values are plain."""
        if isinstance(node, yaml.MappingNode):
            node.flow_style = False
        super().serialize(node)


def _quoted(writer: _YamlWriter, text: str) -> yaml.ScalarNode:
    plain = text not in _WORDS and not any(pattern.match(text) for pattern in (_INT, _FLOAT, _NOT_FINITE))
    return writer.represent_scalar("tag:yaml.org,2002:str", text, style=None if plain else '"')


_YamlWriter.add_representer(str, _quoted)


def _line(event: Any) -> int:
    line: int = event.start_mark.line
    return line + 1
