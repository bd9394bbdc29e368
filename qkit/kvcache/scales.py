"""Static scales of an FP8 cache: one for the keys and one for the values of a layer, which engines read from a checkpoint.

They are buffers ``k_scale`` and ``v_scale`` [1] of the attention modules, with the same names in the file. A stored value is
its FP8 code times the scale. compressed-tensors and vLLM scale keys after rotary embedding.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from qkit.errors import Unsupported
from qkit.families.structure import ModelStructure
from qkit.tensor.activations import static_scale
from qkit.tensor.formats import ACTIVATION_FORMATS

NAMES = ("k_scale", "v_scale")
PROJECTIONS = ("k_proj", "v_proj", "qkv_proj")  # compressed-tensors 0.20 looks for one of them in the attention module
BlockCall = Callable[[nn.Module, Tensor, slice], Any]
FORMAT = ACTIVATION_FORMATS["fp8_static"]


def attentions(model: Any) -> dict[int, Any]:
    """{layer: its attention module}, in order."""
    modules = {m.layer_idx: m for m in model.modules() if hasattr(m, "layer_idx") and hasattr(m, "is_causal")}
    return dict(sorted(modules.items()))


def register_scales(model: nn.Module, dtype: torch.dtype) -> None:
    """Add buffers for scales to every attention module, so that the model's structure includes them."""
    for attention in attentions(model).values():
        for name in NAMES:
            attention.register_buffer(name, torch.empty(1, dtype=dtype, device="meta"))


def scales_of(model: nn.Module, layers: int) -> list[tuple[float, float]]:
    """(scale of keys, scale of values) of each layer; 1 where a model has none, as in engines."""
    modules = attentions(model)
    buffers = [modules[i]._buffers if i in modules else {} for i in range(layers)]
    return [(float(b.get(NAMES[0], 1.0)), float(b.get(NAMES[1], 1.0))) for b in buffers]


def tensor_names(structure: ModelStructure) -> list[tuple[str, str]]:
    """Checkpoint names of the scales (keys, values) of every block.

    Raises Unsupported for attention in which compressed-tensors finds no keys and values, and for a config without the number
    of their heads.
    """
    config: Any = structure.model.config
    if not hasattr(config.get_text_config(decoder=True), "num_key_value_heads"):
        raise Unsupported(
            f"--kv fp8 for a {structure.kind_name} model: compressed-tensors needs num_key_value_heads, which its config "
            "does not have: leave --kv out"
        )
    names = []
    for block in structure.blocks:
        parents = {x.name.rpartition(".")[0] for x in block.linears if x.name.rpartition(".")[2] in PROJECTIONS}
        if len(parents) != 1:
            raise Unsupported(
                f"--kv fp8 for a {structure.kind_name} model: {structure.stored_name(block.path)} has no attention "
                f"module with k_proj and v_proj, or qkv_proj, where engines look for scales: leave --kv out"
            )
        (parent,) = parents
        names.append((f"{parent}.{NAMES[0]}", f"{parent}.{NAMES[1]}"))
    return names


class RangeCache(DynamicCache):  # type: ignore[misc]
    """A cache that returns only new keys and values, and records their maxima. Several threads may use it."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[int, list[Tensor]] = {}
        self._local = threading.local()

    def counting(self, call: BlockCall, kinds: Tensor | None) -> BlockCall:
        """The call of a block for some rows, with padding left out of the maxima. kinds: of all rows [count, tokens]."""
        if kinds is None:
            return call
        counted = (kinds > 0).flip(1).cummax(1).values.flip(1)  # up to the last token that counts

        def run(block: nn.Module, hidden: Tensor, span: slice) -> Any:
            self._local.counted = counted[span]
            try:
                return call(block, hidden, span)
            finally:
                self._local.counted = None

        return run

    def update(self, keys: Tensor, values: Tensor, layer: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        counted: Tensor | None = getattr(self._local, "counted", None)
        found = [x.detach().abs() for x in (keys, values)]
        if counted is not None:
            found = [x.masked_fill(~counted[:, None, :, None], 0) for x in found]
        largest = torch.stack([x.amax((1, 2, 3)) for x in found])
        self.seen.setdefault(layer, []).append(largest.to(torch.float32))  # [2, rows]
        return keys, values

    def scales(self, layer: int, dtype: torch.dtype) -> list[Tensor]:
        """Scales of keys and of values, [1] each in ``dtype``: amax / 448 over all finite rows; 1 where all values are zero.

        Raises Unsupported for a layer that adds nothing to the cache.
        """
        if layer not in self.seen:
            raise Unsupported(
                f"--kv fp8: layer {layer} puts no keys and values of its own into a cache: leave --kv out"
            )
        maxima = torch.cat(self.seen[layer], dim=1)
        largest = maxima[:, maxima.isfinite().all(0)].amax(1)
        scales = torch.tensor([static_scale(float(x), FORMAT) for x in largest]).to(dtype)
        return list(torch.where((largest == 0) | (scales == 0), 1.0, scales).to(dtype).split(1))
