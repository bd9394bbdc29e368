"""A checked model folder: its config, the places of its tensors, and how they are read.

A folder is a model when it has a config.json and one set of safetensors files: a single file, or shards
under an index. ``folder.py`` says which files may be read, ``safefile.py`` reads them; here they are put
together and held against each other. Config keys that make other libraries fetch or run code go no further.
Tensors of a model that is quantized already are decoded when they are read (``files.sources``): whoever reads a
checkpoint sees plain numbers under plain names.
"""

from __future__ import annotations

import hashlib
import math
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, Protocol

from qkit.errors import BadCheckpoint, NumericFailure
from qkit.files.folder import (
    CONFIG_LIMIT,
    checked_path,
    find_weights,
    list_names,
    load_json,
    parse_checked,
    refuse_adapter,
    require_safetensors,
    strip_code_keys,
)
from qkit.files.hash_cache import cached_sha256
from qkit.files.safefile import (
    TensorInfo,
    count_nonfinite,
    read_bytes,
    read_header,
    read_tensor,
    shown,
)
from qkit.files.schema import model_config
from qkit.files.side_files import hash_side_files, sampled_hash
from qkit.files.sources.decoded import DecodedInfo, decoded
from qkit.files.sources.gguf import gguf_tensors
from qkit.files.sources.lora import merged, open_adapter
from qkit.files.sources.opening import PlainView, plain_view

if TYPE_CHECKING:
    import torch

__all__ = [
    "Checkpoint",
    "check_config",
    "check_tied",
    "load_json",
    "strip_code_keys",
]

# Fields of a text config that count something, and the largest value that is not absurd.
LIMITS = {
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "word_embed_proj_dim"), 2**20),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "n_inner"), 2**24),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers"), 10_000),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_key_value_heads", "head_dim"), 2**16),
    "vocab_size": 2**26,
}
OPTIONAL = ("intermediate_size", "n_inner", "num_key_value_heads", "head_dim")  # null: derived from the others
TEXT_CONFIGS = ("text_config", "llm_config", "language_config", "thinker_config")
LAYER_COUNTS = ("num_hidden_layers", "n_layer", "n_layers")
ADAPTER = "adapter/"  # begins the names of what an adapter adds, which no tensor and no file of a model has


@dataclass(frozen=True)
class View:
    """A tensor that is a part of stored ones, or computed from them.

    sources: names of the stored tensors; shape: of the view; compute: the view, given ``Checkpoint.read_source``
    """

    sources: tuple[str, ...]
    shape: tuple[int, ...]
    compute: Callable[[ReadStored], torch.Tensor]


class ReadStored(Protocol):
    """How a view reads a stored tensor, or the part of it that has one index in the first dimension."""

    def __call__(self, name: str, index: int | None = None) -> torch.Tensor: ...


