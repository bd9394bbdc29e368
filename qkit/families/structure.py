"""The structure of a checkpoint: its blocks, their linears, and the parameter of each stored tensor.

It is built from the config and the tensor headers alone, in seconds and without reading a weight. ``qkit plan`` needs nothing
else. A file that does not match its config is refused here.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from fnmatch import fnmatchcase
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from qkit.errors import BadCheckpoint, Unsupported
from qkit.families import Family
from qkit.families.blocks import LANGUAGE, BlockSequence, BlockStructure, Group, Linear, LinearGroup
from qkit.families.declared import DECLARED
from qkit.families.discover import build_skeleton, family_of, kind_of
from qkit.families.dit_discover import unquantized
from qkit.families.mismatch import another_class, other_storage
from qkit.files.checkpoint import Checkpoint
from qkit.files.folder import DENOISER
from qkit.system.machine import run_dtype

DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
ROUTER_REASON = "it routes tokens to experts: small, and an error changes the route"
TABLE_REASON = "it is a table, or a layer that is not linear"
# Leftovers of older savers that hold no weights.
_HARMLESS = ("rotary_emb.inv_freq", "attention.bias", "attention.masked_bias", "attn.bias", "attn.masked_bias")


class ModelStructure:
    """The structure of a checkpoint, known before any weight is read."""

    def __init__(self, checkpoint: Checkpoint, model: nn.Module | None = None) -> None:
        """Raises Unsupported or BadCheckpoint. model: the skeleton, where there is one already."""
        self.checkpoint = checkpoint
        self.dtype = dtype_of(checkpoint)
        self.model = model or build_skeleton(checkpoint.config, str(checkpoint.path), self.dtype)
        self.family: Family = family_of(self.model, kind_of(checkpoint.config))
        config: Any = self.model.config
        self.text_config: Any = config if self.family.streams else config.get_text_config(decoder=True)
        if not self.family.streams and isinstance(self.text_config, dict):
            raise BadCheckpoint(
                f"{checkpoint.path}: config.json: text_config is there, and a model of type {kind_of(checkpoint.config)!r} has "
                "none: get the config of this model"
            )
        # Buffers of a diffusion transformer that no checkpoint stores; they are restored when its modules get memory.
        self.computed = _computed(self.model) if self.family.streams else None
        self._named = _names_of(self.model, checkpoint) if self.family.text_types else {}
        self.tied = self._tied()
        paths = list(_block_paths(self.model, self.family.blocks))
        self.blocks = tuple(self._block(i, p, self.family.groups) for i, p in enumerate(paths))
        self.towers = tuple(self._towers())
        self._check_coverage()

    def _tied(self) -> dict[str, str]:
        """{tensor that is not stored: tensor that it shares}, in checkpoint names."""
        if not getattr(self.model.config, "tie_word_embeddings", False):
            return {}
        keys = getattr(self.model, "_tied_weights_keys", None) or {}
        return {self.stored_name(a): self.stored_name(b) for a, b in dict(keys).items()}

    def stored_name(self, name: str) -> str:
        """The checkpoint's name of a module or parameter."""
        if name in self._named:
            return self._named[name]
        owner, _, leaf = name.rpartition(".")
        return f"{self._named[owner]}.{leaf}" if owner in self._named else self.family.stored_name(name)

    def loaded_dtype(self, name: str) -> torch.dtype:
        """The dtype in which a parameter outside the blocks is loaded: that of the checkpoint.

        In a diffusion transformer it is the dtype of sampling, or float32 for modules that diffusers keeps in it.
        """
        if self.family.streams is None:
            return self.dtype
        float32_modules = getattr(self.model, "_keep_in_fp32_modules", None) or ()
        return torch.float32 if any(part in float32_modules for part in name.split(".")) else run_dtype(self.dtype)

    def _towers(self) -> Iterator[BlockSequence]:
        """Yield the towers of the family that this model has, if they have linears."""
        modules = dict(self.model.named_modules())
        for tower in self.family.towers:
            path = next((p for p in tower.blocks if p in modules), None)
            if path is None:
                continue
            listed = isinstance(modules[path], nn.ModuleList)
            paths = [f"{path}.{i}" for i, _ in enumerate(modules[path].children())] if listed else [path]
            blocks = tuple(self._block(i, p, tower.groups) for i, p in enumerate(paths))
            if all(b.groups for b in blocks):
                yield BlockSequence(tower.name, blocks)

    @property
    def sequences(self) -> tuple[BlockSequence, ...]:
        """All block sequences, in the order in which they run."""
        return (*self.towers, BlockSequence(DENOISER if self.family.streams else LANGUAGE, self.blocks))

    @property
    def every_block(self) -> tuple[BlockStructure, ...]:
        """Blocks of the towers and of the language model."""
        return tuple(b for s in self.sequences for b in s.blocks)

    def _block(self, index: int, path: str, declared: tuple[Group, ...]) -> BlockStructure:
        module = self.model.get_submodule(path)
        stored_prefix = self.stored_name(path)
        stored: list[tuple[str, str]] = []
        fused = self.family.experts
        for name, _ in (*module.named_parameters(), *_persistent_buffers(module)):
            if fused and name in (f"{fused.module}.gate_up_proj", f"{fused.module}.down_proj"):
                continue
            stored.append((name, self.stored_name(f"{path}.{name}")))
        groups = [*self._plain_groups(module, path, declared), *self._expert_groups(module, stored_prefix)]
        for group in groups:
            for linear in group.linears:
                if linear.expert is not None:
                    stored.append((linear.param, f"{linear.name}.weight"))
        return BlockStructure(index, path, tuple(groups), tuple(stored))

    def _plain_groups(self, module: nn.Module, path: str, groups: tuple[Group, ...]) -> Iterator[LinearGroup]:
        all_modules = dict(module.named_modules())
        modules = {n: m for n, m in all_modules.items() if isinstance(m, nn.Linear)}
        declared: list[Group] = []
        covered: set[str] = set()
        for group in groups:
            is_present = all(n in modules for n in group.linears) and (
                group.source is None or group.source in all_modules
            )
            if is_present and not covered & set(group.linears):
                declared.append(group)
                covered |= set(group.linears)
        # A linear that the declaration does not mention is still quantized, on its own.
        for group in (*declared, *(Group((n,)) for n in modules if n not in covered)):
            linears = tuple(
                Linear(
                    name=self.stored_name(f"{path}.{n}"),
                    param=f"{n}.weight",
                    shape=(modules[n].out_features, modules[n].in_features),
                    bias=modules[n].bias is not None,
                )
                for n in group.linears
            )
            yield LinearGroup(linears, self._as_configured(group), group.linears[0])

    def _as_configured(self, group: Group) -> Group:
        """The declared group, without its source where this model's config excludes it."""
        if group.source_if is None:
            return group
        field, value = group.source_if
        return group if getattr(self.text_config, field, None) == value else replace(group, source=None)

    def _expert_groups(self, module: nn.Module, prefix: str) -> Iterator[LinearGroup]:
        experts = self.family.experts
        if experts is None or experts.module not in {n for n, _ in module.named_modules()}:
            return
        gate_up = module.get_parameter(f"{experts.module}.gate_up_proj")
        down = module.get_parameter(f"{experts.module}.down_proj")
        inner = gate_up.shape[1] // 2
        if gate_up.shape[0] > len(self.checkpoint.tensors):  # before there is a name for each
            raise BadCheckpoint(
                f"{self.checkpoint.path}: config.json implies {gate_up.shape[0]} experts a block, and the file has "
                f"{len(self.checkpoint.tensors)} tensors in all: get the config of this model"
            )
        for e in range(gate_up.shape[0]):

            def name(linear: str, e: int = e) -> str:
                return f"{prefix}.{experts.stored.format(e=e, linear=linear)}"

            hidden = gate_up.shape[2]
            param = f"{experts.module}.gate_up_proj"
            gate_and_up = (
                Linear(name=name(experts.gate), param=param, shape=(inner, hidden), expert=e, rows=(0, inner)),
                Linear(name=name(experts.up), param=param, shape=(inner, hidden), expert=e, rows=(inner, 2 * inner)),
            )
            yield LinearGroup(gate_and_up, Group(()), experts.module, e)
            down_linear = Linear(
                name=name(experts.down),
                param=f"{experts.module}.down_proj",
                shape=(down.shape[1], down.shape[2]),
                expert=e,
            )
            yield LinearGroup((down_linear,), Group(()), "", e)

    def default_skip(self, name: str) -> str | None:
        """The reason why the family skips a layer (by checkpoint name) unless a rule names it; None: it is not skipped."""
        return next((why for glob, why in self.family.skips if fnmatchcase(name, glob)), None)

    @property
    def tables(self) -> dict[str, str]:
        """{checkpoint name: reason} of block matrices that are not quantized, since they are no linears: routers,
        embeddings.
        """
        if self.family.streams is not None and self.family.streams.recorded:
            return unquantized(self.model, self.checkpoint.tensors)
        why = ROUTER_REASON if self.family.experts else TABLE_REASON
        linears = {f"{x.name}.weight" for b in self.blocks for x in b.linears}
        stored = [s for b in self.blocks for _, s in b.stored if s.endswith(".weight") and s not in linears]
        return {s.removesuffix(".weight"): why for s in stored if len(self.checkpoint.tensors[s].shape) == 2}

    @cached_property
    def outside(self) -> dict[str, str]:
        """{checkpoint name: module} of linears outside all blocks, such as the output head."""
        within = tuple(f"{b.path}." for b in self.every_block)
        names = [n for n, m in self.model.named_modules() if isinstance(m, nn.Linear) and not n.startswith(within)]
        return {self.stored_name(n): n for n in names}

    # ---- the file against the config -------------------------------------------------------------------------

    @cached_property
    def outer(self) -> tuple[tuple[str, str], ...]:
        """(parameter, checkpoint tensor) of all stored tensors outside the blocks."""
        prefix = tuple(f"{name}." for name in self.family.blocks)
        names = [n for n, _ in (*self.model.named_parameters(), *_persistent_buffers(self.model))]
        stored_names = [(n, self.stored_name(n)) for n in names if not n.startswith(prefix)]
        return tuple((n, s) for n, s in stored_names if s not in self.tied)

    @property
    def parameters(self) -> int:
        """Number of stored parameters; tied ones count once."""
        names = {s for _, s in self.outer} | {s for b in self.blocks for _, s in b.stored}
        return sum(math.prod(self.checkpoint.tensors[n].shape) for n in names)

    def _check_coverage(self) -> None:
        tensors, where = self.checkpoint.tensors, self.checkpoint.path
        shapes: dict[str, tuple[int, ...]] = {}
        for block in self.blocks:
            module = self.model.get_submodule(block.path)
            by_weight = {f"{linear.name}.weight": linear.shape for linear in block.linears}
            for name, stored in block.stored:
                shapes[stored] = by_weight.get(stored) or tuple(_get(module, name).shape)
        shapes.update({stored: tuple(_get(self.model, name).shape) for name, stored in self.outer})
        missing = [n for n in shapes if n not in tensors]
        if missing:
            reason = another_class(self.model, self.checkpoint)
            if reason is None and self.family not in DECLARED:
                reason = other_storage(self.model, self.checkpoint, self.tied)
            if reason is not None:
                raise Unsupported(f"{where}: {reason}")
            raise BadCheckpoint(
                f"{where}: {len(missing)} tensors that config.json asks for are not in the file, the first is "
                f"{missing[0]!r}: the checkpoint is incomplete or its config belongs to another model"
            )
        extra = [n for n in tensors if n not in shapes and n not in self.tied and not n.endswith(_HARMLESS)]
        if extra:
            raise BadCheckpoint(
                f"{where}: {len(extra)} tensors in the file are not part of a {self.family.name} model with this "
                f"config, the first is {extra[0]!r}: they would be lost without a word"
            )
        for name, shape in shapes.items():
            if tensors[name].shape != shape:
                raise BadCheckpoint(
                    f"{where}: tensor {name!r} has shape {list(tensors[name].shape)}, config.json implies {list(shape)}"
                )


