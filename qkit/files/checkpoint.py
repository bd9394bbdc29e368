"""A checked model folder: its config, the places of its tensors, and how they are read.

A folder is a model when it has a config.json and one set of safetensors files: a single file, or shards
under an index. ``folder.py`` says which files may be read, ``safefile.py`` reads them; here they are put
together and held against each other. Config keys that make other libraries fetch or run code go no further.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from qkit.errors import BadCheckpoint, NumericFailure
from qkit.files.folder import (
    CONFIG_LIMIT,
    checked_path,
    find_weights,
    list_names,
    load_json,
    parse_checked,
    refuse_adapter,
    refuse_quantized,
    refuse_quantized_names,
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
WIDTHS = ("hidden_size", "n_embd", "d_model", "word_embed_proj_dim", "embedding_size")
EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "word_embeddings.weight", "embed_in.weight")
HEADS = ("lm_head.weight", "embed_out.weight", "output.weight")


@dataclass(frozen=True, eq=False, kw_only=True)
class Checkpoint:
    """A model folder that passed every check that needs no tensor values.

    path:     the real path of the folder
    config:   config.json without the keys of ``dropped``
    tensors:  every tensor of all shards by name
    shards:   the weight files, sorted
    dropped:  dotted names of the config keys left out because they choose code
    warnings: what is allowed, but the user should know
    """

    path: Path
    config: dict[str, Any]
    tensors: dict[str, TensorInfo]
    shards: tuple[Path, ...]
    dropped: tuple[str, ...]
    warnings: tuple[str, ...]
    _config_hash: str
    _states: dict[Path, os.stat_result]

    @classmethod
    def open(cls, path: str | Path, *, quantized: bool = False) -> Checkpoint:
        """The model in a folder; reads config, index and headers, no values.

        Raises Unsupported for a model that is quantized already (unless ``quantized``) or GGUF; BadCheckpoint
        for everything damaged, incomplete, ambiguous or leading out of the folder; IOFailure.
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
        if not quantized:
            refuse_quantized(folder, names, config)
        files, weight_map = find_weights(folder, names)
        states = {file: _state(file) for file in files}
        tensors = _merge(files, folder, weight_map)
        if not quantized:
            refuse_quantized_names(folder, tensors)
        clean, dropped = strip_code_keys(config)
        linked = tuple(f"{file} has more than one hard link" for file in files if states[file].st_nlink > 1)
        config_hash = hashlib.sha256(raw).hexdigest()
        return cls(
            path=folder,
            config=clean,
            tensors=tensors,
            shards=tuple(files),
            dropped=tuple(dropped),
            warnings=linked,
            _config_hash=config_hash,
            _states=states,
        )

    def read(self, name: str) -> torch.Tensor:
        """One tensor, as ``read_tensor``. Raises BadCheckpoint also when its file changed since ``open``."""
        if name not in self.tensors:
            raise BadCheckpoint(f"{self.path}: no tensor {shown(name)}: the model folder does not fit its config.json")
        info = self.tensors[name]
        self._check_unchanged(info.file)
        tensor = read_tensor(info)
        self._check_unchanged(info.file)
        return tensor

    def read_finite(self, name: str, allow: bool = False) -> torch.Tensor:
        """One tensor. Raises NumericFailure when it holds NaN or infinity, unless ``allow``."""
        tensor = self.read(name)
        count = 0 if allow else count_nonfinite(tensor)
        if count:
            raise NumericFailure(
                f"{self.tensors[name].file}: tensor {shown(name)}: {count} of {tensor.numel()} values are NaN or "
                "infinite, expected none: get the model again, or repair this tensor"
            )
        return tensor

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors together."""
        return sum(info.nbytes for info in self.tensors.values())

    def fingerprint(self) -> str:
        """sha256 over the config, and name, size, header and samples of the content of every shard, in hex.

        Of the content, 256 pages spread over the shard enter, which tells a fine-tune from its base in an
        instant, and does not see every changed value: that takes ``sha256``.
        """
        starts: dict[Path, int] = {}
        for info in self.tensors.values():
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
            name, size = file.relative_to(self.path).as_posix(), self._states[file].st_size
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
        for name, info in read_header(file).items():
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
    _check_embedding(text, tensors)


def _wrong(field: str, value: object, expected: str) -> NoReturn:
    raise BadCheckpoint(f"config.json: {field} is {shown(value)}, expected {expected}: get the config of this model")


def _check_counts(config: dict[str, Any]) -> None:
    for field, largest in LIMITS.items():
        value = config.get(field, 1)
        if value is None and (field in OPTIONAL or "_class_name" in config):  # diffusers writes unused settings as null
            continue
        # Some models give a size per layer as a list.
        for number in value if isinstance(value, list) and value else [value]:
            if type(number) is not int or not 1 <= number <= largest:
                _wrong(field, value, f"a whole number from 1 to {largest}")
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
    if stacks and not fitting:
        lengths_found = ", ".join(f"{length} in {shown(stack)}" for stack, length in sorted(lengths.items())[:4])
        _wrong(field, config[field], f"the number of layers in the file ({lengths_found})")
    if fitting and not any(len(stacks[stack]) == lengths[stack] for stack in fitting):
        gap = min(set(range(lengths[fitting[0]])) - stacks[fitting[0]])
        _wrong(field, config[field], f"all layers in the file, but {shown(f'{fitting[0]}.{gap}')} has no tensors")


def _check_embedding(config: dict[str, Any], tensors: Mapping[str, TensorInfo]) -> None:
    """Refuses a vocabulary or a width that no embedding matrix in the file has."""
    embedding_shapes = [tensors[name].shape for name in _ending(tensors, EMBEDDINGS) if len(tensors[name].shape) == 2]
    for fields, axis in ((("vocab_size",), 0), (WIDTHS, 1)):
        claims = {field: config[field] for field in fields if isinstance(config.get(field), int)}
        if embedding_shapes and claims and not any(shape[axis] in claims.values() for shape in embedding_shapes):
            field, value = next(iter(claims.items()))
            _wrong(
                field, value, f"{embedding_shapes[0][axis]}, {('rows', 'columns')[axis]} of the embedding in the file"
            )


def _ending(tensors: Mapping[str, TensorInfo], suffixes: tuple[str, ...]) -> list[str]:
    return [name for name in tensors if any(name == suffix or name.endswith("." + suffix) for suffix in suffixes)]


def check_tied(checkpoint: Checkpoint, tied: bool) -> tuple[str, str] | None:
    """The names of tied input and output embeddings, after a comparison of their bytes.

    tied: what the config says, with the default of its model type. Returns the names (embedding, head) when
    they are tied and the file holds both, equal; None when there is nothing to share. Raises BadCheckpoint
    when they are tied but differ, or not tied and there is no head.
    """
    embeddings, heads = _ending(checkpoint.tensors, EMBEDDINGS), _ending(checkpoint.tensors, HEADS)
    where = f"{checkpoint.path}: tie_word_embeddings is {str(tied).lower()}"
    if not heads and not tied:
        raise BadCheckpoint(f"{where}, but there is no {HEADS[0]}: get the complete model, or correct the config")
    if not tied or not heads or not embeddings:
        return None
    head = heads[0]
    shape = checkpoint.tensors[head].shape
    embedding = next((name for name in embeddings if checkpoint.tensors[name].shape == shape), embeddings[0])
    first, second = checkpoint.read(embedding), checkpoint.read(head)
    if first.dtype != second.dtype or not first.equal(second):
        raise BadCheckpoint(
            f"{where}, but {shown(embedding)} and {shown(head)} differ, expected equal: "
            "set tie_word_embeddings to false if both are meant"
        )
    return embedding, head
