"""The container of a GGUF file: which models llama.cpp runs, and what it has to know of them besides the weights.

It is made by llama.cpp's own converter. What is ours are the places of all tensors, by which a result is read again. A model
that llama.cpp would compute otherwise is refused (``gguf_computation``).
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from qkit.errors import Unsupported
from qkit.files.gguf_computation import CONTEXT, check_config, check_header, check_widths, unseen_window
from qkit.files.gguf_converter import EXTRA, INSTEAD, WHAT, converter
from qkit.files.gguf_places import Place
from qkit.files.gguf_rows import Rows, found_rows, places
from qkit.files.safefile import shown
from qkit.system.extras import require

if TYPE_CHECKING:
    from qkit.files.checkpoint import Checkpoint
    from qkit.files.safefile import TensorInfo

MODEL = "model.gguf"


@dataclass(frozen=True)
class FileTensor:
    """A tensor of the file. kind: of floats, where it is not quantized; rows: which of the checkpoint it has, None: it has
    other values, or comes from the config"""

    name: str
    kind: str
    shape: tuple[int, ...]
    rows: Rows | None


@dataclass(frozen=True)
class Container:
    """What llama.cpp has to know of a model.

    architecture: as llama.cpp calls it; fields: {key: value} of its hyperparameters and the tokenizer, in the types of Python
    tensors: of the file, in its order; places: {tensor of the checkpoint: where it is in the file}
    """

    architecture: str
    fields: dict[str, Any]
    tensors: list[FileTensor]
    places: dict[str, Place]


def container(checkpoint: Checkpoint, tied: Collection[str]) -> Container:
    """The container of a model. tied: names of tensors that are not stored.

    Raises Unsupported for a model that llama.cpp does not run, or computes differently, and without the converter.
    """
    require(WHAT, EXTRA, "gguf", "conversion")
    check_config(checkpoint.path, checkpoint.config)
    names = [name for name in checkpoint.tensors if name not in tied]
    with converter(checkpoint.path, checkpoint.config, stored_tensors(checkpoint, tied)) as made_by:
        fields = made_by.fields()
        found = found_rows(made_by, names, checkpoint.views)
        made = made_by.made(checkpoint.read_source)
    tensors = [FileTensor(m.name, m.kind, m.shape, found[m.name]) for m in made]
    held = places(found, {name: checkpoint.tensors[name].shape for name in names})
    lost = [name for name in names if name not in held]
    if lost:
        raise Unsupported(
            f"{checkpoint.path}: tensor {shown(lost[0])}: llama.cpp's converter leaves it out, or makes other numbers of it, "
            f"from which it cannot be read again: {INSTEAD}"
        )
    check_header(checkpoint.path, checkpoint.config, made_by.architecture, fields)
    check_widths(checkpoint.path, made_by.architecture, fields, {t.name: t.shape for t in tensors})
    window = unseen_window(checkpoint.config, made_by.architecture, fields)
    if window is not None:
        fields[f"{made_by.architecture}.{CONTEXT}"] = window
    return Container(made_by.architecture, fields, tensors, held)


def stored_tensors(checkpoint: Checkpoint, tied: Collection[str]) -> dict[str, TensorInfo]:
    """The tensors as the files have them, which the converter knows."""
    return {name: info for name, info in (checkpoint.sources or checkpoint.tensors).items() if name not in tied}
