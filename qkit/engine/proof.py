"""Proofs on blocks, before they are used, that a transform leaves the function of a block as it is.

A run of the skeleton shows what reads what (``families.stream``); here blocks with their weights run before and after.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from qkit.calibration.block_calls import Call, OneByOne, Passing, enter_one
from qkit.calibration.statistics import Rows
from qkit.engine.discovered_calls import call_options_of, runs_on_text
from qkit.errors import Unsupported
from qkit.families.blocks import BlockStructure, LinearGroup
from qkit.families.materialize import load_block, load_outer, release, release_outer
from qkit.families.operators import tensors_in
from qkit.families.structure import ModelStructure
from qkit.transforms.rotate import orthogonal, rotate, rotated_parameters
from qkit.transforms.scales import fold, foldable, shared_heads
from qkit.transforms.state import BlockState

_TOKENS, _ROWS = 8, 256  # of a text, and of the output head
# Relative differences that rounding explains: in float32; in 16 bits, of what a linear reads, and of what a block returns.
_CLOSE, _CLOSE_16, _SAME_16 = 1e-3, 2e-2, 5e-2


def prove_rotation(structure: ModelStructure, seed: int) -> int:
    """Run one block of every kind, with its weights in float32, before and after the rotation; how many that were.

    Raises Unsupported where what it returns is not the rotation of what it returned.
    """
    kinds = list(_kinds(structure).values())
    places = {b.index: structure.stream.places[b.path] for b in structure.blocks}
    passing = {i: Passing(p.argument, p.result, (None,) * p.count) for i, p in places.items()}
    hidden, logits, calls = _ends(structure, passing, {}, seed)
    q = orthogonal(hidden.shape[-1], seed)
    entering, predicted, _ = _ends(structure, passing, rotated_parameters(structure, seed), seed)
    _check("the embeddings", entering, hidden @ q, _CLOSE_16)
    # A class that is its own base applies the head, and a tied one has no place for the head's own rotated matrix.
    if structure.model.base_model is not structure.model or not structure.tied:
        _check("the output head", predicted, logits, _CLOSE_16)
    for block in kinds:
        call = calls[block.index].to(torch.float32)
        module = load_block(structure, block, torch.float32)
        with runs_on_text(structure), torch.inference_mode():
            before = call(module, hidden) @ q
            rotate(BlockState(structure=structure, block=block, module=module, exact=True), {}, seed)
            after = call(module, hidden @ q)
        release(module)
        _check(block.path, after, before, _CLOSE)
    return len(kinds)


def _ends(
    structure: ModelStructure, passing: dict[int, Passing], rotated: dict[str, Tensor], seed: int
) -> tuple[Tensor, Tensor, dict[int, Call]]:
    """What leaves the embeddings, float32; what the model without its blocks and some rows of the head make of it; the calls of
    the blocks.

    rotated: parameters in place of those of the file
    """
    stream, stored = structure.stream, {structure.stored_name(name): value for name, value in rotated.items()}
    read = structure.checkpoint.read_finite
    (head,) = stream.outer_reads(structure.paths)
    vocabulary = structure.model.get_parameter(stream.table).shape[0]
    tokens = torch.randint(0, vocabulary, (1, _TOKENS), generator=torch.Generator().manual_seed(seed))
    own = f"{structure.family.head}.weight"  # of a tied head, once it is rotated
    matrix = rotated[own if own in rotated else head] if rotated else read(structure.stored_name(head))
    last: list[Tensor] = []
    base: Any = structure.model.base_model
    handle = base.register_forward_hook(lambda _, args, out: last.append(next(tensors_in(tuple(out.values())))))
    load_outer(structure, lambda name: stored[name] if name in stored else read(name))
    try:
        with runs_on_text(structure), torch.inference_mode():
            sample = {"input_ids": tokens, **call_options_of(structure, None)}
            hidden, calls = enter_one(structure.model, structure.paths, sample, passing)
        out = last[0].float()  # with the head applied, for a class that is its own base
        return hidden.float(), out if out.shape[-1] != matrix.shape[1] else out @ matrix[:_ROWS].float().T, calls
    finally:
        handle.remove()
        release_outer(structure)


def _check(what: str, after: Tensor, before: Tensor, close: float) -> None:
    error = _difference(after, before)
    if not error < close:
        raise Unsupported(
            f"method rotate: rotating {what} changes what it returns by {error:.1%} (expected: not at all): use smoothquant or "
            "awq, and please report the model"
        )


def proof_memory(structure: ModelStructure) -> int:
    """Peak bytes of ``prove_rotation``.

    They are for what is outside the blocks, with the rotated embeddings and head, one of them in float32 before and after; or
    for the largest block in float32 with its rotated weights.
    """
    blocks = [sum(p.numel() for p in structure.model.get_submodule(path).parameters()) for path in structure.paths]
    outer = sum(structure.checkpoint.tensors[stored].nbytes for _, stored in structure.outer)
    table = structure.checkpoint.tensors[structure.stored_name(structure.stream.table)]
    rotated = 2 * table.nbytes + 2 * torch.float32.itemsize * math.prod(table.shape)
    return max(outer + rotated, 2 * torch.float32.itemsize * max(blocks))


def unproved_groups(state: BlockState, rows: Rows, call: Call | OneByOne) -> set[str]:
    """Keys of the groups of a block into whose source a scale cannot be folded, as runs of a row show.

    A scale of the source has to divide what the group reads by the same scale, and the block must return what it returned
    once the group's weights are multiplied by it. Scales are powers of two, which cost no rounding.
    """
    groups = [g for g in state.block.groups if foldable(state, g)]
    row = next((i for i, good in enumerate(rows.good) if good), None)
    if row is None:
        return set()
    span = slice(row, row + 1)
    hidden = rows.read(row, row + 1)
    generator = torch.Generator().manual_seed(0)
    wrong: set[str] = set()
    for group in groups:
        powers = torch.randint(-2, 3, (group.linears[0].shape[1],), generator=generator)
        s = torch.exp2(shared_heads(state, group, torch.exp2(powers.float())).log2().round()).to(state.device)
        with torch.no_grad(), _restored(state, group):
            read, returned = _run(state, group, call, hidden, span)
            scaled = BlockState(structure=state.structure, block=state.block, module=state.module)
            fold(scaled, group, s)
            scaled.write_back()
            read_after, returned_after = _run(state, group, call, hidden, span)
        divided = len(read) == len(read_after) and all(
            _difference(b.float() * s, a.float()) < _CLOSE_16 for a, b in zip(read, read_after, strict=True)
        )
        if not divided or not _difference(returned_after.float(), returned.float()) < _SAME_16:
            wrong.add(group.key)
    return wrong


def _run(
    state: BlockState, group: LinearGroup, call: Call | OneByOne, hidden: Tensor, row: slice
) -> tuple[list[Tensor], Tensor]:
    """What the linears of the group read in a run of the block, and what it returns."""
    read: list[Tensor] = []

    def look(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        read.append(next(x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)))

    handle = state.module.get_submodule(group.hook).register_forward_pre_hook(look, with_kwargs=True)
    try:
        return read, call(state.module, hidden, row)
    finally:
        handle.remove()


@contextmanager
def _restored(state: BlockState, group: LinearGroup) -> Iterator[None]:
    """Give the modules that a fold rewrites their weights back at the end."""
    paths = {group.declared.source, *(x.owner for x in group.linears), *group.declared.also}
    parameters = [p for path in paths if path is not None for p in state.module.get_submodule(path).parameters()]
    before = [p.data.clone() for p in parameters]
    try:
        yield
    finally:
        for p, values in zip(parameters, before, strict=True):
            p.data = values


def _kinds(structure: ModelStructure) -> dict[str, BlockStructure]:
    """One block of every kind: those with the same modules are alike."""
    found: dict[str, BlockStructure] = {}
    for block in structure.blocks:
        found.setdefault(str(structure.model.get_submodule(block.path)), block)
    return found


def _difference(after: Tensor, before: Tensor) -> float:
    return float((after - before).norm() / before.norm())
