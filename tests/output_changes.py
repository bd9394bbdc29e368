"""Every way to change one thing in a folder that qkit wrote: each field of its JSON files, each file, what should not be there.

``tools/mutate_output.py`` makes all of them on folders of several kinds, the tests a part.
"""

import copy
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Changes that change nothing of the result, by the pattern of their names, with the reason.
HARMLESS: dict[str, str] = {
    r"(^|/)README\.md: (bit of byte \d+ flipped|emptied|cut|longer|removed)$": "its owner edits the card: a note says so",
}


# What loaders look for, code, pickles, and what looks harmless.
ADDED = (
    *("adapter_config.json", "chat_template.jinja", "modeling_llama.py", "pytorch_model.bin"),
    *("model-00001-of-00002.safetensors", "notes.txt", ".hidden", "merges.txt", "preprocessor_config.json"),
    *("special_tokens_map.json", "vocab.json", "x/y.json"),
)


@dataclass(frozen=True)
class Change:
    """name: file, place and kind; expected: what the place that verify names has to hold; make: does it, in a copy."""

    name: str
    expected: str
    make: Callable[[Path], None]


def changes(out: Path) -> Iterator[Change]:
    """All changes of the folder ``out``, which stays as it is."""
    files = sorted(str(p.relative_to(out)) for p in out.rglob("*") if p.is_file())
    for name in files:
        yield from _of_bytes(name, (out / name).stat().st_size)
        if Path(name).name in ("config.json", "qkit.json"):
            yield from _of_fields(name, json.loads((out / name).read_bytes()))
        if Path(name).name == "tokenizer.json":
            yield _swapped_ids(name)
    for folder in sorted({"", *(f"{Path(name).parent}/" for name in files if "/" in name)}):
        yield from _added(out, folder)


