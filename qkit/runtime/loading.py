"""Loads a packed folder as a model whose weights stay packed.

``load(path)`` builds the architecture without memory, replaces quantized linears by packed modules, and reads the shards
tensor by tensor. The result is a transformers model: generate, forward and everything else work as usual.
"""

from __future__ import annotations

import math
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qkit.errors import BadCheckpoint, IOFailure, Unsupported, UsageError
from qkit.families.blocks import BlockStructure, FusedExperts, Linear, Stack
from qkit.families.discover import build_skeleton
from qkit.families.materialize import fill_computed_buffers
from qkit.families.structure import DTYPES, ModelStructure, dtype_of
from qkit.files import schema
from qkit.files.checkpoint import Checkpoint, check_config
from qkit.files.folder import check_side_files, is_pipeline, load_json, weights_folder
from qkit.files.foreign import foreign_errors
from qkit.files.locate import find_model
from qkit.files.rejected import RejectedWarning, describe_mark, read_mark
from qkit.files.safefile import shown
from qkit.files.schema import validate
from qkit.files.sources.as_compressed import METHODS as LAYOUTS
from qkit.files.sources.as_compressed import as_compressed
from qkit.files.sources.opening import mlx_quantization
from qkit.kvcache.scales import register_scales
from qkit.nn.layers import QuantExperts, QuantLinear, place_stack
from qkit.runtime.packed_ends import packed_ends, place_ends
from qkit.tensor import lowrank, sparse
from qkit.tensor.compressed_tensors import cache_kind, formats_of, specs
from qkit.tensor.formats import Format
from qkit.tensor.input_transform import RESIDUAL, SCALE, InputTransform


def load(path: str | Path, dtype: torch.dtype | None = None, device: str = "cpu", kv: str | None = None) -> Any:
    """A transformers language model in eval mode, or a diffusers pipeline (or its transformer alone).

    path:  a folder that ``qkit quantize`` wrote (or any compressed-tensors checkpoint in a format qkit knows), or a
           full-precision one, or one that is quantized in another way (``files.sources``; its weights are decoded), or the
           name of a reference model
    dtype: of activations and unquantized weights; default: the checkpoint's. float32 computes on exactly the decompressed
           weights.
    kv:    the KV cache that ``generate`` uses, a policy such as 'kivi2' ('none': a plain one); default: that of the
           folder's record, if it has one
    Raises BadCheckpoint for a damaged folder, Unsupported for formats that qkit cannot run, UsageError for a policy that
    does not suit the model.
    """
    folder = find_model(str(path))
    mark = read_mark(folder)
    if mark is not None:
        warnings.warn(f"{folder}: {describe_mark(mark)}", RejectedWarning, stacklevel=3)
    checkpoint = _opened(weights_folder(folder))
    if "_class_name" in checkpoint.config:
        return _diffusion(folder, checkpoint, dtype, device, kv)
    model = load_checkpoint(checkpoint, dtype, device)
    _cache_policy(model, folder, kv)
    return model


def load_checkpoint(checkpoint: Checkpoint, dtype: torch.dtype | None = None, device: str = "cpu") -> Any:
    """The model of an opened checkpoint, as ``load`` gives it, with the plain weights that the checkpoint stands for: decoded,
    and with an adapter merged."""
    folder = checkpoint.path
    if "_class_name" in checkpoint.config:
        return _diffusion(folder, checkpoint, dtype, device, None)
    check_config(checkpoint.config, checkpoint.tensors)
    # Built in the dtype that is asked for: some classes compute numbers in it, such as a scale of the embeddings.
    skeleton = None if dtype is None else build_skeleton(checkpoint.config, str(folder), dtype)
    structure = PackedStructure(checkpoint, skeleton)
    model: Any = structure.model
    dtype = dtype or structure.dtype
    computed = [m for m in model.modules() if m._non_persistent_buffers_set]
    with foreign_errors(
        f"{folder}: no memory for this model", "close other programs, or use a larger machine", IOFailure
    ):
        model.to_empty(device="cpu")
    fill_computed_buffers(structure)
    own = (m._buffers[name] for m in computed for name in m._non_persistent_buffers_set)
    rotary = {id(b): b for b in own if b is not None}
    with torch.inference_mode():
        place_packed(structure, dtype)
        _read_plain(structure)
    for name, p in model.named_parameters():
        value = p.data.to(torch.float32 if name in structure.float32 else dtype)
        p.data = value.clone() if value.is_inference() else value  # autograd refuses tensors of inference mode
        p.requires_grad_(False)
    for m in model.modules():
        for name, b in m._buffers.items():
            if b is not None and b.is_floating_point() and id(b) not in rotary and not isinstance(m, QuantLinear):
                m._buffers[name] = b.to(dtype)
    model.config.dtype = dtype
    if not structure.ends:  # packed ones are tied by sharing their codes
        model.tie_weights(recompute_mapping=False)
    _generation_config(model, folder)
    return model.eval().to(device)


