"""Writes the checkpoint folder of a finished job. It is built in OUT.partial, verified, then renamed to OUT.

Tensors stream one at a time from the job's parts and the source shards into new shards. The export needs only these, so it can
be repeated.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qkit.diffusion.pipeline import copy_rest, hash_weights_around, rest_names
from qkit.diffusion.trajectory import Trajectory
from qkit.engine.ends import STAGE
from qkit.engine.job import Job
from qkit.engine.partial_output import Partial
from qkit.errors import QkitError
from qkit.families.pruned import PrunedStructure
from qkit.families.structure import ModelStructure
from qkit.files.folder import DENOISER, RECORD, WEIGHT_STEMS, hub_source, read_record, weights_folder
from qkit.files.hash_cache import cached_sha256
from qkit.files.record import FORMAT_VERSION, to_bytes, write_record
from qkit.files.safefile import DTYPE_NAMES, TensorInfo, write_atomic, write_safetensors
from qkit.files.side_files import check_unchanged, copy_side_files
from qkit.kvcache.scales import FORMAT
from qkit.planning.kept import stored_as
from qkit.planning.linear_plan import LinearPlan
from qkit.planning.plan import Plan, parts
from qkit.planning.stock_loader import stock_refusal
from qkit.system.version import __version__
from qkit.tensor import compressed_tensors as ct
from qkit.tensor import lowrank, sparse
from qkit.tensor.input_transform import RESIDUAL, SCALE
from qkit.tensor.qtensor import weight_sha256
from qkit.transforms.rotate import rotate_outer

SHARD_BYTES = 5 * 10**9


def export(
    plan: Plan,
    structure: ModelStructure,
    job: Job,
    partial: Partial,
    source_folder: Path,
    hashed: Mapping[str, str],
    shard_bytes: int = SHARD_BYTES,
    replaced: Mapping[str, Path] | None = None,
) -> None:
    """Write the checkpoint into ``partial`` (emptied first), with the rest of the pipeline where ``source_folder`` is one.

    hashed:   ``source_hashes``
    replaced: {component: folder to copy in place of its own}
    Raises BadCheckpoint, before anything is written, for a copied file that changed since the plan was made.
    """
    check_unchanged(structure.checkpoint.path, plan.side_files)
    if plan.pipeline is not None:
        check_unchanged(source_folder.resolve(), plan.pipeline)
    folder = partial.path if plan.pipeline is None else partial.path / DENOISER
    source = _Tensors(plan, structure, job)
    stem = WEIGHT_STEMS[1] if structure.family.streams else WEIGHT_STEMS[0]
    name_lists = _split_shards(source.specs, shard_bytes)
    shards = {_shard_name(stem, i, len(name_lists)): names for i, names in enumerate(name_lists)}
    index_name = f"{stem}.safetensors.index.json"
    names = [*shards, index_name, "config.json", RECORD, *plan.side_files]
    around = [] if plan.pipeline is None else [*rest_names(plan.pipeline, replaced or {}), RECORD]
    partial.begin([*around, *(str((folder / name).relative_to(partial.path)) for name in names)])
    copied: dict[str, str] = {}
    if plan.pipeline is not None:
        trajectory = None if plan.calibration is None else plan.calibration.trajectory
        sampling = trajectory.sampling if isinstance(trajectory, Trajectory) else None
        called = None if sampling is None else to_bytes({"call": sampling.call, "prompts": list(sampling.prompts)})
        copied = copy_rest(source_folder, partial.path, plan.pipeline, called, replaced)
        folder.mkdir()
    documents: dict[str, bytes] = {}
    hashes = {
        file: write_safetensors(folder / file, [(n, *source.specs[n]) for n in inside], source.load)
        for file, inside in shards.items()
    }
    if len(shards) > 1:
        total = sum(_bytes(s) for s in source.specs.values())
        weight_map = {name: file for file, inside in shards.items() for name in inside}
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        documents[index_name] = to_bytes(index)
    config = _config(plan, structure, job, source)
    documents["config.json"] = to_bytes(config)
    for name, data in documents.items():
        write_atomic(folder / name, data)
    files = {**hashes, **{name: hashlib.sha256(data).hexdigest() for name, data in documents.items()}}
    files |= copy_side_files(structure.checkpoint.path, folder, plan.side_files)
    record = _record(plan, structure, source, hashes, hashed) | {"files": files, "config": without_quantization(config)}
    digest = write_record(folder, record)
    if plan.pipeline is not None:
        files = {**copied, f"{DENOISER}/{RECORD}": digest}
        top = {"format_version": FORMAT_VERSION, "qkit_version": __version__, "pipeline": DENOISER, "files": files}
        write_record(partial.path, top)


def _shard_name(stem: str, index: int, count: int) -> str:
    return f"{stem}.safetensors" if count == 1 else f"{stem}-{index + 1:05d}-of-{count:05d}.safetensors"


def without_quantization(config: dict[str, Any]) -> dict[str, Any]:
    """The part of config.json that the record keeps."""
    return {key: value for key, value in config.items() if key != "quantization_config"}


def _bytes(spec: tuple[torch.dtype, tuple[int, ...]]) -> int:
    dtype, shape = spec
    return int(torch.Size(shape).numel()) * dtype.itemsize


def _split_shards(specs: dict[str, tuple[torch.dtype, tuple[int, ...]]], limit: int) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    size = 0
    for name, spec in specs.items():
        if shards[-1] and size + _bytes(spec) > limit:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += _bytes(spec)
    return shards


class _Tensors:
    """All tensors of the output: specs by name, and a function that loads each.

    plain: sha256 of tensors whose bytes the weight hash does not cover (plain tensors, static scales); filled on export
    """

    def __init__(self, plan: Plan, structure: ModelStructure, job: Job) -> None:
        self.plan, self.structure, self.job = plan, structure, job
        self.records = job.records()
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

    def _add_part(self, index: int) -> None:
        """Add the tensors that a part has under the names of the checkpoint."""
        for name, info in self.job.part(index).items():
            if ":" not in name:
                self._add_plain(name, info.torch_dtype, info.shape, lambda i=info: self.job.read(i))  # type: ignore[misc]

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

    def _add_linear(self, p: LinearPlan, block: int) -> None:
        outlier_count = int(self.records[p.name].get("sparse", 0))
        correction = sparse.specs(p.shape, outlier_count, self.structure.dtype) | lowrank.specs(
            p.shape, p.rank, self.structure.dtype
        )
        dense = ct.specs(p.weights, p.activations, p.shape, self.structure.dtype)
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
            self._cached = (p.name, {**ct.write(q, p.activations, static, self.structure.dtype), **added})
        return self._cached[1]

    def load(self, name: str) -> Tensor:
        tensor = self._loaders[name]()
        if name in self.plain:
            self.plain[name] = _sha256(tensor)
        return tensor


def _sha256(tensor: Tensor) -> str:
    data = tensor.contiguous().reshape(-1).view(torch.uint8)
    return hashlib.sha256(data.numpy().data).hexdigest()


def _config(plan: Plan, structure: ModelStructure, job: Job, source: _Tensors) -> dict[str, Any]:
    config = dict(structure.checkpoint.config)
    if plan.untied:
        config["tie_word_embeddings"] = False
    config["quantization_config"] = quantization_config(plan, structure)
    for key, suffix in (("scaled", SCALE), ("residual", RESIDUAL)):
        listed = sorted(name for name in plan.linears if f"{name}.{suffix}" in source.specs)
        if listed:
            config["quantization_config"][key] = listed
    for key, count in (("sparse", "sparse"), ("low_rank", "rank")):
        names = sorted(name for name, record in job.records().items() if record.get(count))
        if names:
            config["quantization_config"][key] = names
    rotated = {name: p.rotation for name, p in plan.linears.items() if p.rotation}
    if rotated:
        config["quantization_config"]["rotated"] = rotated
    return config


def quantization_config(plan: Plan, structure: ModelStructure) -> dict[str, Any]:
    """The compressed-tensors configuration of a plan."""
    renamed = {stored: module for stored, module in module_names(structure).items() if stored != module}
    formats_by_linear = {name: (p.weights, p.activations) for name, p in plan.packed.items()}
    layers = [name for name in plan.skipped if name not in structure.checkpoint.tensors]  # others are bare parameters
    for sources, views in structure.checkpoint.view_groups.items():  # a loader knows the model's layers
        if any(source.removesuffix(".weight") in plan.skipped for source in sources):
            layers += [name.removesuffix(".weight") for name in views]
    ends = tuple(n for n, p in plan.ends.items() if p.uses)  # the others are linears
    built = ct.config(formats_by_linear, layers, renamed, FORMAT if plan.static_cache else None, ends)
    return {**built, "quant_method": plan.export}


def module_names(structure: ModelStructure) -> dict[str, str]:
    """{checkpoint name: module name} of linears, embeddings, heads and routers."""
    ends = (structure.family.head, structure.family.embeddings)
    names = {**{structure.stored_name(n): n for n in ends if n}, **structure.outside}
    for block in structure.every_block:
        for name, stored in block.stored:
            if name.endswith(".weight"):
                names[stored.removesuffix(".weight")] = f"{block.path}.{name}".removesuffix(".weight")
    return names


def _record(
    plan: Plan, structure: ModelStructure, source: _Tensors, hashes: dict[str, str], hashed: Mapping[str, str]
) -> dict[str, Any]:
    """Content of qkit.json: the settings of the run, and a hash for every tensor."""
    linears = {
        p.name: {
            **_settings(p),
            **({"uses": list(p.uses)} if p.uses else {}),
            **({"rotation": p.rotation} if p.rotation else {}),
            **({"scaled": True} if f"{p.name}.{SCALE}" in source.specs else {}),
            **({"residual": p.residual} if f"{p.name}.{RESIDUAL}" in source.specs else {}),
            **source.records[p.name],
        }
        for p in (*plan.linears.values(), *plan.ends.values())
    }
    linears |= {name: _settings(p) | {"kept": True} | source.kept_record(name) for name, p in plan.kept.items()}
    plain = {
        name: {"dtype": DTYPE_NAMES[str(source.specs[name][0])], "shape": list(source.specs[name][1]), "sha256": digest}
        for name, digest in sorted(source.plain.items())
    }
    return {
        "format_version": FORMAT_VERSION,
        "qkit_version": __version__,
        "compressed_tensors": version("compressed-tensors"),
        "source": {
            "fingerprint": plan.source_fingerprint,
            **hashed,
            **(
                {} if structure.checkpoint.adapter is None else {"adapter": cached_sha256(structure.checkpoint.adapter)}
            ),
            "model_type": plan.model_type,
            "bytes": plan.source_bytes,
            **hub_source(structure.checkpoint.path),
        },
        "plan_hash": plan.hash,
        "recipe": plan.recipe,
        "seed": plan.seed,
        "transforms": list(plan.transforms),
        "calibration": None if plan.calibration is None else plan.calibration.to_json(),
        "linears": linears,
        "skipped": plan.skipped,
        "fused": [list(f) for f in plan.fused],
        "tied": [] if plan.untied else [[a, b] for a, b in structure.tied.items() if b in structure.checkpoint.tensors],
        "plain": plain,
        **({"stock_refusal": refusal} if (refusal := stock_refusal(plan, structure)) else {}),
        **({"read_as": read_as} if (read_as := _read_as(structure, source)) else {}),
        "shards": hashes,
        **({"experts": structure.record(plain)} if isinstance(structure, PrunedStructure) else {}),
        **({} if plan.kv is None else {"kv": plan.kv}),
        **({} if plan.key_exponents is None else {"key_exponents": plan.key_exponents}),
    }


def _read_as(structure: ModelStructure, source: _Tensors) -> dict[str, list[str]]:
    """{tensor of the source that is not in the result: the tensors that the model reads it as}, in the model's order."""
    groups = structure.checkpoint.view_groups.items()
    return {stored: names for sources, names in groups for stored in sources if stored not in source.specs}


