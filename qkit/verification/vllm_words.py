"""vLLM's refusals in plain words: its own name classes of its source, and no formats of the file."""

from __future__ import annotations

import re
from collections.abc import Sequence

from qkit.verification.vllm_table import Choice, NumberFormat

# Of a layer whose formats no kernel of the GPU has, or none for its shape.
_NO_KERNEL = re.compile(
    r"Failed to find a kernel|compatible scheme was found|backend supports|Unsupported FusedMoe scheme"
    r"|For Fused MoE layers, only|not supported for the current GPU|Forced \S+ kernel"
    r"|it has no scheme for this combination"
)
_PLAIN = {
    r"is only supported on CPU": "its kernel for experts of these formats is for CPUs alone",
    r"group size (128|128 supported)": "its kernels for 4-bit weights with 8-bit inputs take groups of 128 alone",
    r"For NVFP4 weights, input": "it takes NVFP4 weights with NVFP4 inputs, or with inputs in 16 bits, alone",
    r"it says no more|'NoneType' object": "its code stops at these formats and gives no reason",
}
_CLASS = re.compile(r"^\w*(Error|Exception): ")
_MOST = 200  # characters of vLLM's own words that are repeated


def shortened(words: str) -> str:
    """vLLM's own words in one line."""
    line = " ".join(words.partition(" for layer_name=")[0].split()).rstrip(".")
    return line if len(line) <= _MOST else line[:_MOST] + " ..."


def why(choices: Sequence[Choice], weights: NumberFormat, activations: NumberFormat | None) -> str:
    """Why vLLM refuses the first of these layers that it refuses; the layers are of one combination of formats."""
    refused = [c.refused for c in choices if c.refused]
    inputs = "inputs in 16 bits" if activations is None else f"inputs in {activations}"
    plain = next((text for pattern, text in _PLAIN.items() if re.search(pattern, refused[0])), None)
    if plain is None and _NO_KERNEL.search(refused[0]):
        shapes = f" in the shapes of {len(refused)} of {len(choices)} layers" * (len(refused) < len(choices))
        return f"it has no kernel for weights in {weights} and {inputs}{shapes}"
    return plain or shortened(_CLASS.sub("", refused[0]))
