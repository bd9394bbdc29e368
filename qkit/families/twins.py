"""Blocks whose matrices are those of other blocks: an encoder and a decoder of the same weights, which the file has once."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any

from torch import nn


def twins_of(model: nn.Module, blocks: Collection[str]) -> dict[str, str]:
    """{path of a module: path of a block} of the modules outside the blocks all of whose matrices are tied to those of that
    block, under the same names inside; it may differ in norms, scalars and in how it is called.

    blocks: the block paths of the language model
    """
    keys: Any = getattr(model, "all_tied_weights_keys", None) or {}
    modules = dict(model.named_modules())
    found: dict[str, str] = {}
    for tied, source in dict(keys).items():
        block = next((b for b in _around(source) if b in blocks), None)
        if block is None:
            continue
        inner = source[len(block) :]
        path = tied.removesuffix(inner)
        if path != tied and path in modules and not any(b in blocks for b in _around(tied)):
            found.setdefault(path, block)
    return {path: block for path, block in found.items() if _is_whole(modules[path], path, block, dict(keys))}


def _around(name: str) -> Iterator[str]:
    """The paths of the modules around a parameter, the nearest first."""
    while name:
        name = name.rpartition(".")[0]
        yield name


def _is_whole(module: nn.Module, path: str, block: str, keys: dict[str, str]) -> bool:
    names = [n for n, p in module.named_parameters() if p.dim() >= 2]
    return all(keys.get(f"{path}.{n}") == f"{block}.{n}" for n in names)