def _settings(p: LinearPlan) -> dict[str, Any]:
    return {
        "format": p.weights.to_json(),
        "activations": None if p.activations is None else p.activations.to_json(),
        "shape": list(p.shape),
        "scheme": p.scheme,
        "solver": p.solver,
    }


def is_export_of(out: Path, plan: Plan, source: Mapping[str, str] | None = None) -> bool:
    """Whether the record of ``out`` names this plan, and a source with these ``source_hashes`` (None: any source).

    Files are not checked against the record; ``verify`` does that.
    """
    try:
        record = read_record(weights_folder(out))
    except QkitError:  # one that is damaged is replaced, or refused, as any other folder
        return False
    if record is None:
        return False
    source_record = record.get("source", {})
    same = all(source_record.get(key) == digest for key, digest in (source or {}).items())
    return same and bool(record.get("plan_hash") == plan.hash)


def source_hashes(
    plan: Plan, structure: ModelStructure, source_folder: Path, step: Callable[[], object] = lambda: None
) -> dict[str, str]:
    """sha256 of the source's weights and, in a pipeline, of the weights of its other parts.

    Quick where the files were hashed before (``hash_cache``). step: called for every shard.
    """
    hashes = {"sha256": structure.checkpoint.sha256(step)}
    return hashes if plan.pipeline is None else {**hashes, "around": hash_weights_around(source_folder, plan.pipeline)}


def job_identity(plan: Plan, hashed: Mapping[str, str]) -> dict[str, Any]:
    """The identity of a job: two jobs with equal identities are the same. hashed: ``source_hashes``"""
    return {**plan.identity, "source_weights": dict(hashed)}
