"""Defects for sound quantized files: each is an edit of a copy, with the kind of finding that has to name it.

An edit takes the folder of a copy and changes it in place. ``reports/doctor/corpus.py`` seeds them into files of many writers,
the tests into tiny ones.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

Edit = Callable[[Path], object]
FIRST = "model.layers.0."
Q, K, V, O = (f"{FIRST}self_attn.{x}_proj" for x in "qkvo")
GATE, UP, DOWN = (f"{FIRST}mlp.{x}_proj" for x in ("gate", "up", "down"))


@dataclass(frozen=True)
class Seed:
    """A defect. kinds: of findings, one of which has to be there; where: a part of the name that it is about; baseline:
    whether it takes the original to see it; engine: the one that is asked"""

    name: str
    edit: Edit
    kinds: tuple[str, ...]
    where: str
    baseline: bool = False
    engine: str | None = None


# ---- edits -----------------------------------------------------------------------------------------------------------


def tensors(change: Callable[[dict[str, Tensor]], object]) -> Edit:
    """An edit of the tensors of a folder with one weight file."""

    def edit(folder: Path) -> None:
        found = load_file(folder / "model.safetensors")
        change(found)
        save_file({k: v.contiguous() for k, v in found.items()}, folder / "model.safetensors", {"format": "pt"})

    return edit


def drop(*names: str) -> Edit:
    """Tensors that are lost."""
    return tensors(lambda t: [t.pop(n) for n in names])


def put(name: str, change: Callable[[Tensor], Tensor]) -> Edit:
    """One tensor changed."""
    return tensors(lambda t: t.__setitem__(name, change(t[name])))


def rename(old: str, new: str) -> Edit:
    """One tensor under another name."""
    return tensors(lambda t: t.__setitem__(new, t.pop(old)))


def swap(first: str, second: str) -> Edit:
    """All tensors of two layers exchanged."""

    def change(t: dict[str, Tensor]) -> None:
        leaves = [n.removeprefix(f"{first}.") for n in t if n.startswith(f"{first}.")]
        for leaf in leaves:
            t[f"{first}.{leaf}"], t[f"{second}.{leaf}"] = t[f"{second}.{leaf}"], t[f"{first}.{leaf}"]

    return tensors(change)


def plain(layer: str, original: Path) -> Edit:
    """A layer as the original has it, in place of the quantized one."""

    def change(t: dict[str, Tensor]) -> None:
        for name in [n for n in t if n.startswith(f"{layer}.") and not n.endswith(".bias")]:
            del t[name]
        t[f"{layer}.weight"] = load_file(original / "model.safetensors")[f"{layer}.weight"]

    return tensors(change)


def at(value: float, index: int = 0) -> Callable[[Tensor], Tensor]:
    """One value of a tensor replaced."""

    def change(t: Tensor) -> Tensor:
        wide = t.float().clone().flatten()
        wide[index] = value
        return wide.reshape(t.shape).to(t.dtype)

    return change


def config(change: Callable[[dict], object], file: str = "config.json") -> Edit:
    """An edit of a JSON file."""

    def edit(folder: Path) -> None:
        found = json.loads((folder / file).read_text())
        change(found)
        (folder / file).write_text(json.dumps(found))

    return edit


def field(*path_and_value: object, file: str = "config.json") -> Edit:
    """A field of a JSON file set: keys, then the value."""
    *path, value = path_and_value

    def change(found: dict) -> None:
        for key in path[:-1]:
            found = found[key]
        found[path[-1]] = value

    return config(change, file)


def remove(name: str) -> Edit:
    """A file that is not there."""
    return lambda folder: (folder / name).unlink()


def both(*edits: Edit) -> Edit:
    """Several edits as one defect."""

    def edit(folder: Path) -> None:
        for one in edits:
            one(folder)

    return edit


def cut(name: str = "model.safetensors", left: float = 0.7) -> Edit:
    """A file that is cut short."""

    def edit(folder: Path) -> None:
        with (folder / name).open("r+b") as file:
            file.truncate(int((folder / name).stat().st_size * left))

    return edit


def split(folder: Path) -> dict[str, str]:
    """The weights dealt to two shards with an index."""
    found = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names, where = sorted(found), {}
    for i in range(2):
        file = f"model-{i + 1:05d}-of-00002.safetensors"
        part = {n: found[n] for n in names[i::2]}
        save_file(part, folder / file, {"format": "pt"})
        where |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": sum(t.nbytes for t in found.values())}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return where


def scale_in_order(fewer: int) -> Callable[[Tensor], Tensor]:
    """Codes of 4 bits in words, of which only a part of the values is used. fewer: bits that are left"""

    def change(t: Tensor) -> Tensor:
        mask = sum((0xF >> (4 - fewer) << (4 - fewer)) << (4 * i) for i in range(8))
        signed = mask - (1 << 32) if mask >= 1 << 31 else mask
        return t & signed

    return change


def misplaced(folder: Path) -> None:
    where = split(folder)
    name = next(iter(where))
    other = next(f for f in where.values() if f != where[name])
    field("weight_map", name, other, file="model.safetensors.index.json")(folder)
