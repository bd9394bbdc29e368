"""Names of tensors whose beginning is not the model's: a wrapper left its mark, or ``model.`` is missing or there twice.

torch.compile puts ``_orig_mod.`` before what it wraps, DistributedDataParallel ``module.``, peft ``base_model.model.``; a
model that was saved by its inner or outer part lacks the prefix of the inner one or has it twice. A name that the model has,
itself or after transformers' own renaming, is left alone; any other becomes the first of its variants that the model has.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from torch import nn

from qkit.errors import BadCheckpoint
from qkit.files.checkpoint import Checkpoint
from qkit.files.safefile import shown

_INSIDE = "_orig_mod."  # at any depth
_BEFORE = ("module.", "base_model.model.")


def under_model_names(checkpoint: Checkpoint, model: nn.Module) -> Checkpoint:
    """The checkpoint with its tensors under names that the model has; itself where nothing is to be done.

    Raises BadCheckpoint where two tensors would get one name.
    """
    fits = _fitting(model)
    prefix = getattr(model, "base_model_prefix", "")
    names = {name: name if fits(name) else _plain(name, prefix, fits) for name in checkpoint.tensors}
    if all(name == plain for name, plain in names.items()):
        return checkpoint
    taken: dict[str, str] = {}
    for name, plain in names.items():
        if plain in taken:
            raise BadCheckpoint(
                f"{checkpoint.path}: tensors {shown(taken[plain])} and {shown(name)} are both {shown(plain)} of the model: "
                "remove one of them"
            )
        taken[plain] = name
    return checkpoint.renamed(names)


def _plain(name: str, prefix: str, fits: Callable[[str], bool]) -> str:
    """The first variant of a name that fits; the name itself where none does."""
    return next((variant for variant in _variants(name, prefix) if fits(variant)), name)


def _variants(name: str, prefix: str) -> Iterator[str]:
    bare = name.replace(_INSIDE, "")
    for start in _BEFORE:
        bare = bare.removeprefix(start)
    yield bare
    if prefix:
        yield f"{prefix}.{bare}"
        while bare.startswith(f"{prefix}."):
            bare = bare.removeprefix(f"{prefix}.")
            yield bare
            yield f"{prefix}.{bare}"


def _fitting(model: nn.Module) -> Callable[[str], bool]:
    """Whether a name in a file is, itself or after transformers' renaming on loading, one of the model's."""
    from transformers import PreTrainedModel
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    own: Any = dict(model.state_dict())
    found = get_model_conversion_mapping(model) if isinstance(model, PreTrainedModel) else []
    renamings = [x for x in found if isinstance(x, WeightRenaming)]
    converters = [x for x in found if isinstance(x, WeightConverter)]
    return lambda name: name in own or rename_source_key(name, renamings, converters)[0] in own
