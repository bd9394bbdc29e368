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

from qkit.diffusion.pipeline import copy_rest, hash_weights_around, rest_names
from qkit.diffusion.trajectory import Trajectory
from qkit.engine.card import result_card, write_card
from qkit.engine.export_tensors import ExportTensors
from qkit.engine.gguf_file import write_gguf
from qkit.engine.job import Job
from qkit.engine.partial_output import Partial
from qkit.errors import QkitError
from qkit.families.pruned import PrunedStructure
from qkit.families.structure import ModelStructure
from qkit.files.card import CARD
from qkit.files.folder import DENOISER, RECORD, WEIGHT_STEMS, hub_source, read_record, weights_folder
from qkit.files.gguf_container import MODEL
from qkit.files.hash_cache import cached_sha256
from qkit.files.record import FORMAT_VERSION, to_bytes, write_record
from qkit.files.safefile import DTYPE_NAMES, write_atomic, write_safetensors
from qkit.files.side_files import RECIPE, check_unchanged, copy_side_files
from qkit.kvcache.scales import FORMATS as CACHE_FORMATS
from qkit.planning.gguf import GGUF
from qkit.planning.layout import layout_config
from qkit.planning.linear_plan import LinearPlan
from qkit.planning.plan import Plan
from qkit.planning.recipe_file import RecipeFile
from qkit.planning.stock_loader import stock_refusal
from qkit.system.version import __version__
from qkit.tensor import compressed_tensors as ct
from qkit.tensor.input_transform import RESIDUAL, SCALE
from qkit.tensor.layouts.table import LAYOUTS

SHARD_BYTES = 5 * 10**9


def export(
    plan: Plan,
    structure: ModelStructure,
    job: Job,
    partial: Partial,
    source_folder: Path,
    hashed: Mapping[str, str],
    recipe: RecipeFile,
    shard_bytes: int = SHARD_BYTES,
    replaced: Mapping[str, Path] | None = None,
    edited: bytes | None = None,
) -> None:
    """Write the checkpoint into ``partial`` (emptied first), with the rest of the pipeline where ``source_folder`` is one.

    hashed:   ``source_hashes``
    recipe:   recipe.yaml
    replaced: {component: folder to copy in place of its own}
    edited:   the card that this one goes on from, in place of that of the source
    Raises BadCheckpoint, before anything is written, for a copied file that changed since the plan was made.
    """
    check_unchanged(structure.checkpoint.path, plan.side_files)
    if plan.pipeline is not None:
        check_unchanged(source_folder.resolve(), plan.pipeline)
    folder = partial.path if plan.pipeline is None else partial.path / DENOISER
    source = ExportTensors(plan, structure, job)
    if plan.export == GGUF:
        _export_gguf(plan, structure, partial, source, hashed, recipe, edited)
        return
    stem = WEIGHT_STEMS[1] if structure.family.streams else WEIGHT_STEMS[0]
    name_lists = split_shards(source.specs, shard_bytes)
    shards = {shard_name(stem, i, len(name_lists)): names for i, names in enumerate(name_lists)}
    index_name = f"{stem}.safetensors.index.json"
    config = _config(plan, structure, job, source)
    documents = _beside_config(plan, config)
    names = [*shards, index_name, "config.json", *documents, RECORD, *plan.side_files]
    around = [CARD, RECIPE]
    around += [] if plan.pipeline is None else [*rest_names(plan.pipeline, replaced or {}), RECORD]
    partial.begin(list(dict.fromkeys([*around, *(str((folder / n).relative_to(partial.path)) for n in names)])))
    copied: dict[str, str] = {}
    if plan.pipeline is not None:
        trajectory = None if plan.calibration is None else plan.calibration.trajectory
        sampling = trajectory.sampling if isinstance(trajectory, Trajectory) else None
        called = None if sampling is None else to_bytes({"call": sampling.call, "prompts": list(sampling.prompts)})
        copied = copy_rest(source_folder, partial.path, plan.pipeline, called, replaced)
        folder.mkdir()
    hashes = {
        file: write_safetensors(folder / file, [(n, *source.specs[n]) for n in inside], source.load)
        for file, inside in shards.items()
    }
    if len(shards) > 1:
        total = sum(spec_bytes(s) for s in source.specs.values())
        weight_map = {name: file for file, inside in shards.items() for name in inside}
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        documents[index_name] = to_bytes(index)
    documents["config.json"] = to_bytes(config)
    files = dict(hashes)
    for name, data in documents.items():
        _write(folder, name, data, files)
    files |= copy_side_files(structure.checkpoint.path, folder, plan.side_files)
    size = sum(spec_bytes(s) for s in source.specs.values())
    beside = files if plan.pipeline is None else copied  # card and recipe are those of the whole pipeline
    _write(partial.path, RECIPE, recipe.content, beside)
    write_card(partial.path, beside, lambda card: result_card(card, plan, structure, size, recipe.command), edited)
    record = _record(plan, structure, source, hashes, hashed) | {"files": files, "config": without_quantization(config)}
    digest = write_record(folder, record)
    if plan.pipeline is not None:
        files = {**copied, f"{DENOISER}/{RECORD}": digest}
        top = {"format_version": FORMAT_VERSION, "qkit_version": __version__, "pipeline": DENOISER, "files": files}
        write_record(partial.path, top)