@dataclass(frozen=True, eq=False, kw_only=True)
class Checkpoint:
    """A model folder that passed every check that needs no tensor values.

    path:     the real path of the folder
    config:   config.json without the keys of ``dropped``
    tensors:  every tensor of all shards by name; of a source that is quantized already, the plain ones that it is decoded to
    shards:   the weight files, sorted
    dropped:  dotted names of the config keys left out because they choose code
    warnings: what is allowed, but the user should know
    adapter:  the weights of the adapter that is merged into the model; None without one
    """

    path: Path
    config: dict[str, Any]
    tensors: dict[str, TensorInfo]
    shards: tuple[Path, ...]
    dropped: tuple[str, ...]
    warnings: tuple[str, ...]
    adapter: Path | None
    _config_hash: str
    _states: dict[Path, os.stat_result]
    _stored: dict[str, TensorInfo]
    views: Mapping[str, View] = field(default_factory=dict)
    _last: dict[str, torch.Tensor] = field(default_factory=dict)  # the decoded tensor whose parts are being read
    sources: Mapping[str, TensorInfo] = field(default_factory=dict)  # what ``tensors`` was before it had views

    @classmethod
    def open(cls, path: str | Path, *, quantized: bool = False, adapter: str | Path | None = None) -> Checkpoint:
        """The model in a folder; reads config, index and headers, no values.

        quantized: leave tensors and config of a model that is quantized as they are stored, instead of decoding them
        adapter: the folder of an adapter (LoRA) that is merged into the model
        Raises Unsupported for GGUF, and for a way of quantizing that qkit does not decode (unless ``quantized``);
        BadCheckpoint for everything damaged, incomplete, ambiguous or leading out of the folder; IOFailure.
        """
        if not os.path.isdir(path):
            raise BadCheckpoint(f"{path}: no such folder: use the folder of a model with config.json and safetensors")
        folder = Path(path).resolve()
        names = list_names(folder)
        refuse_adapter(folder, names)
        require_safetensors(folder, names)
        raw = read_bytes(checked_path(folder, "config.json"), CONFIG_LIMIT)
        config = parse_checked(raw, f"{folder / 'config.json'}")
        if not isinstance(config, dict):
            raise BadCheckpoint(f"{folder / 'config.json'}: found a {type(config).__name__}, expected a JSON object")
        model_config(config, str(folder / "config.json"))
        files, weight_map = find_weights(folder, names)
        states = {file: _state(file) for file in files}
        tensors = _merge(files, folder, weight_map)
        clean, dropped = strip_code_keys(config)
        view = PlainView(clean, tensors) if quantized else plain_view(folder, names, clean, tensors)
        linked = tuple(f"{file} has more than one hard link" for file in files if states[file].st_nlink > 1)
        config_hash = hashlib.sha256(raw).hexdigest()
        plain, weights = view.tensors, None
        if adapter is not None:
            opened = open_adapter(adapter)
            plain = merged(opened, folder, view.tensors)
            weights = opened.file
            files, states = [*files, weights], {**states, weights: _state(weights)}
            tensors = {**tensors, **{f"{ADAPTER}{name}": info for name, info in opened.tensors.items()}}
            config_hash += opened.config_hash
        return cls(
            path=folder,
            config=view.config,
            tensors=plain,
            shards=tuple(files),
            dropped=tuple(dropped),
            warnings=linked,
            adapter=weights,
            _config_hash=config_hash,
            _states=states,
            _stored=tensors,
        )

    def read(self, name: str) -> torch.Tensor:
        """One tensor, as ``read_tensor``. Raises BadCheckpoint also when its file changed since ``open``."""
        if name not in self.tensors:
            raise BadCheckpoint(f"{self.path}: no tensor {shown(name)}: the model folder does not fit its config.json")
        if name in self.views:
            return self.views[name].compute(self.read_source)
        return self._read(self.tensors[name])

    def read_source(self, name: str, index: int | None = None) -> torch.Tensor:
        """A tensor by its name before there were views. index: of the part to read, in the first dimension"""
        info = (self.sources or self.tensors)[name]
        if index is None:
            return self._read(info)
        if isinstance(info, DecodedInfo):  # decoded as a whole, for all its parts
            if name not in self._last:
                self._last.clear()
                self._last[name] = self._read(info)
            return self._last[name][index]
        size = info.nbytes // info.shape[0]
        begin = info.begin + index * size
        return self._read(replace(info, shape=info.shape[1:], begin=begin, end=begin + size))

    def read_stored(self, info: DecodedInfo, *roles: str) -> dict[str, torch.Tensor]:
        """What a decoded tensor is made of, by role; all of it where no roles are named. Raises as ``read``."""
        return {role: self._read(part) for role, part in info.parts.items() if not roles or role in roles}

    def _read(self, info: TensorInfo) -> torch.Tensor:
        if isinstance(info, DecodedInfo):
            return decoded(info, self.read_stored(info))
        self._check_unchanged(info.file)
        tensor = read_tensor(info)
        self._check_unchanged(info.file)
        return tensor

    def renamed(self, names: Mapping[str, str]) -> Checkpoint:
        """The same checkpoint with tensors under other names, {name: new name}."""
        return replace(self, tensors={names.get(name, name): info for name, info in self.tensors.items()})

    def with_views(self, views: Mapping[str, View]) -> Checkpoint:
        """The checkpoint with views in place of the tensors that they show."""
        if not views:
            return self
        shown_in_views = {source for view in views.values() for source in view.sources}
        tensors = {n: info for n, info in self.tensors.items() if n not in shown_in_views}
        for name, view in views.items():
            info = self.tensors[view.sources[0]]
            size = math.prod(view.shape) * info.nbytes // max(1, math.prod(info.shape))
            tensors[name] = TensorInfo(
                name=name, dtype=info.dtype, shape=view.shape, file=info.file, begin=info.begin, end=info.begin + size
            )
        return replace(self, tensors=tensors, views=views, sources=self.tensors)

    def without_views(self) -> Checkpoint:
        """The checkpoint as it was before it had views."""
        return replace(self, tensors=dict(self.sources), views={}, sources={}) if self.views else self

    def read_finite(self, name: str, allow: bool = False) -> torch.Tensor:
        """One tensor. Raises NumericFailure when it holds NaN or infinity, unless ``allow``. A single number without dimensions
        may be infinite: a bound that is open, of a clamp."""
        tensor = self.read(name)
        is_bound = tensor.dim() == 0 and not tensor.isnan()
        count = 0 if allow or is_bound else count_nonfinite(tensor)
        if count:
            raise NumericFailure(
                f"{self.tensors[name].file}: tensor {shown(name)}: {count} of {tensor.numel()} values are NaN or "
                "infinite, expected none: get the model again, or repair this tensor"
            )
        return tensor

    @cached_property
    def view_groups(self) -> dict[tuple[str, ...], list[str]]:
        """{names of stored tensors: names of the views that show them}"""
        groups: dict[tuple[str, ...], list[str]] = {}
        for name, view in self.views.items():
            groups.setdefault(view.sources, []).append(name)
        return groups

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors together, as they are stored."""
        return sum(info.nbytes for info in self._stored.values())

    def fingerprint(self) -> str:
        """sha256 over the config, and name, size, header and samples of the content of every shard, in hex.

        Of the content, 256 pages spread over the shard enter, which tells a fine-tune from its base in an
        instant, and does not see every changed value: that takes ``sha256``.
        """
        starts: dict[Path, int] = {}
        for info in self._stored.values():
            starts[info.file] = min(info.begin, starts.get(info.file, info.begin))
        return self._digest(lambda file: sampled_hash(file, starts[file], self._states[file].st_size))

    def sha256(self, step: Callable[[], object] = lambda: None) -> str:
        """The sha256 as ``fingerprint`` forms it, but over every byte of the shards. It is quick where they were read
        before (``files.hash_cache``). step: called for every shard."""

        def content(file: Path) -> str:
            step()
            return cached_sha256(file)

        return self._digest(content)

    def _digest(self, content: Callable[[Path], str]) -> str:
        digest = hashlib.sha256(self._config_hash.encode())
        for file in self.shards:
            self._check_unchanged(file)
            name = file.relative_to(self.path).as_posix() if file.is_relative_to(self.path) else f"{ADAPTER}{file.name}"
            size = self._states[file].st_size
            digest.update(f"{name}\0{size}\0{content(file)}\0".encode())
            self._check_unchanged(file)
        return digest.hexdigest()

    @cached_property
    def side_files(self) -> dict[str, str]:
        """{name: sha256} of the tokenizer and all else that goes with the model (``side_files.hash_side_files``)."""
        return hash_side_files(self.path)

    def _check_unchanged(self, file: Path) -> None:
        now, opened = _state(file), self._states[file]
        if (now.st_size, now.st_mtime_ns, now.st_ino) != (opened.st_size, opened.st_mtime_ns, opened.st_ino):
            raise BadCheckpoint(f"{file}: changed while reading: let the other program finish, then start again")


def _state(file: Path) -> os.stat_result:
    try:
        return os.stat(file)
    except OSError as error:
        raise BadCheckpoint(f"{file}: changed while reading: {error.strerror}: put the file back") from error


def _merge(files: list[Path], folder: Path, weight_map: dict[str, str] | None) -> dict[str, TensorInfo]:
    """All tensors of the files, each in exactly one and where the index says."""
    tensors: dict[str, TensorInfo] = {}
    for file in files:
        for name, info in (gguf_tensors(file) if file.suffix == ".gguf" else read_header(file)).items():
            if name in tensors:
                files_of_name = f"{tensors[name].file.name} and {file.name}"
                raise BadCheckpoint(f"{folder}: tensor {shown(name)} is in both {files_of_name}: remove the stale file")
            tensors[name] = info
    if not tensors:
        raise BadCheckpoint(f"{folder}: {', '.join(file.name for file in files)}: no tensors: get the model again")
    for name, listed in (weight_map or {}).items():
        if name not in tensors:
            raise BadCheckpoint(f"{folder}: tensor {shown(name)} is missing from {listed}, where the index lists it")
        if tensors[name].file != folder / listed:
            raise BadCheckpoint(
                f"{folder}: tensor {shown(name)} is in {tensors[name].file.name}, but the index lists it in {listed}"
            )
    for name in sorted(tensors.keys() - weight_map.keys()) if weight_map else ():
        raise BadCheckpoint(f"{folder}: tensor {shown(name)} of {tensors[name].file.name} is not in the index")
    return tensors


def check_config(config: dict[str, Any], tensors: Mapping[str, TensorInfo]) -> None:
    """Compares the sizes that a config claims with limits of reason and with the tensors.

    Only fields that are there are judged, in the text config where one is nested. Raises BadCheckpoint with
    the field, found and expected.
    """
    text = config
    while nested := next((text[key] for key in TEXT_CONFIGS if isinstance(text.get(key), dict)), None):
        text = nested
    _check_counts(text)
    _check_layers(text, tensors)


def _wrong(field: str, value: object, expected: str) -> NoReturn:
    raise BadCheckpoint(f"config.json: {field} is {shown(value)}, expected {expected}: get the config of this model")


def _check_counts(config: dict[str, Any]) -> None:
    for name, largest in LIMITS.items():
        value = config.get(name, 1)
        if value is None and (name in OPTIONAL or "_class_name" in config):  # diffusers writes unused settings as null
            continue
        # Latent attention without positions: what is called head_dim there is the part of a head that has them.
        if (
            name == "head_dim"
            and type(value) is int
            and value == 0 == config.get("qk_rope_head_dim")
            and config.get("qk_nope_head_dim")
        ):
            continue
        # Some models give a size per layer as a list.
        for number in value if isinstance(value, list) and value else [value]:
            if type(number) is not int or not 1 <= number <= largest:
                _wrong(name, value, f"a whole number from 1 to {largest}")
    heads, shared = config.get("num_attention_heads"), config.get("num_key_value_heads")
    if isinstance(heads, int) and isinstance(shared, int) and heads % shared:
        _wrong("num_key_value_heads", shared, f"a divisor of num_attention_heads, {heads}")


def _check_layers(config: dict[str, Any], tensors: Mapping[str, TensorInfo]) -> None:
    """Refuses a number of layers that no stack of blocks in the file has, or a stack with a gap."""
    field = next((field for field in LAYER_COUNTS if isinstance(config.get(field), int)), None)
    if field is None:
        return
    stacks: dict[str, set[int]] = {}
    for name in tensors:
        if match := re.match(r"(.*?\b(?:layers|h|blocks))\.(\d{1,6})\.", name):
            stacks.setdefault(match[1], set()).add(int(match[2]))
    # A vision tower has a stack of its own, and layers for multi-token prediction follow the counted ones.
    extra = config.get("num_nextn_predict_layers")
    counts = {config[field], config[field] + (extra if type(extra) is int else 0)}
    lengths = {stack: max(indices) + 1 for stack, indices in stacks.items()}
    fitting = [stack for stack, length in lengths.items() if length in counts]
    # Layers may run more than once, or be counted over several stacks; the model's own modules decide later.
    if stacks and not fitting and config[field] > sum(lengths.values()) and config[field] % max(lengths.values()):
        lengths_found = ", ".join(f"{length} in {shown(stack)}" for stack, length in sorted(lengths.items())[:4])
        _wrong(field, config[field], f"the number of layers in the file ({lengths_found})")
    if fitting and not any(len(stacks[stack]) == lengths[stack] for stack in fitting):
        gap = min(set(range(lengths[fitting[0]])) - stacks[fitting[0]])
        _wrong(field, config[field], f"all layers in the file, but {shown(f'{fitting[0]}.{gap}')} has no tensors")


def check_tied(checkpoint: Checkpoint, tied: Mapping[str, str]) -> None:
    """Compares the bytes of tensors that the model shares, where the file has both. tied: {tensor: the one that it shares}

    Raises BadCheckpoint when they differ.
    """
    for first, second in tied.items():
        if first not in checkpoint.tensors or second not in checkpoint.tensors:
            continue
        a, b = checkpoint.read(first), checkpoint.read(second)
        if a.dtype != b.dtype or not a.equal(b):
            raise BadCheckpoint(
                f"{checkpoint.path}: config.json ties {shown(second)} and {shown(first)}, and they differ, expected equal: "
                "set tie_word_embeddings to false if both are meant"
            )
