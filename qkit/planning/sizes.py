"""The exact bytes of quantized weights, before any is made."""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import TYPE_CHECKING

import torch

from qkit.errors import UsageError
from qkit.families.structure import ModelStructure
from qkit.planning.kept import stored_as
from qkit.planning.layout import layout_bytes
from qkit.tensor.compressed_tensors import stored_bytes
from qkit.tensor.formats import Format
from qkit.tensor.gguf_blocks import block_bytes
from qkit.tensor.layouts.table import LAYOUTS
from qkit.tensor.lowrank import low_rank_bytes
from qkit.tensor.sparse import sparse_bytes

if TYPE_CHECKING:
    from qkit.planning.linear_plan import LinearPlan


def linear_bytes(
    weights: Format,
    activations: Format | None,
    shape: tuple[int, int],
    dtype: torch.dtype,
    outliers: int = 0,
    rank: int = 0,
    export: str = "",
) -> int:
    """Bytes of a quantized weight [out, in] of a ``dtype`` model: codes, scales, and beside them a sparse part of
    so many values and a branch of that rank. export: the layout"""
    if export in LAYOUTS:
        return layout_bytes(export, weights, activations, shape, dtype)
    if weights.gguf:
        return block_bytes(weights, shape)
    parts_bytes = sparse_bytes(shape, outliers, dtype) + low_rank_bytes(shape, rank)
    return stored_bytes(weights, activations, shape, dtype) + parts_bytes


def check_rank(p: LinearPlan, dtype: torch.dtype) -> None:
    """Raises UsageError for a rank at which the quantized weight is no smaller than in 16 bits."""
    if not p.rank:
        return
    unquantized = 2 * p.shape[0] * p.shape[1]
    quantized = linear_bytes(p.weights, p.activations, p.shape, dtype, p.outliers)
    if quantized + low_rank_bytes(p.shape, p.rank) >= unquantized:
        largest_rank = max(0, (unquantized - quantized - 1) // low_rank_bytes(p.shape, 1))
        raise UsageError(
            f"{p.name}: a branch of rank {p.rank} beside {p.scheme} is no smaller than its "
            f"{p.shape[0]}x{p.shape[1]} weights in 16 bits: use a rank of at most {largest_rank}"
        )


def packed_bytes(
    structure: ModelStructure,
    linears: dict[str, LinearPlan],
    ends: dict[str, LinearPlan],
    significant: int,
    untied: bool,
    kept: Collection[str] = (),
    export: str = "",
) -> int:
    """The exact bytes of all tensors of a result (shard headers apart).

    ends, export: as in a plan; untied: a tied head gets a matrix of its own. Where significant weights will be is not known
    yet: they are counted as if spread evenly.
    """
    total = 0
    weights = max(1, sum(p.shape[0] * p.shape[1] for p in linears.values()))
    for name, info in structure.checkpoint.tensors.items():
        if name in structure.tied:
            continue
        module = name.removesuffix(".weight")
        if module in ends:
            end = ends[module]
            total += linear_bytes(end.weights, None, end.shape, structure.dtype, export=export)
            continue
        if module in kept:
            specs = stored_as(module, structure.checkpoint)[1].specs
            total += sum(dtype.itemsize * math.prod(shape) for dtype, shape in specs.values())
            continue
        p = linears.get(module)
        if p is None:
            total += info.nbytes
            continue
        sparse_count = p.outliers + round(significant * p.shape[0] * p.shape[1] / weights)
        total += linear_bytes(p.weights, p.activations, p.shape, structure.dtype, sparse_count, p.rank, export)
        total += p.residual * torch.int32.itemsize
    if untied:
        head, shared = next(iter(structure.tied.items()))
        own = ends.get(head.removesuffix(".weight"))
        total += (
            structure.checkpoint.tensors[shared].nbytes
            if own is None
            else linear_bytes(own.weights, None, own.shape, structure.dtype, export=export)
        )
    return total