def _write(folder: Path, name: str, data: bytes, files: dict[str, str]) -> None:
    """Write a file, and its sha256 into ``files``."""
    write_atomic(folder / name, data)
    files[name] = hashlib.sha256(data).hexdigest()


def _beside_config(plan: Plan, config: dict[str, Any]) -> dict[str, bytes]:
    """Files that say of a layout what config.json says, for older readers."""
    layout = LAYOUTS.get(plan.export)
    found = {} if layout is None else layout.files(config["quantization_config"])
    return {name: to_bytes(content) for name, content in found.items()}


def _export_gguf(
    plan: Plan,
    structure: ModelStructure,
    partial: Partial,
    source: ExportTensors,
    hashed: Mapping[str, str],
    recipe: RecipeFile,
    edited: bytes | None,
) -> None:
    """The folder with one GGUF file; the tokenizer and other files stay beside it, for qkit and for eyes."""
    model, folder = structure.checkpoint, partial.path
    partial.begin(list(dict.fromkeys([MODEL, "config.json", RECORD, CARD, RECIPE, *plan.side_files])))
    digest, plain = write_gguf(folder / MODEL, plan, structure, source)
    hashes = {MODEL: digest}
    entries = {name: place.to_json() for name, place in structure.gguf.places.items()}
    config = {**model.config, "quantization_config": {"quant_method": GGUF, "tensors": entries}}
    files = dict(hashes)
    _write(folder, "config.json", to_bytes(config), files)
    _write(folder, RECIPE, recipe.content, files)
    files |= copy_side_files(model.path, folder, plan.side_files)
    size = (folder / MODEL).stat().st_size
    write_card(folder, files, lambda card: result_card(card, plan, structure, size, recipe.command), edited)
    record = _record(plan, structure, source, hashes, hashed) | {"files": files, "config": without_quantization(config)}
    write_record(folder, record | {"plain": dict(sorted(plain.items()))})


def shard_name(stem: str, index: int, count: int) -> str:
    """The name of one of ``count`` shards."""
    return f"{stem}.safetensors" if count == 1 else f"{stem}-{index + 1:05d}-of-{count:05d}.safetensors"


def without_quantization(config: dict[str, Any]) -> dict[str, Any]:
    """The part of config.json that the record keeps."""
    return {key: value for key, value in config.items() if key != "quantization_config"}


def spec_bytes(spec: tuple[torch.dtype, tuple[int, ...]]) -> int:
    """Bytes of a tensor."""
    dtype, shape = spec
    return int(torch.Size(shape).numel()) * dtype.itemsize


def split_shards(specs: dict[str, tuple[torch.dtype, tuple[int, ...]]], limit: int) -> list[list[str]]:
    """Names of tensors, shard by shard."""
    shards: list[list[str]] = [[]]
    size = 0
    for name, spec in specs.items():
        if shards[-1] and size + spec_bytes(spec) > limit:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += spec_bytes(spec)
    return shards


def _config(plan: Plan, structure: ModelStructure, job: Job, source: ExportTensors) -> dict[str, Any]:
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
    layout = LAYOUTS.get(plan.export)
    return config if layout is None else config | layout.keys(config)


def quantization_config(plan: Plan, structure: ModelStructure) -> dict[str, Any]:
    """The ``quantization_config`` of a plan."""
    renamed = {stored: module for stored, module in module_names(structure).items() if stored != module}
    formats_by_linear = {name: (p.weights, p.activations) for name, p in plan.packed.items()}
    layers = [name for name in plan.skipped if name not in structure.checkpoint.tensors]  # others are bare parameters
    for sources, views in structure.checkpoint.view_groups.items():  # a loader knows the model's layers
        if any(source.removesuffix(".weight") in plan.skipped for source in sources):
            layers += [name.removesuffix(".weight") for name in views]
    if plan.export in LAYOUTS:
        everything = list(dict.fromkeys([*plan.skipped, *layers]))
        return layout_config(plan.export, plan.packed, everything, structure.head, plan.static_cache)
    ends = tuple(n for n, p in plan.ends.items() if p.uses)  # the others are linears
    cache = CACHE_FORMATS[plan.kv["kind"]] if plan.kv is not None and plan.static_cache else None
    built = ct.config(formats_by_linear, layers, renamed, cache, ends)
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
    plan: Plan, structure: ModelStructure, source: ExportTensors, hashes: dict[str, str], hashed: Mapping[str, str]
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


def _read_as(structure: ModelStructure, source: ExportTensors) -> dict[str, list[str]]:
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
