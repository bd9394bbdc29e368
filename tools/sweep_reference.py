"""What a packed folder stands for, worked out without qkit: by compressed-tensors, transformers and the source folder.

Weights are decompressed by compressed-tensors, put in the place of those of the source, and loaded by transformers, so that
its own conversions of names and of experts apply. The layout of a weight (transposed, or several of the file in one of the
source) is the one that comes nearest to the source: rounding to 4 bits changes a weight by a tenth, a wrong layout by more
than all of it.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import sweep_configs  # noqa: F401  it makes tests/ importable
import torch
import transformers
from compressed_tensors.quantization import QuantizationConfig
from decompressed import decompress, scheme_of
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

Tensors = dict[str, Tensor]
_FARTHEST = 0.7  # of a 4-bit weight from its source, relative


class Lost(Exception):
    """A tensor of the source has not come through."""


def tensors_of(folder: Path) -> Tensors:
    """All tensors of a folder, by name."""
    found: Tensors = {}
    for shard in sorted(folder.glob("*.safetensors")):
        with safe_open(shard, "pt") as f:
            found |= {name: f.get_tensor(name) for name in f.keys()}
    return found


def fake_quantized(source: Path, out: Path) -> Tensors:
    """The tensors of the source with the values that the packed folder has for them: quantized ones in float32."""
    wanted, found = tensors_of(source), tensors_of(out)
    written = QuantizationConfig.model_validate(json.loads((out / "config.json").read_text())["quantization_config"])
    read_as = json.loads((out / "qkit.json").read_text()).get("read_as", {})
    linears: dict[str, Tensors] = {}
    for name, tensor in found.items():
        linears.setdefault(name.rpartition(".")[0], {})[name.rpartition(".")[2]] = tensor
    packed = {name: own for name, own in linears.items() if "weight_scale" in own}
    weights = {f"{name}.weight": decompress(own, scheme_of(name, written)) for name, own in packed.items()}
    result = {}
    for name, original in wanted.items():
        if name in weights:
            result[name] = _nearest(name, original, [weights[name]])
        elif name in found:
            if not torch.equal(found[name], original):
                raise Lost(f"{name} is not quantized, and its values differ from the source")
            result[name] = original
        else:
            candidates = [*_fused(name, original, weights), *_read_as(original, read_as.get(name, []), found | weights)]
            result[name] = _nearest(name, original, candidates)
    return result


def _read_as(original: Tensor, names: list[str], values: Tensors) -> Iterator[Tensor]:
    """Candidates for a tensor of the source that the model reads as others: these in a row, or rows of one of them."""
    if not names or any(name not in values for name in names):
        return
    if len(names) == len(original):
        yield torch.stack([values[name].float() for name in names])
    fitting = [values[name].float() for name in names if values[name].shape[1:] == original.shape[1:]]
    whole = torch.cat(fitting) if fitting else original[:0].float()
    for start in range(0, len(whole) - len(original) + 1, max(1, len(original))):
        yield whole[start : start + len(original)]


def _fused(name: str, original: Tensor, weights: Tensors) -> Iterator[Tensor]:
    """Candidates for a tensor of the source that is several in the file: experts, one by one."""
    owner = name.removesuffix(".weight").rpartition(".")[0]
    parts: dict[str, dict[int, Tensor]] = {}
    for stored, weight in weights.items():
        found = re.fullmatch(rf"{re.escape(owner)}\.(?:experts\.)?(\d+)\.(\w+)\.weight", stored)
        if found:
            parts.setdefault(found[2], {})[int(found[1])] = weight
    stacks = [torch.stack([own[e] for e in sorted(own)]) for own in parts.values() if len(own) == len(original)]
    yield from stacks
    for a in stacks:
        if a.shape[1] == 2 * original.shape[1]:  # a gate and what it gates, which the file of the source has apart
            yield from a.chunk(2, 1)
        for b in stacks:
            if a is not b and a.shape == b.shape:
                yield torch.cat([a, b], 1)
                yield torch.stack([a, b], 2).flatten(1, 2)


def _nearest(name: str, original: Tensor, candidates: list[Tensor]) -> Tensor:
    """The candidate nearest to the original, as it is or transposed, in the shape of the original."""
    turned = [c for c in candidates if c.shape == original.shape]
    turned += [c.transpose(-1, -2) for c in candidates if c.transpose(-1, -2).shape == original.shape]
    wide = original.float()
    distances = [float((c - wide).norm() / wide.norm().clamp_min(1e-9)) for c in turned]
    if not distances:
        raise Lost(f"{name} of the source is nowhere in the output")
    if min(distances) > _FARTHEST:
        raise Lost(f"{name} differs from the source by {min(distances):.2f} of its norm")
    return turned[distances.index(min(distances))].contiguous()


def stock_class(folder: Path) -> Any:
    """The class of transformers that config.json names."""
    return getattr(transformers, json.loads((folder / "config.json").read_text())["architectures"][0])


def load_stock(folder: Path) -> Any:
    """The model in float32, loaded by transformers; every name has to fit."""
    model, report = stock_class(folder).from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    misfits = {k: sorted(map(str, v))[:2] for k, v in report.items() if v}
    if misfits:
        raise Lost(f"names do not fit: {misfits}")
    return model.eval()


def reference(source: Path, out: Path, scratch: Path) -> Any:
    """The stock model in float32 with the weights that the packed folder stands for. Raises Lost."""
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    for file in source.iterdir():
        if file.suffix == ".json" and "index" not in file.name:
            shutil.copy(file, scratch)
    save_file(
        {n: t.contiguous() for n, t in fake_quantized(source, out).items()},
        scratch / "model.safetensors",
        {"format": "pt"},
    )
    model = load_stock(scratch)
    shutil.rmtree(scratch)
    return model


def matrices(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(what is a matrix product in the blocks, other tensors with two or more dimensions in them), by parameter name.

    The blocks are the outermost lists of modules that have a linear inside.
    """
    lists = [n for n, m in model.named_modules() if isinstance(m, nn.ModuleList) and _has_matrix(m)]
    outer = tuple(f"{n}." for n in lists if not n.startswith(tuple(f"{o}." for o in lists if o != n)))
    owners = dict(model.named_modules())
    products, others = {}, {}
    for name, p in model.named_parameters():
        owner = owners[name.rpartition(".")[0]]
        if p.dim() < 2 or not name.startswith(outer) or isinstance(owner, nn.Embedding):
            continue
        (products if _multiplies(owner, p) else others)[name] = p.detach()
    return products, others


