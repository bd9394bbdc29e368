"""qkit as a quantization method of transformers: ``quant_method: qkit`` in a config.json.

Checkpoints in the compressed-tensors format need none of this, transformers loads them by itself. A checkpoint exported with
``--export qkit`` holds the same tensors under qkit's own method name; with ``import qkit``,
``AutoModelForCausalLM.from_pretrained(folder)`` then gives a model that runs packed, for every scheme. The packed
tensors are read here; transformers loads the rest.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

METHOD = "qkit"


@register_quantization_config(METHOD)
class QkitConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """The unchanged ``quantization_config`` of a config.json."""

    def __init__(self, **config: Any) -> None:
        self.quant_method = METHOD
        self.config = {k: v for k, v in config.items() if k != "quant_method"}

    def to_dict(self) -> dict[str, Any]:
        """The dictionary for config.json."""
        return {"quant_method": METHOD, **self.config}


def _renamed(model: Any, names: Iterable[str]) -> Iterator[str]:
    """The names that transformers' own renaming gives to modules of a file, by which it reports their tensors."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    found = get_model_conversion_mapping(model)
    renamings = [x for x in found if isinstance(x, WeightRenaming)]
    converters = [x for x in found if isinstance(x, WeightConverter)]
    shapes = model.state_dict()
    for name in names:
        renamed, _ = rename_source_key(f"{name}.weight_packed", renamings, converters, model.base_model_prefix, shapes)
        yield renamed.removesuffix(".weight_packed")


@register_quantizer(METHOD)
class QkitQuantizer(HfQuantizer):  # type: ignore[misc]
    """Puts packed modules in place before transformers loads the other weights."""

    requires_calibration = True

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:
        import torch

        from qkit.files.checkpoint import Checkpoint
        from qkit.nn.layers import QuantLinear
        from qkit.runtime.loading import PackedStructure, place_packed

        files = kwargs.get("checkpoint_files") or []
        structure = PackedStructure(Checkpoint.open(Path(files[0]).parent, quantized=True), model, buffers=False)
        with torch.inference_mode(), torch.device("cpu"):
            place_packed(structure, model.dtype)
        if structure.ends:  # packed ones are tied by sharing their codes, and have no parameter that could be
            model.all_tied_weights_keys = {}
        # Some models initialize a module through weights of its children, before it is known that all are there (T5).
        for module in model.modules():
            if any(isinstance(child, QuantLinear) for child in module.children()):
                module._is_hf_initialized = True
        # The packed tensors are loaded: transformers must not report them as unexpected.
        names = (*structure.formats, *structure.ends)
        packed = {rf"^{re.escape(name)}\." for name in (*names, *_renamed(model, names))}
        model._keys_to_ignore_on_load_unexpected = set(model._keys_to_ignore_on_load_unexpected or ()) | packed

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        return model.requires_grad_(False)  # as in ``qkit.load``: products with packed weights take no gradients

    @property
    def is_trainable(self) -> bool:
        """False: packed weights have no gradients."""
        return False

    def is_serializable(self) -> bool:
        """False: a packed folder is copied, not saved again."""
        return False
