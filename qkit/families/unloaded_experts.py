"""Experts in one tensor that the model's class does not load, such as those of a layer for multi-token prediction.

Nothing of the class says how they lie. Where a block of the model has experts under the same name and of the same shape, theirs
is the layout: each matrix gets a view of its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from torch import nn

from qkit.families.blocks import BlockStructure, Linear
from qkit.families.stored_parameters import StoredParameters
from qkit.files.checkpoint import View


def add_unloaded_experts(model: nn.Module, names: StoredParameters, blocks: Sequence[BlockStructure]) -> None:
    """Add views of these matrices. blocks: those of the model"""
    shown = {source for view in names.views.values() for source in view.sources}
    loaded = shown | {names.conversion.stored_name(n) for n in model.state_dict()}
    patterns = dict(_patterns(model, names, blocks))
    for tensor, info in names.checkpoint.tensors.items():
        if len(info.shape) != 3 or tensor in loaded:
            continue
        found = next(
            (x for end, x in patterns.items() if tensor.endswith(f".{end[0]}") and info.shape[1:] == end[1]), None
        )
        if found is not None:
            _split(names, tensor, info.shape[0], found)


def _patterns(
    model: nn.Module, names: StoredParameters, blocks: Sequence[BlockStructure]
) -> Iterator[tuple[tuple[str, tuple[int, ...]], list[Linear]]]:
    """Yield (name inside a block, shape of one expert) and the linears of its first expert, of all experts of the model."""
    for block in blocks:
        parameters = dict(model.get_submodule(block.path).named_parameters())
        for param in (p for x in block.experts for p in x.params):
            linears = [x for x in block.linears if x.param == param and x.expert == 0]
            path = names.conversion.stored_name(block.path)
            stored = names.conversion.stored_name(f"{block.path}.{param}").removeprefix(f"{path}.")
            for end in {param, stored}:
                yield (end, tuple(parameters[param].shape[1:])), linears


def _split(names: StoredParameters, tensor: str, count: int, linears: list[Linear]) -> None:
    owner = tensor.rpartition(".")[0]
    for e in range(count):
        for linear in linears:
            part = replace(linear, expert=None)
            name = f"{owner}.{e}.{linear.name.rpartition('.')[2]}.weight"
            if name not in names.checkpoint.tensors and name not in names.views:
                names.views[name] = View(
                    (tensor,),
                    linear.shape,
                    lambda read, e=e, part=part: part.part(read(tensor, e)).contiguous(),  # type: ignore[misc]
                )
