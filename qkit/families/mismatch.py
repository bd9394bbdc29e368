"""Explains why the tensors of an intact checkpoint do not match its skeleton.

These checks run only for a checkpoint that does not match.
"""

from __future__ import annotations

from collections.abc import Collection

from torch import nn

from qkit.files.checkpoint import Checkpoint
from qkit.files.safefile import shown
from qkit.files.schema import foreign_errors

# Ends of the names of transformers' classes, and what such a model is.
_KINDS = {
    "ForSequenceClassification": "a classifier",
    "ForTokenClassification": "a classifier of tokens",
    "ForQuestionAnswering": "a model that finds answers in a text",
    "ForMaskedLM": "a model that fills gaps in a text",
    "ForConditionalGeneration": "a model of more than text",
    "Model": "a model without an output head, as for embeddings",
}


def another_class(model: nn.Module, checkpoint: Checkpoint) -> str | None:
    """A message, or None, where config.json names another class of transformers than that of the skeleton."""
    import transformers

    architectures, built = checkpoint.config.get("architectures"), type(model).__name__
    declared = architectures[0] if isinstance(architectures, list) and architectures else built
    cls = getattr(transformers, declared, None) if isinstance(declared, str) else None
    if declared == built or getattr(cls, "config_class", None) is not type(model.config):
        return None
    description = next((f", {kind}" for end, kind in _KINDS.items() if declared.endswith(end)), "")
    return (
        f"config.json says that this is a {declared}{description}, and qkit reads a model of this type as a {built}: qkit "
        "cannot quantize it; use the language model of that kind, if there is one"
    )


def other_storage(model: nn.Module, checkpoint: Checkpoint, tied: Collection[str]) -> str | None:
    """A message, or None, where the checkpoint is complete but stores tensors under other names or in other pieces."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    with foreign_errors(f"{checkpoint.path}: transformers cannot tell how this model is stored"):
        mapping = get_model_conversion_mapping(model)
        renamings = [x for x in mapping if isinstance(x, WeightRenaming)]
        converters = [x for x in mapping if isinstance(x, WeightConverter)]
        shapes, prefix = dict(model.state_dict()), str(getattr(model, "base_model_prefix", ""))
        names = {s: rename_source_key(s, renamings, converters, prefix, shapes)[0] for s in checkpoint.tensors}
    shared = {*(getattr(model, "_tied_weights_keys", None) or ()), *tied} if tied else set()
    if not shapes.keys() - shared <= set(names.values()):
        return None
    stored, name = next((s, n) for s, n in names.items() if s != n)
    changed = sum(s != n for s, n in names.items())
    return (
        f"the checkpoint is complete, but qkit does not know how this kind of model is stored: {changed} tensors are renamed "
        f"or joined when they are loaded, the first is {shown(stored)}, which becomes {shown(name)}: use a model of a family "
        "that qkit knows ('qkit list families')"
    )