def _diffusion(folder: Path, checkpoint: Checkpoint, dtype: torch.dtype | None, device: str, kv: str | None) -> Any:
    """A pipeline or a single transformer, loaded through diffusers (``diffusers_plugin``)."""
    from qkit.diffusion.pipeline import load_denoiser, load_pipeline

    if kv not in (None, "none"):
        raise UsageError(f"--kv {kv}: a diffusion transformer has no KV cache: leave the option out")
    structure = PackedStructure(checkpoint)  # refuses damaged files with a message
    dtype = dtype or structure.dtype
    if is_pipeline(folder):
        return load_pipeline(folder, dtype, device)
    return load_denoiser(folder, checkpoint.config["_class_name"], dtype, device)


METHODS = ("compressed-tensors", "qkit")


def _opened(folder: Path) -> Checkpoint:
    """The checkpoint with packed weights where qkit runs them, as they are or under other names, and else decoded ones."""
    packed = Checkpoint.open(folder, quantized=True)
    quantization = packed.config.get("quantization_config")
    method = quantization.get("quant_method") if isinstance(quantization, dict) else None
    if method in METHODS:
        return packed
    view = as_compressed(folder) if method in LAYOUTS or mlx_quantization(packed.config) else None
    return Checkpoint.open(folder) if view is None else view


PLAIN = tuple(DTYPES.values())  # dtypes of scales that readers treat as equivalent


class PackedStructure(ModelStructure):
    """The structure of a checkpoint that may be quantized already."""

    def __init__(self, checkpoint: Checkpoint, model: nn.Module | None = None, buffers: bool = True) -> None:
        self.quantization = checkpoint.config.get("quantization_config")
        if self.quantization is not None:
            where, method = (
                f"{checkpoint.path / 'config.json'}: quantization_config",
                self.quantization.get("quant_method"),
            )
            if isinstance(method, str) and method not in METHODS:
                raise Unsupported(
                    f"{where}: quantized by {shown(method)}, and qkit loads {' and '.join(METHODS)}: load it with transformers"
                )
            validate(schema.Quantization, self.quantization, where, "run 'qkit verify' on the folder", Unsupported)
        kind = cache_kind(self.quantization)
        if kind is not None:
            dtype = dtype_of(checkpoint)
            model = model or build_skeleton(checkpoint.config, str(checkpoint.path), dtype)
            register_scales(model, dtype, kind)
        super().__init__(checkpoint, model, buffers)

    def _check_coverage(self) -> None:
        """Raises BadCheckpoint where a tensor that the config requires, packed or plain, is missing."""
        names = [linear.name for block in self.every_block for linear in block.linears]
        where = str(self.checkpoint.path)
        self.formats: dict[str, tuple[Format, Format | None]] = (
            formats_of(self.quantization, names, where) if self.quantization else {}
        )
        self.sparse = frozenset((self.quantization or {}).get("sparse") or ())
        self.low_rank = frozenset((self.quantization or {}).get("low_rank") or ())
        self.scaled = frozenset((self.quantization or {}).get("scaled") or ())
        self.residual = frozenset((self.quantization or {}).get("residual") or ())
        self.ends = packed_ends(self, self.quantization, where)
        self.rotated: dict[str, int] = _rotations((self.quantization or {}).get("rotated") or {}, where)
        expected = {stored for block in self.blocks for _, stored in block.stored}
        expected |= {stored for _, stored in self.outer}
        for block in self.every_block:
            for linear in block.linears:
                if linear.name in self.formats:
                    expected.discard(f"{linear.name}.weight")
                    weights, activations = self.formats[linear.name]
                    self.check_packed(linear.name, specs(weights, activations, linear.shape, self.dtype))
                    expected |= {f"{linear.name}.{s}" for s in specs(weights, activations, linear.shape, self.dtype)}
                    if linear.name in self.scaled:
                        expected.add(f"{linear.name}.{SCALE}")
                    if linear.name in self.residual:
                        expected.add(f"{linear.name}.{RESIDUAL}")
                    expected |= {f"{linear.name}.{s}" for s in self.correction_suffixes(linear.name)}
        for end in self.ends.values():
            expected.discard(f"{end.name}.weight")
            tensors = specs(end.format, None, end.shape, self.dtype)
            self.check_packed(end.name, tensors)
            expected |= {f"{end.name}.{s}" for s in tensors}
        missing = sorted(expected - self.checkpoint.tensors.keys())
        if missing:
            raise BadCheckpoint(
                f"{where}: {len(missing)} tensors are missing, the first is {missing[0]!r}: run 'qkit verify {where}'"
            )

    def check_packed(self, name: str, expected: dict[str, tuple[torch.dtype, tuple[int, ...]]]) -> None:
        """Raises BadCheckpoint for a tensor whose shape or dtype does not match the format."""
        for suffix, (dtype, shape) in expected.items():
            info = self.checkpoint.tensors.get(f"{name}.{suffix}")
            if info is None:  # reported with all that are missing
                continue
            plain = dtype in PLAIN and info.torch_dtype in PLAIN
            if math.prod(info.shape) != math.prod(shape) or not (plain or info.torch_dtype == dtype):
                raise BadCheckpoint(
                    f"{info.file}: tensor {info.name} is {info.dtype} {list(info.shape)}, and config.json implies {dtype} "
                    f"{list(shape)}: run 'qkit verify {self.checkpoint.path}'"
                )

    def correction_suffixes(self, name: str) -> tuple[str, ...]:
        """Suffixes of the tensors of a linear's sparse and low-rank part."""
        return (sparse.PIECES if name in self.sparse else ()) + (lowrank.PIECES if name in self.low_rank else ())


