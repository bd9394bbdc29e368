"""The structure of a checkpoint: its blocks, their linears, and the parameter of each stored tensor.

It is built from the config and the tensor headers alone, in seconds and without reading a weight. ``qkit plan`` needs nothing
else. A file that does not match its config is refused here.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from fnmatch import fnmatchcase
from functools import cached_property
from typing import Any

import torch
from torch import nn

from qkit.errors import BadCheckpoint
from qkit.families import Family
from qkit.families.block_builder import BlockBuilder, persistent_buffers
from qkit.families.blocks import LANGUAGE, BlockSequence, BlockStructure
from qkit.families.conversion import conversion_of
from qkit.families.discover import DISCOVERED, build_skeleton, family_of, kind_of
from qkit.families.dit_discover import unquantized
from qkit.families.matrices import SHARED_REASON, TABLE_REASON, matrix_of, reason_of
from qkit.families.prefixes import under_model_names
from qkit.families.sharing import run_without_values
from qkit.families.stored_parameters import StoredParameters, parameter
from qkit.families.stream import Stream
from qkit.families.twins import twins_of
from qkit.families.unloaded_experts import add_unloaded_experts
from qkit.families.unsaved import computed_buffers, unsaved_parameters
from qkit.files.checkpoint import Checkpoint
from qkit.files.folder import DENOISER
from qkit.files.gguf_container import Container, container
from qkit.system.machine import run_dtype

DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
# Leftovers of older savers that hold no weights.
_HARMLESS = ("rotary_emb.inv_freq", "attention.bias", "attention.masked_bias", "attn.bias", "attn.masked_bias")


class ModelStructure:
    """The structure of a checkpoint, known before any weight is read.

    checkpoint: as the model has it: what is stored as one tensor and is several matrices, or lies transposed, is in views
    twins:      {path: block} of blocks that share the matrices of a block of the language model and are no tower (``twins_of``)
    unloaded:   names of tensors that the model's class does not load; they are copied
    tower_parts: {checkpoint tensor: (path of a block of a tower, matrix)} of what is a part of a parameter, or transposed
    """

    def __init__(self, checkpoint: Checkpoint, model: nn.Module | None = None, buffers: bool = True) -> None:
        """Raises Unsupported or BadCheckpoint.

        checkpoint: with or without the views of another structure; model: the skeleton, where there is one already;
        buffers: compute those that no checkpoint stores, in the model
        """
        checkpoint = checkpoint.without_views()  # a view of a transposed weight has the name of the weight
        self.dtype = dtype_of(checkpoint)
        self.model = model or build_skeleton(checkpoint.config, str(checkpoint.path), self.dtype)
        packed = "quantization_config" in checkpoint.config
        self.checkpoint = checkpoint if packed else under_model_names(checkpoint, self.model)
        self.family: Family = family_of(self.model, kind_of(checkpoint.config))
        config: Any = self.model.config
        self.text_config: Any = config if self.family.streams else config.get_text_config(decoder=True)
        if not self.family.streams and isinstance(self.text_config, dict):
            raise BadCheckpoint(
                f"{checkpoint.path}: config.json: text_config is there, and a model of type {kind_of(checkpoint.config)!r} has "
                "none: get the config of this model"
            )
        # Buffers that no checkpoint stores (rotary frequencies, positions); they are restored when modules get memory.
        self.computed = computed_buffers(self.model) if buffers else {}
        tensors = self.checkpoint.tensors
        shapes = {n: tensors[n].shape if n in tensors else () for n in _unpacked(self.checkpoint)}
        unsaved = unsaved_parameters(self.model, shapes)
        self.unsaved = frozenset(unsaved)
        self.computed |= unsaved if buffers else {}
        conversion = conversion_of(self.model, shapes, str(checkpoint.path))
        # Parameters that the model's class keeps in float32, whatever its dtype is.
        self.float32 = frozenset(
            n
            for n, p in self.model.named_parameters()
            if p.dtype == torch.float32 != self.dtype and not self.family.streams
        )
        paths = list(_block_paths(self.model, self.family.blocks))
        self.twins = twins_of(self.model, paths)
        self.names = StoredParameters(self.model, self.checkpoint, conversion, self.twins)
        self.tied = self.names.tied
        self._builder = BlockBuilder(self.model, self.names, self.family.reads, self.text_config)
        self.blocks = tuple(self._builder.build(i, p, self.family.groups) for i, p in enumerate(paths))
        self.towers = tuple(self._towers())
        in_towers = [(b.path, x) for t in self.towers for b in t.blocks for x in b.linears]
        self.tower_parts = {f"{x.name}.weight": (p, x) for p, x in in_towers if x.expert is not None or x.transposed}
        self.outer = self._outer()
        add_unloaded_experts(self.model, self.names, self.blocks)
        self.checkpoint = self.checkpoint.with_views(self.names.views)
        self.unloaded: tuple[str, ...] = ()
        self._check_coverage()

    @property
    def is_causal(self) -> bool:
        """Whether a token reads only those before it: what generates text does."""
        return not self.is_discovered or predicts_next(self.model)

    @property
    def is_language_model(self) -> bool:
        """Whether the model gives, for each token of a text, the chances of the next one: what a loss is of."""
        return self.family.streams is None and not self.family.encodes and self.is_causal

    @property
    def is_discovered(self) -> bool:
        """Whether no family declares the model."""
        return self.family.name.startswith(DISCOVERED)

    @property
    def kind_name(self) -> str:
        """The family, or of a model that nobody declared its model type, for messages."""
        return self.family.name.removeprefix(DISCOVERED)

    @cached_property
    def paths(self) -> tuple[str, ...]:
        """Module paths of the blocks of the language model."""
        return tuple(b.path for b in self.blocks)

    @cached_property
    def stream(self) -> Stream:
        """What a run of the skeleton shows of the residual stream."""
        reads = self.family.reads or run_without_values(self.model, self.paths, self.family.embeddings)
        return reads.stream

    @cached_property
    def gguf(self) -> Container:
        """What llama.cpp has to know of the model. Raises Unsupported."""
        return container(self.checkpoint, self.tied)

    def stored_name(self, name: str) -> str:
        """The checkpoint's name of a module or parameter."""
        return self.names.conversion.stored_name(name)

    def loaded_dtype(self, name: str) -> torch.dtype:
        """The dtype in which a parameter outside the blocks is loaded: that of the checkpoint, or float32 where the
        model's class keeps it in that.

        In a diffusion transformer it is the dtype of sampling, or float32 for modules that diffusers keeps in it.
        """
        if self.family.streams is None:
            return torch.float32 if name in self.float32 else self.dtype
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
            blocks = tuple(self._builder.build(i, p, tower.groups) for i, p in enumerate(paths))
            if all(b.groups for b in blocks) and not self.twins.keys() & set(paths):
                yield BlockSequence(tower.name, blocks, tower.on_text)

    @property
    def sequences(self) -> tuple[BlockSequence, ...]:
        """All block sequences, in the order in which they run."""
        return (*self.towers, BlockSequence(DENOISER if self.family.streams else LANGUAGE, self.blocks))

    @property
    def every_block(self) -> tuple[BlockStructure, ...]:
        """Blocks of the towers and of the language model."""
        return tuple(b for s in self.sequences for b in s.blocks)

    @cached_property
    def parts_of_tensors(self) -> frozenset[str]:
        """Linears that the class stores in one tensor with others, or transposed; a result stores them one by one, and so does
        a source that is a result."""
        single = {p.stored.removesuffix(".weight") for pieces in self.names.conversion.pieces.values() for p in pieces}
        linears = (x for b in self.every_block for x in b.linears)
        return frozenset(x.name for x in linears if x.transposed or (x.expert is not None and x.name not in single))

    def is_recorded(self, sequence: BlockSequence) -> bool:
        """Whether the inputs of these blocks are recorded in runs of the whole model, since it is known that they cannot be run
        one after another: how they hand results on is not known, one runs more than once in a pass, or it is a tower that a
        text reaches, and blocks of the language model run before it, or may do so. A run of the skeleton shows it.
        """
        reads, streams = self.family.reads, self.family.streams
        if reads is None:
            return streams is not None and streams.recorded
        main = {b.path for b in self.blocks}
        order = [path for path in reads.calls if path in {*sequence.paths, *main}]
        last = max((i for i, path in enumerate(order) if path in sequence.paths), default=-1)
        after = not main.intersection(sequence.paths) and bool(main.intersection(order[:last]))
        unseen = not main.intersection(sequence.paths) and sequence.on_text and last < 0
        return after or unseen or any(reads.calls[path] > 1 for path in sequence.paths)

    @cached_property
    def unread(self) -> frozenset[str]:
        """Linears that do not run by themselves when their block runs on a text, as far as a run of the skeleton shows."""
        reads = self.family.reads
        if reads is None or not reads.whole:
            return frozenset()
        return frozenset(
            x.name for b in self.blocks for x in b.linears if x.expert is None and reads.unread(b.path, [x.owner])
        )

    def default_skip(self, name: str) -> str | None:
        """The reason why the family skips a layer (by checkpoint name) unless a rule names it; None: it is not skipped."""
        return next((why for glob, why in self.family.skips if fnmatchcase(name, glob)), None)

    @cached_property
    def tables(self) -> dict[str, str]:
        """{checkpoint name: reason} of what blocks hold with two or more dimensions and is no matrix product: routers,
        convolutions, embeddings, parameters of state-space layers. A name is without '.weight'.
        """
        if self.family.streams is not None and self.family.streams.recorded:
            return unquantized(self.model, self.checkpoint.tensors)
        result: dict[str, str] = {}
        for block in self.every_block:
            module, linears = self.model.get_submodule(block.path), {x.param for x in block.linears}
            for name, stored in block.stored:
                if name not in linears and parameter(module, name).dim() >= 2:
                    reason = reason_of(name, module)
                    reason = SHARED_REASON if self.names.is_shared(f"{block.path}.{name}") else reason
                    view = self.checkpoint.views.get(stored)
                    for source in (stored,) if view is None else view.sources:
                        result[source.removesuffix(".weight")] = reason
        return result | self._tables_in_lists

    @property
    def _tables_in_lists(self) -> dict[str, str]:
        """Tables outside the blocks that are in a list of modules (embeddings of several kinds), as blocks are."""
        owners = {n: m for n, m in self.model.named_modules() if isinstance(m, nn.Embedding)}
        inside = tuple(f"{b.path}." for b in self.every_block)
        names = [(n.removesuffix(".weight"), s) for n, s in self.outer if not n.startswith(inside)]
        return {
            stored.removesuffix(".weight"): TABLE_REASON
            for name, stored in names
            if name in owners and any(part.isdigit() for part in name.split("."))
        }

    @cached_property
    def head(self) -> str | None:
        """The checkpoint's name of the output head, where the model has one."""
        if not self.family.head:
            return None
        name = self._copied_name(self.family.head)
        return name if f"{name}.weight" in {*self.checkpoint.tensors, *self.checkpoint.sources, *self.tied} else None

    def as_copied(self, skipped: dict[str, str]) -> dict[str, str]:
        """{name in a result: reason} of what is skipped: views of a tensor that is copied as a whole have the tensor's name."""
        result = dict(skipped)
        for sources, views in self.checkpoint.view_groups.items():
            names = [name.removesuffix(".weight") for name in views]
            if all(name in result for name in names):
                reason = result[names[0]]
                for name in names:
                    result.pop(name)
                result.update({source.removesuffix(".weight"): reason for source in sources})
        return result

    def _copied_name(self, module: str) -> str:
        """The name, in the file and in a result, of a module whose weight is copied."""
        name = self.names.name_of(f"{module}.weight")
        view = self.checkpoint.views.get(name)
        stored = self.stored_name(f"{module}.weight") if view is None else view.sources[0]
        return stored.removesuffix(".weight")

    @cached_property
    def outside(self) -> dict[str, str]:
        """{checkpoint name: module} of linears outside all blocks, such as the output head."""
        within = tuple(f"{p}." for p in (*(b.path for b in self.every_block), *self.twins))
        names = [n for n, m in self.model.named_modules() if matrix_of(m) and not n.startswith(within)]
        return {self._copied_name(n): n for n in names}

    # ---- the file against the config -------------------------------------------------------------------------

    def _outer(self) -> tuple[tuple[str, str], ...]:
        """(parameter, checkpoint tensor) of all stored tensors outside the blocks."""
        prefix = tuple(f"{name}." for name in self.family.blocks)
        names = [n for n, _ in (*self.model.named_parameters(remove_duplicate=False), *persistent_buffers(self.model))]
        in_parts = [(f"{path}.{x.param}", stored) for stored, (path, x) in self.tower_parts.items()]
        whole = {n for n in names if not n.startswith(prefix)}.difference(self.unsaved, (n for n, _ in in_parts))
        # A twin gets what it shares from its block when the model is tied.
        twins = tuple(f"{t}." for t in self.twins)
        whole -= {n for n in whole if n.startswith(twins) and self.stored_name(n) in self.tied}
        stored_names = [*((n, self.names.name_of(n)) for n in names if n in whole), *in_parts]
        return tuple((n, s) for n, s in stored_names if s not in self.tied)

    @property
    def parameters(self) -> int:
        """Number of stored parameters; tied ones count once."""
        names = {s for _, s in self.outer} | {s for b in self.blocks for _, s in b.stored}
        return sum(math.prod(self.checkpoint.tensors[n].shape) for n in names)

    def _check_unloaded(self) -> None:
        """Raises BadCheckpoint where the file has more blocks than config.json counts: they would be lost for the model.

        Layers for multi-token prediction follow the counted ones in some checkpoints.
        """
        extra = getattr(self.text_config, "num_nextn_predict_layers", None) or 0
        lists = {self.stored_name(n): len(list(self.model.get_submodule(n).children())) for n in self.family.blocks}
        for name in self.unloaded:
            layer = _layer_of(name, lists)
            if layer is not None and layer[1] >= lists[layer[0]] + extra:
                raise BadCheckpoint(
                    f"{self.checkpoint.path}: config.json counts {lists[layer[0]]} blocks in {layer[0]}, and the file has "
                    f"{name!r}: get the config of this model"
                )

    def _check_coverage(self) -> None:
        tensors, where = self.checkpoint.tensors, self.checkpoint.path
        shapes: dict[str, tuple[int, ...]] = {}
        for block in self.blocks:
            module = self.model.get_submodule(block.path)
            by_weight = {f"{linear.name}.weight": linear.shape for linear in block.linears}
            for name, stored in block.stored:
                shapes[stored] = by_weight.get(stored) or tuple(parameter(module, name).shape)
        for name, stored in self.outer:
            part = self.tower_parts.get(stored)
            shapes[stored] = tuple(parameter(self.model, name).shape) if part is None else part[1].shape
        missing = [n for n in shapes if n not in tensors and n not in self.tied]
        if missing:
            raise BadCheckpoint(
                f"{where}: {len(missing)} tensors that config.json asks for are not in the file, the first is "
                f"{missing[0]!r}: the checkpoint is incomplete or its config belongs to another model"
            )
        self.unloaded = tuple(
            n for n in tensors if n not in shapes and n not in self.tied and not n.endswith(_HARMLESS)
        )
        self._check_unloaded()
        for name, shape in shapes.items():
            if name in tensors and tensors[name].shape != shape:
                raise BadCheckpoint(
                    f"{where}: tensor {name!r} has shape {list(tensors[name].shape)}, config.json implies {list(shape)}"
                )


