"""GGUF as qkit writes it: one file, and in config.json where each tensor of the checkpoint lies in it.

Every weight is decoded to float32, exactly the numbers that llama.cpp computes with. The decoder is that of the proof.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from qkit.files.gguf import read_gguf
from qkit.files.gguf_container import SCALE
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
    known, weights = {name for name, _, _ in TYPES.values()}, dict[str, DecodedInfo]()
    as_float = replace(stored, dtype="F32")
    for name, entry in given.items():
        if not (isinstance(entry, list) and len(entry) == 2 and isinstance(entry[0], str) and type(entry[1]) is int):
            stored.refuse(name, "is not given as [name in GGUF, heads] in config.json")
        inside, heads = entry
        if inside.endswith(SCALE):  # read with the weight
            continue
        info = stored.part(inside, "tensor", name)
        if not isinstance(info, BlocksInfo) or info.kind not in known:
            stored.refuse(inside, "has a type of GGUF that qkit does not decode")
        if heads < 0 or (heads and info.shape[0] % (2 * heads)):
            stored.refuse(inside, f"has {info.shape[0]} rows, and config.json says {heads} heads")
        shape = (info.columns,) if info.shape[0] == 1 else (info.shape[0], info.columns)
        decode = partial(_decode, kind=info.kind, columns=info.columns, heads=heads)
        pieces: dict[str, TensorInfo] = {"blocks": info}
        if info.kind == "NVFP4":
            pieces["scale"] = stored.part(f"{inside.removesuffix('.weight')}{SCALE}", "tensor", name)
        weights[name] = as_float.decoded(name, shape, pieces, decode, f"GGUF {info.kind}", _NOT_KEPT)
    return Found(weights, [name for name in stored.tensors if name not in {e[0] for e in given.values()}])  # type: ignore[index]


def _decode(parts: Parts, kind: str, columns: int, heads: int) -> Tensor:
    import torch

    blocks = parts["blocks"]
    rows = len(blocks)
    result = torch.empty(rows, columns)
    for some in row_steps(rows, columns):
        result[some] = torch.from_numpy(decode_blocks(kind, blocks[some].numpy(), columns))
    if "scale" in parts:
        result *= float(parts["scale"].view(torch.float32))
    if heads:  # of each head the first halves of all rotations, then the second ones
        result = result.reshape(heads, rows // heads // 2, 2, columns).transpose(1, 2).reshape(rows, columns)
    return result[0] if rows == 1 else result
