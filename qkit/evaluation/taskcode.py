"""The search for code in a folder of lm-eval tasks, by reading, before anything of it is loaded.

A task file is YAML, and yet it can run code: ``!function`` imports a Python file, other tags build objects, some keys
ask for scripts, a metric that lm-eval does not know is looked up as a script, and templates are rendered without a
sandbox. Here the YAML is only composed into nodes, which constructs nothing; whatever is not plainly data is code.
"""

from __future__ import annotations

import re
from collections.abc import Container, Iterator
from pathlib import Path

import yaml

from qkit.errors import BadInput, Unsupported

MAX_BYTES = 1_000_000
PLAIN_TAGS = frozenset(
    f"tag:yaml.org,2002:{kind}" for kind in ("str", "int", "float", "bool", "null", "seq", "map", "timestamp", "merge")
)
# keys whose very presence asks for a script, unless they are set to false
CODE_KEYS = ("class", "custom_dataset", "hf_evaluate", "trust_remote_code", "unsafe_code", "use_prompt")
# {{name}}, {{name.field.strip()}}, {{name[0]}}, {{name['field']}}, {{name[other]}}: no underscore leads any part
_PART = r"[A-Za-z][A-Za-z0-9_]*"
_PLAIN = re.compile(
    r"\{\{-?\s*" + _PART + r"(?:\." + _PART + r"(?:\(\))?|\[-?\d+\]|\[(['\"])" + _PART + r"\1\])*"
    r"(?:\[" + _PART + r"\])?\s*-?\}\}"
)


def refuse_task_code(folder: Path, metrics: Container[str]) -> None:
    """Raises Unsupported, naming file and line, when a task file under ``folder``, or one that it includes, could run
    code; BadInput when the folder or a file cannot be read. ``metrics``: the names of metrics that lm-eval has."""
    if not folder.is_dir():
        raise BadInput(f"{folder} is not a folder; --task-dir must be a folder of lm-eval task files")
    waiting, visited = sorted(folder.glob("**/*.yaml")), set[Path]()
    while waiting:
        path = waiting.pop().resolve()
        if path in visited:
            continue
        visited.add(path)
        for key, node in _nodes(path):
            reason = _reason(key, node, metrics)
            if reason is not None:
                raise Unsupported(
                    f"{path}, line {node.start_mark.line + 1}: {reason}; it could run code on this machine: "
                    "read the file, then add --allow-task-code if you trust it"
                )
            if key == "include" and isinstance(node, yaml.ScalarNode):
                waiting.append(path.parent / node.value)


def _nodes(path: Path) -> Iterator[tuple[str, yaml.Node]]:
    """Every node of a file, each with the key of the mapping that it is under ('' at the top)."""
    if path.exists() and not path.is_file():  # a pipe would block
        raise BadInput(f"task file {path} is not a file; remove it from the folder")
    try:
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise BadInput(f"task file {path} cannot be read: {error.strerror}") from error
    if len(data) > MAX_BYTES:
        raise BadInput(f"task file {path} is larger than {MAX_BYTES} bytes; keep the data in a file of its own")
    try:
        root = yaml.compose(data.decode("utf-8-sig"), Loader=yaml.SafeLoader)
    except (yaml.YAMLError, ValueError, OverflowError, RecursionError) as error:
        raise BadInput(f"task file {path} is not valid YAML: {' '.join(str(error).split())}") from error
    waiting = [("", root)] if root is not None else []
    visited = set[int]()
    while waiting:
        key, node = waiting.pop()
        yield key, node
        if id(node) in visited:  # an alias may lead back to where it stands
            continue
        visited.add(id(node))
        if isinstance(node, yaml.SequenceNode):
            waiting += [(key, item) for item in node.value]
        elif isinstance(node, yaml.MappingNode):
            for name, value in node.value:
                waiting += [("", name), (name.value if isinstance(name, yaml.ScalarNode) else "", value)]


def _reason(key: str, node: yaml.Node, metrics: Container[str]) -> str | None:
    if node.tag not in PLAIN_TAGS:
        return f"tag {node.tag!r}"
    is_scalar = isinstance(node, yaml.ScalarNode)
    if key in CODE_KEYS and not (is_scalar and node.value.lower() in ("false", "no", "null", "")):
        return f"key {key!r}"
    if not is_scalar:
        return None
    if key == "metric" and node.value not in metrics:
        return f"metric {node.value!r}, which lm-eval does not have, would be loaded as a script"
    if key == "dataset_path" and node.value in ("pandas", "webdataset"):
        return f"data sets of the kind {node.value!r} can hold pickled objects"
    if re.search(r"\{[{%#]", _PLAIN.sub("", node.value)):
        return "a template that does more than insert fields"
    return None