def _of_bytes(name: str, size: int) -> Iterator[Change]:
    def flip(at: int) -> Callable[[Path], None]:
        def make(out: Path) -> None:
            data = bytearray((out / name).read_bytes())
            data[at] ^= 1
            (out / name).write_bytes(data)

        return make

    def link(out: Path) -> None:
        shutil.move(out / name, out.parent / "elsewhere")
        (out / name).symlink_to(out.parent / "elsewhere")

    def folder(out: Path) -> None:
        (out / name).unlink()
        (out / name).mkdir()

    def pipe(out: Path) -> None:
        (out / name).unlink()
        os.mkfifo(out / name)

    for place in sorted({0, size // 3, size // 2, size - 1} if size else ()):
        yield Change(f"{name}: bit of byte {place} flipped", name, flip(place))
    if size:
        yield Change(f"{name}: emptied", name, lambda out: (out / name).write_bytes(b""))
        yield Change(f"{name}: cut", name, lambda out: (out / name).write_bytes((out / name).read_bytes()[: size // 2]))
    yield Change(f"{name}: longer", name, lambda out: (out / name).write_bytes((out / name).read_bytes() + b"\n"))
    yield Change(f"{name}: removed", name, lambda out: (out / name).unlink())
    yield Change(f"{name}: renamed", name, lambda out: (out / name).rename(out / f"{name}.old"))
    yield Change(f"{name}: made a link", name, link)
    yield Change(f"{name}: made a folder", name, folder)
    yield Change(f"{name}: made a pipe", name, pipe)


def _of_fields(name: str, document: dict[str, Any]) -> Iterator[Change]:
    """Every field deleted and given other values; fields added to every object of the two upper levels."""
    packed = name in ("config.json", "transformer/config.json")  # of which the record has every field
    for path in _leaves(document):
        node = document
        for key in path:
            node = node[key]
        place = ".".join(map(str, path))
        expected = f"{name}: {place}" if packed and path[0] != "quantization_config" else name
        for kind, new in _edits(node):
            yield Change(f"{name}: {place} {kind}", expected, _write(name, document, path, new))
        yield Change(
            f"{name}: {place} deleted", expected if isinstance(path[-1], str) else name, _write(name, document, path)
        )
    for path in [(), *(p for p in _leaves(document) if len(p) == 1 and isinstance(document[p[0]], dict))]:
        for key, value in (("auto_map", {"AutoModel": "evil.Evil"}), ("trust_remote_code", True), ("extra", 0)):
            place = ".".join([*map(str, path), key])
            expected = f"{name}: {place}" if packed and "quantization_config" not in path else name
            yield Change(f"{name}: {place} added", expected, _write(name, document, (*path, key), value))


def _leaves(node: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every path, of objects and lists too; the first linear, tensor and module of a kind stands for its like."""
    if path:
        yield path
    items = list(node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ())
    if path in (("linears",), ("plain",), ("skipped",), ("fused",), ("files",)):
        items = items[:3]
    for key, value in items:
        yield from _leaves(value, (*path, key))


def _edits(value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, bool):
        yield "flipped", not value
    elif isinstance(value, int | float):
        yield "one more", value + 1
    elif isinstance(value, str):
        yield "longer", value + "x"
    elif isinstance(value, list):
        yield "emptied" if value else "filled", [] if value else [7]
    elif isinstance(value, dict):
        yield "emptied" if value else "filled", {} if value else {"a": 1}
    yield ("null", None) if value is not None else ("a number", 1)


def _write(name: str, document: dict[str, Any], path: tuple[Any, ...], *value: Any) -> Callable[[Path], None]:
    def make(out: Path) -> None:
        changed = copy.deepcopy(document)
        node: Any = changed
        for key in path[:-1]:
            node = node[key]
        if value:
            node[path[-1]] = value[0]
        else:
            del node[path[-1]]
        (out / name).write_text(json.dumps(changed, indent=2, sort_keys=True) + "\n")

    return make


def _swapped_ids(name: str) -> Change:
    def make(out: Path) -> None:
        data = json.loads((out / name).read_bytes())
        vocabulary = data["model"]["vocab"]
        first, second = list(vocabulary)[-2:] if isinstance(vocabulary, dict) else (-2, -1)
        vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
        (out / name).write_text(json.dumps(data, ensure_ascii=False))

    return Change(f"{name}: two ids swapped", name, make)


def _added(out: Path, folder: str) -> Iterator[Change]:
    """What was not there."""
    for leaf in ADDED:
        name = f"{folder}{leaf}"
        if (out / name).exists():
            continue

        def make(out: Path, name: str = name) -> None:
            (out / name).parent.mkdir(exist_ok=True)
            (out / name).write_text("{}")

        yield Change(f"{name}: added", name, make)
    yield Change(f"{folder}empty: a folder added", f"{folder}empty", lambda out: (out / folder / "empty").mkdir())
    yield Change(f"{folder}link: a link added", f"{folder}link", lambda out: (out / folder / "link").symlink_to("/etc"))


def survivors(out: Path, work: Path, every: int = 1, first: int = 0) -> tuple[int, list[str], list[str]]:
    """Every ``every``-th change from ``first`` made on copies in ``work``: how many were made, those that verify calls sound
    (but for HARMLESS), and those that it finds and names elsewhere."""
    from qkit.verification.verify import verify

    tried, sound, elsewhere = 0, list[str](), list[str]()
    for number, change in enumerate(changes(out)):
        if number % every != first:
            continue
        shutil.rmtree(work, ignore_errors=True)
        shutil.copytree(out, work / "out")
        change.make(work / "out")
        tried += 1
        problems = verify(work / "out").problems
        if not problems and not any(re.search(pattern, change.name) for pattern in HARMLESS):
            sound.append(change.name)
        elif problems and not any(_names(problem.where, change.expected) for problem in problems):
            elsewhere.append(f"{change.name}: {problems[0]}")
    return tried, sound, elsewhere


def _names(where: str, expected: str) -> bool:
    """Whether a place that verify names is the expected one; in the transformer of a pipeline it is relative to it."""
    return expected in where or expected.removeprefix("transformer/") in where
