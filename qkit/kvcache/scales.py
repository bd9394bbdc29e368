"""Static scales of a cache for engines: of the keys and of the values of a layer, which engines read from a checkpoint.

They are buffers of the attention modules, with the same names in the file:

  fp       k_scale, v_scale [1]                       a stored value is its FP8 code times the scale
  fp-head  k_scale, v_scale [heads, 1, 1]             the same, with a scale for each head of keys and of values
  nvfp     k_global_scale, v_global_scale float32 [1] 2688 / amax, which the FP8 scales of 16 channels are multiplied with

compressed-tensors and vLLM scale keys after rotary embedding.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from qkit.errors import Unsupported
from qkit.families.structure import ModelStructure
from qkit.kvcache.policy import NAMED
from qkit.tensor.activations import static_scale
from qkit.tensor.formats import ACTIVATION_FORMATS, Format

NAMES = {"fp": ("k_scale", "v_scale"), "fp-head": ("k_scale", "v_scale"), "nvfp": ("k_global_scale", "v_global_scale")}
PROJECTIONS = ("k_proj", "v_proj", "qkv_proj")  # compressed-tensors 0.20 looks for one of them in the attention module
BlockCall = Callable[[nn.Module, Tensor, slice], Any]
FORMATS: dict[str, Format] = {
    "fp": ACTIVATION_FORMATS["fp8_static"],
    "fp-head": replace(ACTIVATION_FORMATS["fp8_static"], name="fp8_head", strategy="attn_head"),
    "nvfp": ACTIVATION_FORMATS["nvfp4_dynamic"],
}
Scale = float | Tensor  # of one side of a layer: a number, or float32 [heads, 1, 1], or [1] for nvfp


def attentions(model: Any) -> dict[int, Any]:
    """{layer: its attention module}, in order."""
    found = (m for m in model.modules() if hasattr(m, "layer_idx") and hasattr(m, "is_causal"))
    modules = {m.layer_idx: m for m in found if m.layer_idx is not None}  # None: of an encoder
    return dict(sorted(modules.items()))


def layer_count(model: Any) -> int:
    """Layers of a model's language part."""
    return int(model.config.get_text_config(decoder=True).num_hidden_layers)


def scale_shape(kind: str, config: Any) -> tuple[int, ...]:
    """The shape of a scale in the checkpoint."""
    return (int(config.get_text_config(decoder=True).num_key_value_heads), 1, 1) if kind == "fp-head" else (1,)


def scale_dtype(kind: str, dtype: torch.dtype) -> torch.dtype:
    """The dtype of a scale in a checkpoint of a model in ``dtype``."""
    return torch.float32 if kind == "nvfp" else dtype


def stored_bytes(structure: ModelStructure, kind: str) -> int:
    """Bytes of all scales in the checkpoint. Raises as ``tensor_names``."""
    count = sum(map(len, tensor_names(structure, kind)))
    config: Any = structure.model.config
    numbers = torch.Size(scale_shape(kind, config)).numel()
    return count * numbers * scale_dtype(kind, structure.dtype).itemsize


def register_scales(model: nn.Module, dtype: torch.dtype, kind: str) -> None:
    """Add buffers for scales to every attention module, so that the model's structure includes them."""
    shape, dtype = scale_shape(kind, model.config), scale_dtype(kind, dtype)
    for attention in attentions(model).values():
        for name in NAMES[kind]:
            attention.register_buffer(name, torch.empty(shape, dtype=dtype, device="meta"))


def scales_of(model: nn.Module, layers: int, kind: str = "fp") -> list[tuple[Scale, Scale]]:
    """(scale of keys, scale of values) of each layer; 1 where a model has none, as in engines."""
    modules = attentions(model)
    buffers = [modules[i]._buffers if i in modules else {} for i in range(layers)]
    keys, values = NAMES[kind]
    return [(_scale(b.get(keys), kind), _scale(b.get(values), kind)) for b in buffers]


