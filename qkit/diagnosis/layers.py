"""The quantized layers of a folder, told by the names of their tensors, whoever wrote them and whatever is missing.

A decoder stops at the first tensor that is wrong. Here a layer is what its tensors are called, so that each fault of each
layer can be named.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from qkit.files.safefile import TensorInfo
from qkit.tensor.formats import Format

CODES = ("qweight", "weight_packed", "weight_blocks", "blocks", "weight")
SCALES = ("scales", "weight_scale", "weight_scale_inv", "weight_scales", "scale", "scale_inv", "qscale_weight")
GLOBALS = ("weight_global_scale", "weight_scale_2")
ZEROS = ("qzeros", "weight_zero_point")
ORDERS = ("g_idx", "weight_g_idx")
INPUTS = ("input_scale", "input_global_scale", "input_zero_point", "activation_scale", "qscale_act", "pre_quant_scale")
MORE = (
    "weight_shape", "sparse_rows", "sparse_columns", "sparse_values", "low_rank_down", "low_rank_up", "input_smooth",
    "input_residual", "biases",
)  # fmt: skip
# Leaves that only a quantized layer has.
_MARKS = frozenset((*SCALES, *GLOBALS, *ZEROS, *ORDERS, "qweight", "weight_packed", "weight_shape"))
_LEAVES = frozenset((*_MARKS, *INPUTS, *MORE))
QUANTIZED_DTYPES = ("F8_E4M3", "F8_E5M2", "I8", "U8", "I32", "U32")


@dataclass
class Layer:
    """One quantized weight, by the name of its module.

    leaves:  its stored tensors by the end of their names
    weights, activations, packing: its formats, as far as the config and the shapes tell
    shape:   of the plain weight, (out, in), where it is known
    bare:    its name is that of a tensor, as fused experts have it
    """

    name: str
    leaves: dict[str, TensorInfo] = field(default_factory=dict)
    weights: Format | None = None
    activations: Format | None = None
    packing: str = ""
    shape: tuple[int, ...] | None = None
    bare: bool = False

    def first(self, names: tuple[str, ...]) -> TensorInfo | None:
        """The first tensor that is there of these."""
        return next((self.leaves[n] for n in names if n in self.leaves), None)

    @property
    def codes(self) -> TensorInfo | None:
        """The tensor with its codes."""
        return self.first(CODES)

    @property
    def scale(self) -> TensorInfo | None:
        """The tensor with its scales."""
        return self.first(SCALES)

    @property
    def nbytes(self) -> int:
        """Bytes of all its tensors."""
        return sum(info.nbytes for info in self.leaves.values())

    @property
    def plain_name(self) -> str:
        """What its weight is called where it is not quantized."""
        return self.name if self.bare else f"{self.name}.weight"


def find_layers(tensors: Mapping[str, TensorInfo]) -> dict[str, Layer]:
    """The quantized layers by name, in the order of the file."""
    layers: dict[str, Layer] = {}
    for name, info in tensors.items():
        owner, leaf, bare = _split(name, tensors)
        if leaf in _LEAVES or leaf == "blocks" or (leaf == "weight" and _is_coded(info)):
            layer = layers.setdefault(owner, Layer(owner))
            layer.leaves[leaf] = info
            layer.bare |= bare
    for layer in layers.values():
        plain = tensors.get(layer.plain_name)
        if plain is not None:
            layer.leaves["weight"] = plain
    return {name: layer for name, layer in layers.items() if _MARKS & layer.leaves.keys() or _is_coded(layer.codes)}


def gather(layers: dict[str, Layer], tensors: Mapping[str, TensorInfo], strange: Collection[str]) -> None:
    """Take the modules of tensors of an unknown layout for layers, each with all its tensors."""
    cut = ((name.partition(".weight.")[0], name.rpartition(".")[0]) for name in strange)
    owners = {min(inner, outer, key=len).removesuffix(".weight") for inner, outer in cut} | layers.keys()
    for name, info in tensors.items():
        parts = name.split(".")
        owner = next((o for i in range(len(parts) - 1, 0, -1) if (o := ".".join(parts[:i])) in owners), None)
        if owner is not None:
            layer = layers.setdefault(owner, Layer(owner))
            layer.leaves[name.removeprefix(f"{owner}.")] = info


def _split(name: str, tensors: Mapping[str, TensorInfo]) -> tuple[str, str, bool]:
    """Module and leaf of a tensor, and whether the module's weight has no name of its own, as fused experts have it."""
    owner, _, leaf = name.rpartition(".")
    if leaf in _LEAVES or leaf == "weight":
        return owner, leaf, False
    for end in ("_blocks", "_scales"):  # of gpt-oss
        stem = name.removesuffix(end)
        if stem != name and {f"{stem}_blocks", f"{stem}_scales"} & tensors.keys():
            return stem, end[1:], True
    for end in ("_scale_inv", "_scale"):
        stem = name.removesuffix(end)
        if stem != name and stem in tensors:
            return stem, f"weight{end}", True
    return owner, leaf, False


def _is_coded(info: TensorInfo | None) -> bool:
    """Whether a weight is stored as codes: no float type that models are kept in."""
    return info is not None and info.dtype in QUANTIZED_DTYPES


def count(info: TensorInfo) -> int:
    """Values of a stored tensor."""
    return math.prod(info.shape)
