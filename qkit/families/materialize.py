"""Loads weights into a model's modules: one block at a time, or everything outside the blocks."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor, nn

from qkit.families.blocks import BlockStructure
from qkit.families.structure import ModelStructure
from qkit.files.checkpoint import Checkpoint
from qkit.system.memory import give_back


def fill_computed_buffers(structure: ModelStructure, path: str = "", skip: Collection[str] = ()) -> None:
    """Fill the buffers below ``path`` that no checkpoint stores (rotary frequencies, positions).

    skip: modules without memory
    """
    for name, value in structure.computed.items():
        owner = name.rpartition(".")[0]
        if owner not in skip and (not path or name.startswith(path + ".")):
            _assign(structure.model, name, value)


def _assign(owner: nn.Module, name: str, value: Tensor) -> None:
    path, _, leaf = name.rpartition(".")
    target = getattr(owner.get_submodule(path), leaf)
    target.data.copy_(value)


def load_block(
    structure: ModelStructure,
    block: BlockStructure,
    dtype: torch.dtype,
    read: Callable[[str], Tensor] | None = None,
    device: torch.device | str = "cpu",
) -> nn.Module:
    """The block's module with its weights in ``dtype``, read tensor by tensor; ``release`` gives the memory back.

    read: a tensor by its name in the checkpoint; None: the checkpoint's, which raises NumericFailure for a weight that is
    not finite
    """
    read = read or structure.checkpoint.read_finite
    # torch's own ``to``: parts of some blocks are models of diffusers, whose ``to`` warns.
    module = nn.Module.to(structure.model.get_submodule(block.path), dtype).to_empty(device=device)
    for name, p in module.named_parameters():
        if f"{block.path}.{name}" in structure.float32:
            p.data = p.data.float()
    fill_computed_buffers(structure, block.path)
    linears = {f"{linear.name}.weight": linear for linear in block.linears}
    for name, stored in block.stored:
        value = read(stored)
        if stored in linears:
            linears[stored].view(module).copy_(value)
        else:
            _assign(module, name, value)
    return module.requires_grad_(False)


def load_outer(
    structure: ModelStructure, read: Callable[[str], Tensor] | None = None, dtype: torch.dtype | None = None
) -> None:
    """Load all modules outside the blocks that run before the first block (embeddings, positions, norms, towers).

    read: as for ``load_block``; dtype: None for that of each parameter in the checkpoint
    """
    read = read or structure.checkpoint.read_finite
    model, blocks = structure.model, structure.family.blocks
    base: Any = getattr(model, "base_model", model)
    inside = {n for n, _ in model.named_modules() if n in blocks or n.startswith(tuple(f"{b}." for b in blocks))}
    prefix = next((n for n, m in model.named_modules() if m is base), "")
    for name, module in model.named_modules():
        if name in inside or not (name == prefix or name.startswith(prefix + ".") or not prefix):
            continue
        for leaf, p in list(module.named_parameters(recurse=False)):
            # A tower that was quantized was in another dtype meanwhile.
            kept = dtype or structure.loaded_dtype(f"{name}.{leaf}")
            setattr(module, leaf, nn.Parameter(torch.empty_like(p, device="cpu", dtype=kept), requires_grad=False))
        for leaf, b in list(module.named_buffers(recurse=False)):
            module._buffers[leaf] = torch.empty_like(b, device="cpu")
    fill_computed_buffers(structure, prefix, inside)
    for name, stored in structure.outer:
        if prefix and not name.startswith(prefix + "."):
            continue
        if stored in structure.tower_parts:
            path, linear = structure.tower_parts[stored]
            linear.view(model.get_submodule(path)).copy_(read(stored))
        else:
            _assign(model, name, read(stored))


def release(part: nn.Module) -> None:
    """Release the memory of a block; its shapes stay."""
    part.to("meta")
    give_back()


def release_outer(structure: ModelStructure) -> None:
    """Release the memory of ``load_outer``."""
    structure.model.to("meta")
    give_back()


def plain_tensors(checkpoint: Checkpoint, block: BlockStructure, module: nn.Module) -> dict[str, Tensor]:
    """Stored tensors of the block that are not quantized, by checkpoint name, in the dtype of the checkpoint.

    A tensor that no transform changed is the original to the bit.
    """
    weights = {f"{linear.name}.weight" for linear in block.linears}
    result: dict[str, Tensor] = {}
    for name, stored in block.stored:
        if stored in weights:
            continue
        path, _, leaf = name.rpartition(".")
        current: Tensor = getattr(module.get_submodule(path), leaf).data.cpu()
        original = checkpoint.read(stored)
        result[stored] = original if torch.equal(original.to(current.dtype), current) else current.to(original.dtype)
    return result
