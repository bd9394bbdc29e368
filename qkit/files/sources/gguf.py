"""GGUF as qkit writes it: one file, and in config.json where each tensor of the checkpoint lies in it.

Every weight is decoded to float32, exactly the numbers that llama.cpp computes with. The decoder is that of the proof.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from qkit.files.gguf import read_gguf
from qkit.files.gguf_places import MINUS_EXP, SCALE, Place, read_place
from qkit.files.safefile import TensorInfo
from qkit.files.sources.decoded import DecodedInfo, Found, Parts, Stored, row_steps
from qkit.verification.gguf_blocks import TYPES, decode_blocks

if TYPE_CHECKING:
    from torch import Tensor

_NOT_KEPT = "a result in another format has no place for blocks of GGUF"


@dataclass(frozen=True, kw_only=True)
class BlocksInfo(TensorInfo):
    """The header of a tensor of GGUF, seen as bytes: [rows, bytes of a row]. kind: its type; columns: of a row"""

    kind: str
    columns: int


def gguf_tensors(file: Path) -> dict[str, TensorInfo]:
    """The tensors of a GGUF file by their names in it. Raises BadCheckpoint, IOFailure."""
    infos: dict[str, TensorInfo] = {}
    for t in read_gguf(file).tensors:
        rows = math.prod(t.shape[1:])
        infos[t.name] = BlocksInfo(
            name=t.name,
            dtype="U8",
            shape=(rows, (t.nbytes or 0) // max(1, rows)),
            file=file,
            begin=t.begin,
            end=t.begin + (t.nbytes or 0),
            kind=t.dtype,
            columns=t.shape[0] if t.shape else 0,
        )
    return infos


def find(stored: Stored) -> Found:
    """The tensors that config.json names. Raises BadCheckpoint for one that is not there."""
    names = stored.quantization.get("tensors")
    given: Mapping[str, object] = names if isinstance(names, dict) else {}
    weights, used = dict[str, DecodedInfo](), set[str]()
    as_float = replace(stored, dtype="F32")
    for name, entry in given.items():
        place = read_place(entry)
        if place is None:
            stored.refuse(name, "is not given as [shape, [[name in GGUF, rows] ..], change, unit] in config.json")
        pieces: dict[str, TensorInfo] = {}
        runs: list[_Run] = []
        for inside, numbers in place.runs:
            info = stored.part(inside, "tensor", name)
            used.add(inside)
            runs += _runs(stored, name, info, (numbers, place.unit), pieces)
        if sum(r.count for r in runs) * place.unit != math.prod(place.shape):
            stored.refuse(name, "has other rows in config.json than its shape")
        scale = f"{place.runs[0][0].removesuffix('.weight')}{SCALE}"
        if any(r.kind == "NVFP4" for r in runs):
            pieces["scale"] = stored.part(scale, "tensor", name)
            used.add(scale)
        decode = partial(_decode, runs=runs, place=place)
        kind = ", ".join(dict.fromkeys(r.kind for r in runs))
        weights[name] = as_float.decoded(name, place.shape, pieces, decode, f"GGUF {kind}", _NOT_KEPT)
    return Found(weights, [name for name in stored.tensors if name not in used])


@dataclass(frozen=True)
class _Run:
    """Units of a tensor of the file, within the piece of it that is read: its role, kind and columns; first, step, count"""

    role: str
    kind: str
    columns: int
    first: int
    step: int
    count: int


def _runs(
    stored: Stored, name: str, info: TensorInfo, run: tuple[list[int], int], pieces: dict[str, TensorInfo]
) -> list[_Run]:
    """The runs in a tensor of the file; the span of rows that they are in is added to the pieces that are read."""
    numbers, unit = run
    if not isinstance(info, BlocksInfo) or info.kind not in {kind for kind, _, _ in TYPES.values()}:
        stored.refuse(info.name, "has a type of GGUF that qkit does not decode")
    size = info.shape[0] * info.columns // unit
    triples = list(zip(numbers[::3], numbers[1::3], numbers[2::3], strict=True))
    ends = [end for a, n, s in triples for end in (a, a + (n - 1) * s)]
    low, high = min(ends), max(ends) + 1
    if low < 0 or high > size:
        stored.refuse(info.name, f"has {size} rows, and config.json names others for {name}")
    role = f"blocks {len(pieces)}"
    pieces[role] = info
    if unit != info.columns:
        return [_Run(role, info.kind, info.columns, a, s, n) for a, n, s in triples]
    row = info.shape[1]
    pieces[role] = replace(info, shape=(high - low, row), begin=info.begin + low * row, end=info.begin + high * row)
    return [_Run(role, info.kind, info.columns, a - low, s, n) for a, n, s in triples]


def _decode(parts: Parts, runs: Sequence[_Run], place: Place) -> Tensor:
    import torch

    found = []
    for run in runs:
        blocks, unit = parts[run.role], place.unit
        index = run.first + run.step * torch.arange(run.count)
        if unit != run.columns:
            whole = torch.from_numpy(decode_blocks(run.kind, blocks.numpy(), run.columns))
            found.append(whole.reshape(-1, unit)[index])
            continue
        result = torch.empty(run.count, unit)
        for some in row_steps(run.count, unit):
            result[some] = torch.from_numpy(decode_blocks(run.kind, blocks[index[some]].numpy(), unit))
        found.append(result)
    joined = found[0] if len(found) == 1 else torch.cat(found)
    if "scale" in parts:
        joined *= float(parts["scale"].view(torch.float32))
    if place.change == MINUS_EXP:
        joined = torch.log(-joined)
    elif place.change:
        joined = joined - float(place.change)
    return joined.reshape(place.shape)
