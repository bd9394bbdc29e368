"""How the tensors of a file become the parameters of a model, by transformers' own tables.

Most tensors are one parameter each, perhaps under another name. Some are a part of one (the experts of a layer, which are
stored one by one), and some are computed (a fused projection that the model has in pieces). ``Conversion`` says which is which.
Nothing here names an architecture.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from qkit.families.matrices import matrix_of
from qkit.files.foreign import foreign_errors

Read = Callable[..., Tensor]  # ``qkit.files.checkpoint.ReadStored``


@dataclass(frozen=True)
class Piece:
    """A stored matrix that is one expert's rows of a parameter [experts, rows, columns]."""

    stored: str
    expert: int
    rows: tuple[int, int] | None  # None: all rows of the expert


@dataclass(frozen=True)
class Computed:
    """Parameters that transformers computes from stored tensors. shapes: {parameter: shape}"""

    sources: tuple[str, ...]
    shapes: dict[str, tuple[int, ...]]
    run: Callable[[Read], dict[str, Tensor]]


@dataclass(frozen=True)
class Converted:
    """Stored tensors that one converter of transformers makes parameters of. sources, targets: patterns of names, as in its
    table"""

    stored: tuple[str, ...]
    sources: tuple[str, ...]
    targets: tuple[str, ...]


@dataclass
class Conversion:
    """Names of the file by parameter.

    names:    {module or parameter: its name in the file}, where it is one there
    pieces:   {parameter: its pieces}
    computed: {parameter: what computes it}
    converted: what transformers does more to than rename it
    """

    names: dict[str, str] = field(default_factory=dict)
    pieces: dict[str, list[Piece]] = field(default_factory=dict)
    computed: dict[str, Computed] = field(default_factory=dict)
    converted: list[Converted] = field(default_factory=list)

    def stored_name(self, name: str) -> str:
        """The file's name of a module or parameter, from its own or from that of the nearest module around it."""
        rest, inner = name, ""
        while rest:
            if rest in self.names:
                return f"{self.names[rest]}{inner}".removeprefix(".")
            rest, _, leaf = rest.rpartition(".")
            inner = f".{leaf}{inner}"
        return name


def conversion_of(model: nn.Module, stored: Mapping[str, tuple[int, ...]], where: str) -> Conversion:
    """The conversion of a file with tensors of these shapes; shapes of () are of tensors that are packed.

    Raises Unsupported where transformers' tables cannot be applied to the file.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

    result = Conversion()
    groups: dict[str, tuple[Any, list[tuple[str, str]]]] = {}
    with foreign_errors(f"{where}: transformers cannot tell how this model is stored"):
        mapping = get_model_conversion_mapping(model) if hasattr(model, "base_model_prefix") else []
        renamings = [x for x in mapping if isinstance(x, WeightRenaming)]
        converters = [x for x in mapping if isinstance(x, WeightConverter)]
        by_pattern = {p: c for c in reversed(converters) for p in c.source_patterns}
        modules, shapes = dict(model.named_modules()), dict(model.state_dict())
        prefix = str(getattr(model, "base_model_prefix", ""))
        for name in sorted(stored, key=dot_natural_key):
            target, pattern = rename_source_key(name, renamings, converters, prefix, shapes)
            if target not in shapes and name in shapes:  # a result has the model's names for what was computed
                target, pattern = name, None
            if pattern is None and _is_bare(target, name, modules):
                result.computed[target] = _bare(target, name, tuple(stored[name]))
            elif pattern is None:
                _note_name(result.names, target, name)
            else:
                groups.setdefault(target, (by_pattern[pattern], []))[1].append((pattern, name))
        for target, (converter, members) in groups.items():
            patterns = converter._original_source_patterns, converter._original_target_patterns
            result.converted.append(Converted(tuple(name for _, name in members), *map(tuple, patterns)))
            pieces = _pieces(converter, members, shapes.get(target))
            if pieces is not None:
                result.pieces[target] = pieces
            elif all(stored[name] for _, name in members):  # matrices that are packed have the model's own names
                try:
                    computed = _computed(converter, target, members, stored, model)
                except (RuntimeError, ValueError, LookupError):
                    if target in shapes:
                        raise
                    continue  # a part of what the model does not load (one expert of mtp.*), which nothing is made of
                result.computed.update(dict.fromkeys(computed.shapes, computed))
    return result


def _is_bare(target: str, stored: str, modules: Mapping[str, nn.Module]) -> bool:
    """Whether a matrix is stored under a name that does not end in '.weight', to which the parts of a packed one could be
    added."""
    owner, _, leaf = target.rpartition(".")
    return leaf == "weight" and not stored.endswith(".weight") and owner in modules and bool(matrix_of(modules[owner]))


def _bare(target: str, stored: str, shape: tuple[int, ...]) -> Computed:
    """A matrix that is stored under such a name: as what is computed, it gets the model's name."""
    return Computed((stored,), {target: shape}, lambda read: {target: read(stored)})


def _note_name(names: dict[str, str], target: str, stored: str) -> None:
    """Note the name of a parameter, and of the modules around it as far as both names end alike."""
    while target not in names or names[target] != stored:
        names.setdefault(target, stored)
        target, _, leaf = target.rpartition(".")
        stored, _, stored_leaf = stored.rpartition(".")
        if leaf != stored_leaf or not target:
            return


def _pieces(converter: Any, members: list[tuple[str, str]], param: Tensor | None) -> list[Piece] | None:
    """The pieces of a parameter that stacks experts, gate rows before up rows; None for another conversion."""
    kinds = [(type(op).__name__, getattr(op, "dim", None)) for op in converter.operations]
    stacks = kinds[:1] == [("MergeModulelist", 0)] and kinds[1:] in ([], [("Concatenate", 1)])
    if param is None or param.dim() != 3 or not stacks:
        return None
    by_pattern: dict[str, list[str]] = {p: [] for p in converter.source_patterns}
    for pattern, name in members:
        by_pattern[pattern].append(name)
    rows = param.shape[1] // len(by_pattern)
    return [
        Piece(name, e, (i * rows, (i + 1) * rows) if len(by_pattern) > 1 else None)
        for i, names in enumerate(by_pattern.values())
        for e, name in enumerate(names)
    ]


def _computed(
    converter: Any, target: str, members: list[tuple[str, str]], stored: Mapping[str, tuple[int, ...]], model: nn.Module
) -> Computed:
    def run(read: Read) -> dict[str, Tensor]:
        ready = copy.deepcopy(converter)
        for pattern, name in members:
            ready.add_tensor(target, name, pattern, lambda n=name: read(n))
        values: dict[str, Any] = ready.convert(target, model=model, config=model.config)
        return {k: v[0] if isinstance(v, list) else v for k, v in values.items()}

    shapes = {k: tuple(v.shape) for k, v in run(lambda n: torch.empty(stored[n], device="meta")).items()}
    return Computed(tuple(name for _, name in members), shapes, run)


def stacked(name: str, pieces: list[Piece], param: Tensor) -> Computed:
    """What computes a parameter [experts, rows, columns] from its pieces."""

    def run(read: Read) -> dict[str, Tensor]:
        value: Tensor | None = None
        for piece in pieces:
            part = read(piece.stored)
            value = part.new_zeros(param.shape) if value is None else value
            rows = slice(None) if piece.rows is None else slice(*piece.rows)
            value[piece.expert, rows] = part
        assert value is not None
        return {name: value}

    return Computed(tuple(p.stored for p in pieces), {name: tuple(param.shape)}, run)