def _block_paths(model: nn.Module, listed: tuple[str, ...]) -> Iterator[str]:
    """The module path of every block. listed: lists of blocks, or single blocks."""
    for name in listed:
        module = model.get_submodule(name)
        if isinstance(module, nn.ModuleList) and not name.rpartition(".")[2].isdigit():
            yield from (f"{name}.{i}" for i, _ in enumerate(module.children()))
        else:
            yield name


def _names_of(model: nn.Module, checkpoint: Checkpoint) -> dict[str, str]:
    """{module or parameter: its name in the checkpoint}, by the renaming of transformers on loading."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming, rename_source_key

    names: dict[str, str] = {}
    renamings = [x for x in get_model_conversion_mapping(model) if isinstance(x, WeightRenaming)]
    shapes = dict(model.state_dict())
    for stored in checkpoint.tensors:
        name = rename_source_key(stored, renamings, [], model.base_model_prefix, shapes)[0]
        names[name] = stored
        owner, stored_owner = name.rpartition(".")[0], stored.rpartition(".")[0]
        if name.rpartition(".")[2] == stored.rpartition(".")[2] and stored_owner:
            names[owner] = stored_owner
    return names


def _computed(model: nn.Module) -> dict[str, Tensor]:
    """{name: value} of buffers that are not stored."""
    stored = {n for n, _ in _persistent_buffers(model)}
    return {n: b.clone() for n, b in model.named_buffers() if n not in stored and not b.is_meta}


def _persistent_buffers(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for prefix, m in module.named_modules():
        for name, buffer in m.named_buffers(recurse=False):
            if name not in m._non_persistent_buffers_set:
                yield (f"{prefix}.{name}" if prefix else name), buffer


def _get(module: nn.Module, name: str) -> Tensor:
    owner, _, leaf = name.rpartition(".")
    value = getattr(module.get_submodule(owner), leaf)
    assert isinstance(value, Tensor)
    return value


def dtype_of(checkpoint: Checkpoint) -> torch.dtype:
    """The dtype with the most bytes in a checkpoint; in a packed one, with the most bytes of unpacked tensors."""
    size: dict[str, int] = {}
    packed = "quantization_config" in checkpoint.config
    for info in checkpoint.tensors.values():
        if not packed or (info.dtype in DTYPES and not info.name.endswith("global_scale")):
            size[info.dtype] = size.get(info.dtype, 0) + info.nbytes
    name = max(size, key=lambda k: size[k]) if size else "none"
    if name not in DTYPES:
        raise BadCheckpoint(
            f"{checkpoint.path}: weights are {name}; expected BF16, F16 or F32: convert the model first"
        )
    return DTYPES[name]