def _has_matrix(module: nn.Module) -> bool:
    return any(_multiplies(m, p) for m in module.modules() for p in m.parameters(recurse=False))


def _multiplies(owner: nn.Module, p: Tensor) -> bool:
    if isinstance(owner, (nn.Linear, Conv1D)):
        return p.dim() == 2
    return p.dim() == 3 and ("xpert" in type(owner).__name__ or hasattr(owner, "num_experts"))


class Coverage:
    """What became of every matrix product of the blocks, by numbers of weights.

    A tensor of the file belongs to the parameter of the stock model that has its first row among its rows or columns.
    """

    def __init__(self, source: Path, record: dict[str, Any]) -> None:
        self.products, self.others = matrices(load_stock(source))
        self.stored, self.places = tensors_of(source), {}
        for name, p in [*self.products.items(), *self.others.items()]:
            for rows in (p.reshape(-1, p.shape[-1]), p.transpose(-1, -2).reshape(-1, p.shape[-2])):
                for row in rows[:, :8].contiguous():
                    self.places[row.numpy().tobytes()] = name
        self.read_as: dict[str, tuple[str, ...]] = {}
        for stored, names in record.get("read_as", {}).items():
            self.read_as |= {n: (*self.read_as.get(n, ()), stored) for n in names}
        self.quantized: dict[str, int] = {}
        self.kept: dict[str, int] = {}
        parts: dict[tuple[str, ...], int] = {}
        for name, linear in record["linears"].items():
            self._note(name, parts, linear["shape"])
        for where, weights in parts.items():
            self._count(where, self.quantized, weights)
        for name in record["skipped"]:
            where = self._where(name, None)
            if where:
                self._count(where, self.kept, sum(self.stored[n].numel() for n in where))
            elif f"{name}.weight" in self.products:
                self.kept[f"{name}.weight"] = self.products[f"{name}.weight"].numel()

    def _note(self, name: str, parts: dict[tuple[str, ...], int], shape: list[int]) -> None:
        """Add the weights of a linear to those of the stored tensors that hold it."""
        where = self._where(name, shape)
        if where:
            parts[where] = parts.get(where, 0) + shape[0] * shape[1]
        elif f"{name}.weight" in self.products:  # computed from others: it has the model's name
            self.quantized[f"{name}.weight"] = shape[0] * shape[1]

    def _where(self, name: str, shape: list[int] | None) -> tuple[str, ...]:
        """The stored tensors that hold a linear of the record, or a name that was skipped."""
        where = next((n for n in (f"{name}.weight", name) if n in self.stored), None) or self._fused(name, shape)
        return self.read_as.get(f"{name}.weight", ()) if where is None else (where,)

    def _count(self, where: tuple[str, ...], counts: dict[str, int], weights: int) -> None:
        """Add weights of stored tensors to the parameters of the stock model that they hold: q, k and v may be one tensor."""
        tensors = [self.stored[n] for n in where if self.stored[n].dim() >= 2]
        whole = weights == sum(t.numel() for t in tensors)
        for tensor in tensors if whole else tensors[:1]:
            rows = tensor.float().reshape(-1, tensor.shape[-1])
            for row in rows if whole else rows[:1]:
                place = self._place(row)
                if place is not None:
                    counts[place] = counts.get(place, 0) + (row.numel() if whole else weights)

    def _place(self, row: Tensor) -> str | None:
        """The parameter of the stock model that has this row among its rows or columns."""
        return self.places.get(row[:8].contiguous().numpy().tobytes())

    def _fused(self, name: str, shape: list[int] | None) -> str | None:
        """The tensor of all experts in the source that this one linear of an expert was in."""
        inside = re.fullmatch(r"(.*)\.\d+\.(\w+)", name)
        if inside is None or shape is None:
            return None
        sizes = [{shape[0], shape[1]}, {2 * shape[0], shape[1]}]
        own = [n for n, t in self.stored.items() if n.startswith(f"{inside[1]}.") and t.dim() == 3]
        fitting = [n for n in own if set(self.stored[n].shape[1:]) in sizes]
        if f"{inside[1]}.{inside[2]}" in fitting:
            return f"{inside[1]}.{inside[2]}"
        down = [n for n in fitting if "down" in n or "fc2" in n or "output" in n]
        return next(iter(down if "down" in name else [n for n in fitting if n not in down] or fitting), None)

    def summary(self) -> dict[str, Any]:
        """covered, quantized: shares of the weights of matrix products; missing: parameters with neither format nor reason."""
        total = sum(p.numel() for p in self.products.values())
        quantized = sum(min(self.quantized.get(n, 0), p.numel()) for n, p in self.products.items())
        missing = {
            n: p.numel() - self.quantized.get(n, 0) - self.kept.get(n, 0)
            for n, p in self.products.items()
            if self.quantized.get(n, 0) + self.kept.get(n, 0) < p.numel()
        }
        silent = [n for n, p in self.others.items() if self.kept.get(n, 0) + self.quantized.get(n, 0) < p.numel()]
        return {
            "covered": 100 * (1 - sum(missing.values()) / max(total, 1)),
            "quantized": 100 * quantized / max(total, 1),
            "missing": sorted(missing)[:3],
            "silent": sorted(silent)[:3],
        }