def predicts_next(model: Any) -> bool:
    """Whether a model of transformers predicts the next token of a text from those before it."""
    config = model.config
    both_ways = getattr(config, "is_encoder_decoder", False) or not getattr(config, "is_decoder", True)
    if both_ways and not getattr(config, "is_encoder_decoder", False):  # GPT-NeoX says so, and its attention is causal
        both_ways = not any(getattr(m, "is_causal", False) is True for m in model.modules())
    return bool(model.can_generate()) and not both_ways


def _layer_of(name: str, lists: dict[str, int]) -> tuple[str, int] | None:
    """(list of blocks, index) of a tensor that is inside a list, by its name in the file."""
    for path in lists:
        head, _, rest = name.partition(f"{path}.")
        index = rest.partition(".")[0]
        if not head and index.isdigit():
            return path, int(index)
    return None


def _block_paths(model: nn.Module, listed: tuple[str, ...]) -> Iterator[str]:
    """The module path of every block. listed: lists of blocks, or single blocks."""
    for name in listed:
        module = model.get_submodule(name)
        if isinstance(module, nn.ModuleList):
            yield from (f"{name}.{i}" for i, _ in enumerate(module.children()))
        else:
            yield name


def _unpacked(checkpoint: Checkpoint) -> list[str]:
    """Names of the tensors, and of the weights that are packed."""
    names = dict.fromkeys(checkpoint.tensors)
    for name in checkpoint.tensors:
        owner, _, leaf = name.rpartition(".")
        if leaf == "weight_packed":
            names[f"{owner}.weight"] = None
    return list(names)


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
