"""A tensor that lies in a file as codes and scales and is read as the plain numbers that these stand for.

The file of each way of storing (``fp8``, ``mxfp4``, ``gptq`` ..) finds its tensors by their names and headers and gives, for
every weight, a ``DecodedInfo``: a header with the name, shape and dtype of the plain weight, the stored tensors that it is
made of, and the function that makes it. Whoever reads a checkpoint sees no other difference. Values are read and decoded
when the weight is asked for, one weight at a time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from qkit.errors import BadCheckpoint, Unsupported
from qkit.files.foreign import reason
from qkit.files.safefile import DTYPES, TensorInfo, shown
from qkit.system.memory import ran_out

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from qkit.tensor.formats import Format

Parts = Mapping[str, "Tensor"]  # stored tensors by their role: "weight", "scale", ..
CACHE_SCALES = (
    ".k_scale",
    ".v_scale",
    ".q_scale",
    ".k_global_scale",
    ".v_global_scale",
    ".k_zero_point",
    ".v_zero_point",
)  # of a KV cache: no weight needs them
CHUNK = 1 << 22  # weights that are decoded at a time: what float32 buffers are held for


@dataclass(frozen=True, kw_only=True)
class Kept:
    """How a weight goes into a result as it is stored, its numbers unchanged (``--keep-source``).

    weights, activations: the formats of a result that say it; specs: {suffix: (dtype, shape)} of its tensors there
    make: these tensors, from the stored ones
    doubt: a look at small stored tensors, which it is given by role: why it cannot be kept after all, how it is kept with fewer
        of them, or None
    """

    weights: Format
    activations: Format | None
    specs: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]
    make: Callable[[Parts], dict[str, Tensor]]
    doubt: Callable[[Callable[[str], Tensor]], str | Kept | None] = lambda read: None


@dataclass(frozen=True, kw_only=True)
class DecodedInfo(TensorInfo):
    """The header of a decoded tensor; ``begin`` and ``end`` span the bytes of the plain one, ``file`` holds its codes.

    parts:    the stored tensors by role
    decode:   from these to the plain tensor
    encoding: what they are, in words
    kept:     how a result keeps them; a sentence that says why none can
    """

    parts: Mapping[str, TensorInfo]
    decode: Callable[[Parts], Tensor]
    encoding: str
    kept: Kept | str


@dataclass(frozen=True, kw_only=True)
class Stored:
    """What the decoders look at.

    where:        the folder, for messages
    quantization: what config.json says of the way of storing; empty where it says nothing
    tensors:      all headers by name
    dtype:        what plain weights are decoded to, as safetensors spells it ("BF16")
    """

    where: Path
    quantization: Mapping[str, Any]
    tensors: Mapping[str, TensorInfo]
    dtype: str

    @property
    def torch_dtype(self) -> torch.dtype:
        """``dtype`` as torch names it."""
        import torch

        found: torch.dtype = getattr(torch, DTYPES[self.dtype][0])
        return found

    def refuse(self, name: str, problem: str) -> NoReturn:
        """Raises BadCheckpoint for a stored tensor."""
        file = self.tensors[name].file if name in self.tensors else self.where
        raise BadCheckpoint(f"{file}: tensor {shown(name)} {problem}: get the model again from its source")

    def part(self, name: str, role: str, of: str) -> TensorInfo:
        """A tensor that a weight cannot be decoded without. Raises BadCheckpoint where no file has it."""
        if name not in self.tensors:
            self.refuse(of, f"has no {role} {shown(name)} in any file, and cannot be decoded without")
        return self.tensors[name]

    def decoded(
        self,
        name: str,
        shape: tuple[int, ...],
        parts: Mapping[str, TensorInfo],
        decode: Callable[[Parts], Tensor],
        encoding: str,
        kept: Kept | str,
    ) -> DecodedInfo:
        """The header of the plain tensor ``name``; the first of ``parts`` says in which file it lies."""
        if 0 in shape:
            self.refuse(
                next(iter(parts.values())).name, f"stands for a weight {list(shape)}, expected one that is not empty"
            )
        return DecodedInfo(
            name=name,
            dtype=self.dtype,
            shape=shape,
            file=next(iter(parts.values())).file,
            begin=0,
            end=math.prod(shape) * DTYPES[self.dtype][1],
            parts=parts,
            decode=decode,
            encoding=encoding,
            kept=kept,
        )


@dataclass(frozen=True)
class Found:
    """What a decoder made of a folder. dropped: stored tensors that no plain weight needs: scales of activations, of a cache"""

    weights: dict[str, DecodedInfo]
    dropped: Collection[str] = field(default_factory=tuple)


def decoded(info: DecodedInfo, parts: Parts) -> Tensor:
    """The plain tensor. Raises BadCheckpoint for stored values that stand for none."""
    try:
        return info.decode(parts)
    except (IndexError, RuntimeError, ValueError) as e:
        if ran_out(e):
            raise
        raise BadCheckpoint(
            f"{info.file}: tensor {shown(info.name)}, {info.encoding}: {reason(e)}: get the model again from its source"
        ) from e


def number(stored: Stored, key: str, default: int | None = None) -> int:
    """A whole number of the quantization config. Raises Unsupported for anything else."""
    value = stored.quantization.get(key, default)
    if type(value) is not int:
        raise Unsupported(
            f"{stored.where}: config.json: quantization_config: {key} is {shown(value)}, expected a whole number: get the "
            "config of this model"
        )
    return value


def row_steps(rows: int, columns: int, multiple: int = 1) -> Iterator[slice]:
    """Slices of the rows of a weight, each about CHUNK weights and a multiple of some number of rows."""
    step = max(1, CHUNK // max(1, columns) // multiple) * multiple
    return (slice(first, min(first + step, rows)) for first in range(0, rows, step))
