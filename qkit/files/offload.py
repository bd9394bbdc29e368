"""A list of tensors on the disk, for what is too large for memory and is read again and again."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from qkit.errors import IOFailure, write_failure


class Chunks(Protocol):
    """The interface that a list of tensors and ``OffloadedTensors`` share."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int, /) -> Tensor: ...


class OffloadedTensors:
    """Tensors in a file without a name in ``folder``: it is gone with this object, or with the process, however that ends.

    The file is read, not mapped: a disk that fills up is then an error that can be reported, and not a signal that kills the
    process, and resident memory is what the readers hold. Any number of threads may read.
    """

    def __init__(self, folder: Path, device: torch.device | str = "cpu") -> None:
        """device: where tensors are read to"""
        self._folder, self._device = folder, device
        self._places: list[tuple[int, torch.dtype, torch.Size]] = []
        self._end = 0
        try:
            self._file = tempfile.TemporaryFile(dir=folder, buffering=0)
        except OSError as e:
            raise write_failure(folder, e) from e

    def append(self, tensor: Tensor) -> int:
        """Write a tensor behind the others, and give its index."""
        self._places.append((self._end, tensor.dtype, tensor.shape))
        self._end = self._write(tensor, self._end)
        return len(self._places) - 1

    def replace(self, index: int, tensor: Tensor) -> None:
        """Write a tensor of the same dtype and shape in the place of another. Threads may replace different ones at a time."""
        at, dtype, shape = self._places[index]
        if (tensor.dtype, tensor.shape) != (dtype, shape):
            raise ValueError(f"{tensor.dtype} {list(tensor.shape)} in the place of {dtype} {list(shape)}")
        self._write(tensor, at)

    def _write(self, tensor: Tensor, at: int) -> int:
        """Where the tensor ends in the file."""
        flat = tensor.cpu().contiguous().reshape(-1)
        if flat.stride(0) != 1:  # one value that was expanded counts as contiguous
            flat = torch.empty_like(flat, memory_format=torch.contiguous_format).copy_(flat)
        data = flat.view(torch.uint8).numpy().data
        try:
            while len(data):
                count = os.pwrite(self._file.fileno(), data, at)
                data, at = data[count:], at + count
        except OSError as e:
            raise write_failure(self._folder, e) from e
        return at

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, index: int, /) -> Tensor:
        at, dtype, shape = self._places[index]
        tensor = torch.empty(shape, dtype=dtype)
        buffer = tensor.reshape(-1).view(torch.uint8).numpy().data
        try:
            while len(buffer):
                count = os.preadv(self._file.fileno(), [buffer], at)
                if not count:
                    raise IOFailure(f"{self._folder}: a temporary file lost its end: run the same command again")
                buffer, at = buffer[count:], at + count
        except OSError as e:
            raise IOFailure(f"cannot read in {self._folder}: {e.strerror or e}: check the disk") from e
        return tensor.to(self._device)