def _rotations(data: Any, where: str) -> dict[str, int]:
    """{linear: block of its Hadamard transform}. Raises BadCheckpoint for invalid blocks."""
    sound = isinstance(data, dict) and all(isinstance(b, int) and b >= 2 and b & (b - 1) == 0 for b in data.values())
    if not sound:
        raise BadCheckpoint(f"{where}: quantization_config.rotated: expected layers and powers of two: export it again")
    return dict(data)


def _read_plain(structure: PackedStructure) -> None:
    """Load all tensors that are not packed."""
    read = structure.checkpoint.read
    inside = {stored for block in structure.every_block for _, stored in block.stored}
    packed_outside = {f"{end.name}.weight" for end in structure.ends.values()}
    for name, stored in structure.outer:
        if stored not in inside and stored not in packed_outside:
            _assign(structure.model, name, read(stored))
    for block in structure.every_block:
        module = structure.model.get_submodule(block.path)
        packed = {
            f"{x.name}.{leaf}" for x in block.linears if x.name in structure.formats for leaf in ("weight", "bias")
        }
        views = {f"{x.name}.weight": x for x in block.linears}
        for name, stored in block.stored:
            if stored in packed:
                continue
            if stored in views and (views[stored].expert is not None or views[stored].transposed):
                views[stored].view(module).copy_(read(stored))
            else:
                _assign(module, name, read(stored))


def _assign(owner: nn.Module, name: str, value: Tensor) -> None:
    """Set a parameter to a value in the dtype of the file, without rounding. Raises BadCheckpoint."""
    path, _, leaf = name.rpartition(".")
    target = getattr(owner.get_submodule(path), leaf)
    if tuple(target.shape) != tuple(value.shape):
        raise BadCheckpoint(f"{name}: the file has shape {list(value.shape)}, the config implies {list(target.shape)}")
    if value.is_floating_point() != target.is_floating_point():
        raise BadCheckpoint(f"{name}: the file has {value.dtype}, the config implies {target.dtype}: run 'qkit verify'")
    target.data = value


def place_packed(structure: PackedStructure, dtype: torch.dtype) -> None:
    """Replace every quantized linear by a packed module."""
    model: Any = structure.model
    for block in structure.every_block:
        modules = [
            model.get_submodule(p) for p in (block.path, *(t for t, b in structure.twins.items() if b == block.path))
        ]
        experts: dict[tuple[str, int, tuple[int, int] | None], nn.Module] = {}
        for linear in block.linears:
            if linear.name not in structure.formats:
                continue
            packed = _packed(structure, linear, dtype)
            if linear.expert is not None:
                experts[linear.param, linear.expert, linear.rows] = packed
                continue
            for module in modules:
                module.set_submodule(linear.owner, packed)
        for module in modules if experts else ():
            for layout in block.experts:
                _place_experts(module, layout, experts, block)
            for stack in block.stacks:
                _place_stack(module, stack, experts, block)
    if structure.twins:  # what is packed is shared now, and transformers ties what is plain
        there = {n for n, _ in model.named_parameters(remove_duplicate=False)}
        keys = model.all_tied_weights_keys.items()
        model.all_tied_weights_keys = {a: b for a, b in keys if a in there and b in there}
    place_ends(structure, structure.ends, dtype)


