"""qkit as a quantization method of diffusers. diffusers has no function to register one, so two of its tables are extended.

With ``import qkit``, ``DiffusionPipeline.from_pretrained(folder)`` and the transformer classes' own ``from_pretrained`` load
folders that qkit packed in compressed-tensors' layout, and weights stay packed. Without the import, diffusers refuses the
method.
"""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Any

from diffusers.quantizers import auto
from diffusers.quantizers.base import DiffusersQuantizer
from diffusers.quantizers.quantization_config import QuantizationConfigMixin


class Method(str, Enum):
    """Names of methods in config.json. diffusers reads a method's ``.value``."""

    QKIT = "qkit"
    COMPRESSED_TENSORS = "compressed-tensors"


class QkitDiffusersConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """The unchanged ``quantization_config`` of a config.json."""

    def __init__(self, **config: Any) -> None:
        self.quant_method = Method(config.pop("quant_method", Method.QKIT.value))
        self.config = config

    def to_dict(self) -> dict[str, Any]:
        """The dictionary for config.json."""
        return {"quant_method": self.quant_method.value, **self.config}

    def to_diff_dict(self) -> dict[str, Any]:
        """The dictionary that diffusers prints."""
        return self.to_dict()


class QkitDiffusersQuantizer(DiffusersQuantizer):  # type: ignore[misc]
    """Puts packed modules in place before diffusers loads the other weights."""

    requires_calibration = True
    use_keep_in_fp32_modules = True  # as in the unquantized model

    def update_torch_dtype(self, torch_dtype: Any) -> Any:
        """The dtype of activations and unquantized weights; None: that of the checkpoint."""
        self.dtype = torch_dtype
        return torch_dtype

    def maybe_update_loaded_keys(self, loaded_keys: list[str], checkpoint_files: list[str]) -> list[str]:
        """Names of all tensors but packed ones, which this class reads."""
        from qkit.files.checkpoint import Checkpoint
        from qkit.runtime.loading import PackedStructure

        self.checkpoint = Checkpoint.open(Path(checkpoint_files[0]).parent, quantized=True)
        packed = PackedStructure(self.checkpoint).formats
        return [k for k in loaded_keys if k.rpartition(".")[0] not in packed or k.endswith(".bias")]

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:
        import torch

        from qkit.runtime.loading import PackedStructure, place_packed

        self.structure = structure = PackedStructure(self.checkpoint, model)
        with torch.inference_mode(), torch.device("cpu"):
            place_packed(structure, self.dtype or structure.dtype)

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        from qkit.diffusion.controller import attach_recorded

        attach_recorded(model, self.structure)
        return model.requires_grad_(False)  # as in ``qkit.load``: products with packed weights take no gradients

    @property
    def is_trainable(self) -> bool:
        """False: packed weights have no gradients."""
        return False

    @property
    def is_serializable(self) -> bool:
        """False: a packed folder is copied, not saved again."""
        return False


for method in Method:
    auto.AUTO_QUANTIZATION_CONFIG_MAPPING.setdefault(method.value, QkitDiffusersConfig)
    auto.AUTO_QUANTIZER_MAPPING.setdefault(method.value, QkitDiffusersQuantizer)
