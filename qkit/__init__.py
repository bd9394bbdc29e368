"""qkit: post-training quantization, from a full-precision checkpoint to a packed, proven and loadable one.

    import qkit
    model = qkit.load("out")  # a transformers model that runs on the packed weights

Quantizing from Python: ``qkit.workflows.quantize`` (Request, prepare, quantize). Proof: ``qkit.verification.verify``.
Errors: ``qkit.errors``.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

__version__ = "0.1.0"
__all__ = ["load"]

from qkit.system.import_hook import after_import

# The one effect of the import: transformers and diffusers learn of qkit's checkpoints, when and if they are imported. That
# takes seconds, and 'qkit --help' does not need it.
after_import("transformers.quantizers", lambda: import_module("qkit.runtime.transformers_plugin"))
after_import("diffusers.quantizers.auto", lambda: import_module("qkit.runtime.diffusers_plugin"))


def load(path: str | Path, dtype: torch.dtype | None = None, device: str = "cpu", kv: str | None = None) -> Any:
    """A transformers language model in eval mode, or a diffusers pipeline; quantized linears stay packed in memory.

    path:   a folder that ``qkit quantize`` wrote, any compressed-tensors or full-precision checkpoint of a known kind,
            or the name of a reference model
    dtype:  of activations and unquantized weights; default: the checkpoint's. float32 computes on exactly the
            decompressed weights.
    device: where the model goes, as torch names it
    kv:     the KV cache that ``generate`` uses, for instance 'kivi2' or 'int8' ('none': a plain one); default: what the
            folder was made for, if it was
    Raises BadCheckpoint for a damaged folder, Unsupported for formats that qkit cannot run, UsageError for a policy that
    does not suit the model (``qkit.errors``).
    """
    from qkit.runtime import loading  # not before it is needed: it brings the whole way from file to model

    return loading.load(path, dtype, device, kv)
