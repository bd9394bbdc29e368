"""qkit: post-training quantization, from a full-precision checkpoint to a packed, proven and loadable one.

    import qkit
    qkit.quantize("tiny-llama", scheme="w4a16", method="gptq", out="out")
    model = qkit.load("out")  # a transformers model that runs on the packed weights

There is a function for each verb of the command line, with the same options: quantize, plan, profile, verify, evaluate, check.
Errors: ``qkit.errors``.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

from qkit.system.import_hook import after_import
from qkit.system.version import __version__
from qkit.workflows.api import check, evaluate, load, plan, profile, quantize, verify

__all__ = ["__version__", "check", "evaluate", "load", "plan", "profile", "quantize", "verify"]

# The one effect of the import: transformers and diffusers learn of qkit's checkpoints, when and if they are imported. That
# takes seconds, and 'qkit --help' does not need it.
after_import("transformers.quantizers", lambda: import_module("qkit.runtime.transformers_plugin"))
after_import("diffusers.quantizers.auto", lambda: import_module("qkit.runtime.diffusers_plugin"))


def __getattr__(name: str) -> Any:
    """Names of modules as they were before they moved: ``qkit.generate``, ``qkit.speculate``."""
    if name == "generate":
        return import_module("qkit.runtime.generate")
    if name == "speculate":
        return import_module("qkit.runtime.speculate")
    raise AttributeError(f"module 'qkit' has no attribute '{name}'")
