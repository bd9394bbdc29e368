"""The tensors of a result: their dtypes and shapes by name, and how each is made, one at a time.

They come from the job's parts and the source shards. Of a result in GGUF a quantized weight is the bytes of its blocks, and
vectors are float32, as llama.cpp wants them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from qkit.engine.ends import STAGE
from qkit.engine.job import Job
from qkit.families.structure import ModelStructure
from qkit.files.gguf_places import SCALE as TENSOR_SCALE
from qkit.files.safefile import TensorInfo
from qkit.planning.gguf import GGUF
from qkit.planning.kept import stored_as
from qkit.planning.linear_plan import LinearPlan
from qkit.planning.plan import Plan, parts
from qkit.tensor import compressed_tensors as ct
from qkit.tensor import gguf_blocks, lowrank, sparse
from qkit.tensor.input_transform import RESIDUAL, SCALE
from qkit.tensor.layouts.table import LAYOUTS, cache_name, scale_dtype, stores_zeros, with_zeros
from qkit.tensor.qtensor import weight_sha256
from qkit.transforms.rotate import rotate_outer


class ExportTensors:
    """All tensors of the output: specs by name, and a function that loads each.

    plain: sha256 of tensors whose bytes the weight hash does not cover (plain tensors, static scales); filled on export
    """

    def __init__(self, plan: Plan, structure: ModelStructure, job: Job) -> None:
        self.plan, self.structure, self.job = plan, structure, job
        self.records = job.records()
        self.in_gguf, self.layout = plan.export == GGUF, LAYOUTS.get(plan.export)
        self.zeros = stores_zeros(plan.export, {n: (p.weights, p.activations) for n, p in plan.packed.items()})
        self.specs: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
        self.plain: dict[str, str] = {}
        self._loaders: dict[str, Callable[[], Tensor]] = {}
        self._cached: tuple[str, dict[str, Tensor]] = ("", {})
        rotated = rotate_outer(structure, plan.seed) if "rotate" in plan.transforms else {}
        packed = {f"{name}.weight" for name in plan.ends}
        for stored, tensor in rotated.items():
            if stored in packed:
                continue
            self._add_plain(stored, tensor.dtype, tuple(tensor.shape), lambda t=tensor: t)  # type: ignore[misc]
        blocks = parts(plan, structure)
        covered = {*rotated, *packed, *(stored for block in blocks for _, stored in block.stored)}
        for stored in (*(s for _, s in structure.outer), *structure.unloaded):
            if stored not in covered:
                self._add_copied(stored)
        for index, block in enumerate(blocks):
            self._add_part(index)
            for linear in block.linears:
                if linear.name in plan.linears:
                    self._add_linear(plan.linears[linear.name], index)
                elif linear.name in plan.kept:
                    self._add_kept(linear.name)
        for p in plan.ends.values():
            ends = job.stage(STAGE)
            assert ends is not None, "the ends were never quantized"
            self._add_linear(p, ends)
        scales = job.stage("cache")
        if scales is not None:
            self._add_part(scales)

    def _scale_dtype(self, p: LinearPlan) -> torch.dtype:
        return scale_dtype(self.plan.export, p.weights, self.structure.dtype, self.structure.dtype)

    def _add_part(self, index: int) -> None:
        """Add the tensors that a part has under the names of the checkpoint."""
        for name, info in self.job.part(index).items():
            if ":" not in name:
                stored = cache_name(name, self.plan.export)
                self._add_plain(stored, info.torch_dtype, info.shape, lambda i=info: self.job.read(i))  # type: ignore[misc]

    def _add_copied(self, name: str) -> None:
        """Add a tensor as the source has it, or the ones that it is a view of."""
        checkpoint = self.structure.checkpoint
        view = checkpoint.views.get(name)
        if view is None:
            info = checkpoint.tensors[name]
            self._add_plain(name, info.torch_dtype, info.shape, lambda: checkpoint.read_finite(name))
            return
        for source in view.sources:
            info = checkpoint.sources[source]
            self._add_plain(source, info.torch_dtype, info.shape, lambda s=source: checkpoint.read_source(s))  # type: ignore[misc]

    def _add_plain(self, name: str, dtype: torch.dtype, shape: tuple[int, ...], load: Callable[[], Tensor]) -> None:
        self.specs[name] = (dtype, shape)
        self.plain[name] = ""
        self._loaders[name] = load
        if self.in_gguf and len(shape) == 1:
            self.specs[name] = (torch.float32, shape)
            self._loaders[name] = lambda: load().to(torch.float32)

    def _add_linear(self, p: LinearPlan, block: int) -> None:
        if self.in_gguf:
            row = gguf_blocks.block_bytes(p.weights, (p.shape[1],))
            self.specs[f"{p.name}.weight"] = (torch.uint8, (p.shape[0], row))
            self._loaders[f"{p.name}.weight"] = lambda: gguf_blocks.pack(
                self.job.quantized(block, p.name, p.weights)[0]
            )
            if p.weights.scale == "e4m3":
                q = self.job.quantized
                self._add_plain(
                    f"{p.name}{TENSOR_SCALE}",
                    torch.float32,
                    (1,),
                    lambda: gguf_blocks.scale_of_tensor(q(block, p.name, p.weights)[0]),
                )
            return
        outlier_count = int(self.records[p.name].get("sparse", 0))
        correction = sparse.specs(p.shape, outlier_count, self.structure.dtype) | lowrank.specs(
            p.shape, p.rank, self.structure.dtype
        )
        dense = (self.layout or ct).specs(p.weights, p.activations, p.shape, self._scale_dtype(p))
        transform = {k: (info.torch_dtype, info.shape) for k, info in self._transform_infos(p.name, block).items()}
        for suffix, spec in {**dense, **correction, **transform}.items():
            name = f"{p.name}.{suffix}"
            self.specs[name] = spec
            if suffix.startswith("input_") or suffix in (SCALE, *sparse.PIECES, *lowrank.PIECES):
                # The hash of the weight does not cover it, or not every bit of it: a small value added to a large one.
                self.plain[name] = ""
            self._loaders[name] = lambda s=suffix: self._tensors_of(p, block)[s]  # type: ignore[misc]

    def _add_kept(self, name: str) -> None:
        """Add a linear as the source stores it; its record is made when its tensors are."""
        info, kept = stored_as(name, self.structure.checkpoint)

        def tensors() -> dict[str, Tensor]:
            if self._cached[0] != name:
                self._cached = (name, kept.make(self.structure.checkpoint.read_stored(info)))
            return self._cached[1]

        for suffix, spec in kept.specs.items():
            self.specs[f"{name}.{suffix}"] = spec
            if suffix.startswith("input_"):
                self.plain[f"{name}.{suffix}"] = ""
            self._loaders[f"{name}.{suffix}"] = lambda s=suffix: tensors()[s]  # type: ignore[misc]

    def kept_record(self, name: str) -> dict[str, Any]:
        """The fields of a kept linear's record that say what was made of it: nothing, and what its numbers are."""
        info, kept = stored_as(name, self.structure.checkpoint)
        p = self.plan.kept[name]
        q = ct.read(kept.make(self.structure.checkpoint.read_stored(info)), p.weights, p.shape)
        return {"error": 0.0, "baseline_error": 0.0, "fallback": None, "weight_sha256": weight_sha256([q])}

    def _transform_infos(self, name: str, block: int) -> dict[str, TensorInfo]:
        """Headers of the part's tensors for the transform of a linear's inputs."""
        part = self.job.part(block)
        return {k: part[f"{name}:{k}"] for k in (SCALE, RESIDUAL) if f"{name}:{k}" in part}

    def _tensors_of(self, p: LinearPlan, block: int) -> dict[str, Tensor]:
        """All tensors of a linear; cached until another linear is requested."""
        if self._cached[0] != p.name:
            q, static = self.job.quantized(block, p.name, p.weights)
            added = {} if q.sparse is None else sparse.write(q.sparse, q.shape)
            added |= {} if q.low_rank is None else lowrank.write(q.low_rank)
            added |= {k: self.job.read(info) for k, info in self._transform_infos(p.name, block).items()}
            stored = with_zeros(q) if self.zeros else q
            written = (self.layout or ct).write(stored, p.activations, static, self._scale_dtype(p))
            self._cached = (p.name, {**written, **added})
        return self._cached[1]

    def load(self, name: str) -> Tensor:
        tensor = self._loaders[name]()
        if name in self.plain:
            self.plain[name] = _sha256(tensor)
        return tensor


def _sha256(tensor: Tensor) -> str:
    data = tensor.contiguous().reshape(-1).view(torch.uint8)
    return hashlib.sha256(data.numpy().data).hexdigest()
