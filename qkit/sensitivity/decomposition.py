"""The contributions of single rows, columns and weights to the loss change that the path integral predicts, kept beside the
profile.

One safetensors file per candidate. A map of every weight would be as large as the model, so that each linear has, under
"<candidate>:<linear>:<part>", with s_j = gbar_j (w~_j - w_j), signed, in nats a token:

  rows       float32 [out], the sum of s over each row; all rows of all linears of a unit add up to the unit's ``pqi`` cost
  columns    float32 [in], the sum over each column
  coverage   float32 [4], the share of sum |s| that the 0.1 %, 0.5 %, 1 % and 5 % of the weights with the largest |s| hold (at
             least one weight each; 0 where all s are 0)
  top_index  int64 [k], those 0.1 %: places in the weight row by row, by falling |s|, equal ones by place
  top_value  float32 [k], their s
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from qkit.errors import BadInput
from qkit.files.safefile import read_header, read_tensor, save_tensors

PER_MILLE = (1, 5, 10, 50)  # of the weights, at which coverage is stored


def decomposition_file(folder: Path, candidate: str) -> Path:
    """The path of a candidate's decomposition in a profile's folder."""
    return folder / f"decomposition-{candidate.lower()}.safetensors"


def decompose(s: Tensor) -> dict[str, Tensor]:
    """The parts of one linear, as the file has them. s: float32 [out, in]."""
    size = s.abs().flatten()
    counts = [max(1, s.numel() * m // 1000) for m in PER_MILLE]
    order = _largest(size, counts[-1])
    covered = size[order].cumsum(0, dtype=torch.float64)
    total = float(size.sum(dtype=torch.float64))
    coverage = torch.stack([covered[n - 1] for n in counts]) / total if total else torch.zeros(len(counts))
    top = order[: counts[0]]
    return {
        "rows": s.sum(1, dtype=torch.float64).float(),
        "columns": s.sum(0, dtype=torch.float64).float(),
        "coverage": coverage.clamp(max=1).float(),
        "top_index": top,
        "top_value": s.flatten()[top],
    }


def _largest(size: Tensor, count: int) -> Tensor:
    """Places of the ``count`` largest values of ``size`` [n], by falling value, equal ones by place; int64 [count]."""
    threshold = size.topk(count, sorted=False).values.min()
    above = (size > threshold).nonzero()[:, 0]
    equal = (size == threshold).nonzero()[: count - len(above), 0]
    return torch.cat([above[size[above].argsort(descending=True, stable=True)], equal])


def save_decomposition(folder: Path, candidate: str, parts: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Writes a candidate's file, all of it or nothing. parts: {linear: what ``decompose`` gave}."""
    flat = {f"{candidate}:{name}:{part}": t for name, tensors in parts.items() for part, t in tensors.items()}
    save_tensors(decomposition_file(folder, candidate), flat)


def load_decomposition(folder: Path, candidate: str) -> dict[str, Tensor]:
    """All tensors of a candidate's file, by their names in it. Raises BadInput where there is none."""
    file = decomposition_file(folder, candidate)
    if not file.is_file():
        raise BadInput(f"{file}: no such decomposition: run 'qkit profile' of this folder again with --measures pqi")
    return {name: read_tensor(info) for name, info in read_header(file).items()}