def _scale(stored: Tensor | None, kind: str) -> Scale:
    if kind == "nvfp":
        return torch.ones(1) if stored is None else stored.float()
    if stored is None:
        return 1.0
    return stored.float() if kind == "fp-head" and stored.dim() == 3 else float(stored.max())


def tensor_names(structure: ModelStructure, kind: str) -> list[tuple[str, str]]:
    """Checkpoint names of the scales (keys, values) of every block.

    Raises Unsupported for attention in which compressed-tensors finds no keys and values, and for a config without the number
    of their heads.
    """
    config: Any = structure.model.config
    name = option_name(kind)
    if not hasattr(config.get_text_config(decoder=True), "num_key_value_heads"):
        raise Unsupported(
            f"--kv {name} for a {structure.kind_name} model: compressed-tensors needs num_key_value_heads, which its config "
            "does not have: leave --kv out"
        )
    _refuse_odd_attention(structure, kind)
    names = []
    for block in structure.blocks:
        parents = {x.name.rpartition(".")[0] for x in block.linears if x.name.rpartition(".")[2] in PROJECTIONS}
        if len(parents) != 1:
            raise Unsupported(
                f"--kv {name} for a {structure.kind_name} model: {structure.stored_name(block.path)} has no attention "
                f"module with k_proj and v_proj, or qkv_proj, where engines look for scales: leave --kv out"
            )
        (parent,) = parents
        keys, values = NAMES[kind]
        names.append((f"{parent}.{keys}", f"{parent}.{values}"))
    return names


def _refuse_odd_attention(structure: ModelStructure, kind: str) -> None:
    modules = attentions(structure.model)
    if [*modules] != list(range(len(structure.blocks))):
        raise Unsupported(
            f"--kv {option_name(kind)} for a {structure.kind_name} model: {len(structure.blocks) - len(modules)} of its "
            f"{len(structure.blocks)} layers have no attention to earlier tokens: leave --kv out"
        )
    taken = next((name for name in NAMES[kind] if any(hasattr(m, name) for m in modules.values())), None)
    if taken is not None and not any(taken in m._buffers for m in modules.values()):
        raise Unsupported(
            f"--kv {option_name(kind)} for a {structure.kind_name} model: its attention has a {taken} of its own, which scales "
            "would replace: leave --kv out"
        )


def option_name(kind: str) -> str:
    """The value of --kv for a kind with static scales."""
    return NAMED.get(kind) or f"{kind}{FORMATS[kind].bits}"


class RangeCache(DynamicCache):  # type: ignore[misc]
    """A cache that returns only new keys and values, and records their maxima by head. Several threads may use it."""

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
        largest = torch.stack([x.amax((2, 3)) for x in found])
        self.seen.setdefault(layer, []).append(largest.to(torch.float32))  # [2, rows, heads]
        return keys, values

    def scales(self, layer: int, dtype: torch.dtype, kind: str = "fp") -> list[Tensor]:
        """Scales of keys and of values as the checkpoint has them, over all finite rows: amax / 448, or 2688 / amax for nvfp;
        1 where all values are zero.

        Raises Unsupported for a layer that adds nothing to the cache.
        """
        if layer not in self.seen:
            raise Unsupported(
                f"--kv {option_name(kind)}: layer {layer} puts no keys and values of its own into a cache: leave --kv out"
            )
        maxima = torch.cat(self.seen[layer], dim=1)
        largest = maxima[:, maxima.isfinite().all(2).all(0)].amax(1)  # [2, heads]
        largest = largest if kind == "fp-head" else largest.amax(1, keepdim=True)
        fmt, dtype = FORMATS[kind], scale_dtype(kind, dtype)
        exact = [[static_scale(float(x), fmt) for x in side] for side in largest]
        scales = torch.tensor(exact).to(dtype)
        scales = torch.where((largest == 0) | (scales == 0), 1.0, scales).to(dtype)
        return [side.view(-1, 1, 1) if kind == "fp-head" else side for side in scales]