def _packed(structure: PackedStructure, linear: Linear, dtype: torch.dtype) -> QuantLinear:
    weights, activations = structure.formats[linear.name]
    result = QuantLinear(weights, activations, linear.shape, dtype)
    scale = structure.checkpoint.read(f"{linear.name}.{SCALE}") if linear.name in structure.scaled else None
    residual_channels = (
        structure.checkpoint.read(f"{linear.name}.{RESIDUAL}") if linear.name in structure.residual else None
    )
    result.inputs = InputTransform.of(scale, structure.rotated.get(linear.name, 0), residual_channels, linear.shape[1])
    suffixes = [*specs(weights, activations, linear.shape, structure.dtype), *(["bias"] if linear.bias else [])]
    suffixes += structure.correction_suffixes(linear.name)
    result.take({suffix: structure.checkpoint.read(f"{linear.name}.{suffix}") for suffix in suffixes})
    return result


def _place_experts(
    module: nn.Module,
    layout: FusedExperts,
    packed: dict[tuple[str, int, tuple[int, int] | None], nn.Module],
    block: BlockStructure,
) -> None:
    """Put packed linears in the place of fused experts. packed: by parameter, expert and rows"""
    expected = _expected(block, layout.params, packed)
    if not expected:
        return
    first, down = layout.params
    by_expert: list[tuple[list[nn.Module], nn.Module]] = []
    for e in range(layout.count):
        firsts = [packed[x.param, e, x.rows] for x in expected if x.expert == e and x.param == first]
        by_expert.append((firsts, packed[down, e, None]))
    module.set_submodule(layout.module, QuantExperts(by_expert, module.get_submodule(layout.module), layout))


def _place_stack(
    module: nn.Module,
    stack: Stack,
    packed: dict[tuple[str, int, tuple[int, int] | None], nn.Module],
    block: BlockStructure,
) -> None:
    """Compute a stacked parameter from packed matrices wherever it is used."""
    expected = _expected(block, (stack.param,), packed)
    if expected:
        owner, _, leaf = stack.param.rpartition(".")
        rows = [[packed[x.param, e, x.rows] for x in expected if x.expert == e] for e in range(stack.count)]
        place_stack(module.get_submodule(owner), leaf, rows, stack.transposed)


def _expected(
    block: BlockStructure, params: tuple[str, ...], packed: dict[tuple[str, int, tuple[int, int] | None], nn.Module]
) -> list[Linear]:
    """The linears in parameters of a block, where they are packed; none where none is. Raises BadCheckpoint for a part."""
    expected = [x for x in block.linears if x.expert is not None and x.param in params]
    found = [x for x in expected if x.expert is not None and (x.param, x.expert, x.rows) in packed]
    if found and len(found) != len(expected):
        raise BadCheckpoint(
            f"{block.path}: {len(found)} of {len(expected)} expert linears are quantized: all or none can be loaded"
        )
    return expected if found else []


def _generation_config(model: Any, folder: Path) -> None:
    from transformers import GenerationConfig

    file = folder / "generation_config.json"
    if file.is_file():
        validate(schema.GenerationConfig, load_json(file, "generation config"), str(file))
        with foreign_errors(f"{file}: transformers cannot read it"):
            model.generation_config = GenerationConfig.from_pretrained(folder, local_files_only=True)


def _cache_policy(model: Any, folder: Path, kv: str | None) -> None:
    from qkit.kvcache.cache import attach
    from qkit.kvcache.policy import parse, stored

    policy = stored(folder) if kv is None else None if kv == "none" else parse(str(kv))
    if policy is not None:
        attach(model, policy)


def load_tokenizer(path: str | Path) -> Any:
    """The tokenizer of a model folder; no code of the folder is run. Raises BadCheckpoint when there is none."""
    from transformers import AutoTokenizer

    folder = find_model(str(path))
    check_side_files(folder)
    advice = "copy the tokenizer's files of the original model here"
    with foreign_errors(f"{folder}: no tokenizer that transformers can load", advice):
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
