"""The shapes of measured products: by model name, by numbers, or those of a checkpoint."""

from __future__ import annotations

import re

from qkit.errors import UsageError
from qkit.files.folder import weights_folder
from qkit.files.locate import find_model
from qkit.tensor.formats import did_you_mean

Shape = tuple[int, int]  # (out, in)

MODELS: dict[str, tuple[Shape, ...]] = {
    "llama-3-8b": ((4096, 4096), (1024, 4096), (14336, 4096), (4096, 14336)),
    "llama-3-70b": ((8192, 8192), (1024, 8192), (28672, 8192), (8192, 28672)),
}


def parse_shapes(text: str) -> tuple[Shape, ...]:
    """The shapes of 'llama-3-8b,4096x4096', each once. Raises UsageError for what is neither."""
    shapes: list[Shape] = []
    for item in (part.strip().lower() for part in text.split(",")):
        numbers = re.fullmatch(r"(\d+)x(\d+)", item)
        if item in MODELS:
            shapes += MODELS[item]
        elif numbers and int(numbers[1]) and int(numbers[2]):
            shapes.append((int(numbers[1]), int(numbers[2])))
        else:
            raise UsageError(
                f"--shapes: unknown '{item}'{did_you_mean(item, [*MODELS])}: expected {', '.join(MODELS)} or OUTxIN, for "
                "instance 4096x4096"
            )
    return tuple(dict.fromkeys(shapes))


def model_shapes(model: str) -> tuple[Shape, ...]:
    """The shapes of the linears inside the blocks of a model, packed or not, each once."""
    from qkit.files.checkpoint import Checkpoint  # these bring torch, which reading a list of shapes does not need
    from qkit.runtime.loading import PackedStructure

    structure = PackedStructure(Checkpoint.open(weights_folder(find_model(model)), quantized=True))
    return tuple(dict.fromkeys(linear.shape for block in structure.blocks for linear in block.linears))
