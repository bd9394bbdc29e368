"""One layer decoded by itself, by the decoder of its way of storing, so that a fault of one stops no other."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qkit.diagnosis.compressed import Groups
from qkit.diagnosis.layers import Layer
from qkit.diagnosis.opened import Opened
from qkit.diagnosis.words import rule_of, version_of
from qkit.errors import BadCheckpoint, QkitError, Unsupported
from qkit.files.safefile import TensorInfo, read_tensor
from qkit.files.sources.decoded import DecodedInfo, Stored, decoded
from qkit.files.sources.opening import DECODERS

_TOLD_BY_TENSORS = ("fp8", "mxfp4")


@dataclass(frozen=True)
class Decoder:
    """Decodes the layers of one folder. groups: of compressed-tensors"""

    opened: Opened
    groups: Groups
    dtype: str

    @property
    def refusal(self) -> str | None:
        """Why no layer of the folder can be decoded; None where they can."""
        method = self._method()
        if method not in DECODERS:
            return f"qkit has no decoder for {self.opened.method or 'this layout'}"
        if not self.opened.quantization and method not in _TOLD_BY_TENSORS:
            return "the config does not say how it is quantized"
        return None

    def weight(self, layer: Layer, filled: bool = False) -> Tensor | QkitError:
        """The plain weight, or the error that says why there is none. filled: with a scale of 1 for each that is zero"""
        method = self._method()
        if self.refusal is not None:
            return Unsupported(self.refusal)
        try:
            info = self._find(layer, method)
            if info is None:
                return BadCheckpoint("no decoder takes its tensors for a weight")
            parts = {role: read_tensor(part) for role, part in info.parts.items()}
            if filled:
                parts = {role: _filled(t) if info.parts[role] is layer.scale else t for role, t in parts.items()}
            return decoded(info, parts)
        except QkitError as error:
            return error

    def _method(self) -> str:
        method = str(self.opened.method)
        if method == "auto-round":
            packing = str(self.opened.quantization.get("packing_format", ""))
            return "awq" if "awq" in packing else "compressed-tensors" if "llm_compressor" in packing else "gptq"
        return method

    def _find(self, layer: Layer, method: str) -> DecodedInfo | None:
        tensors = {info.name: info for info in layer.leaves.values()}
        stored = Stored(
            where=self.opened.folder, quantization=self._narrowed(layer, method), tensors=tensors, dtype=self.dtype
        )
        weights = DECODERS[method](stored).weights
        return weights.get(layer.plain_name) or next(iter(weights.values()), None)

    def _narrowed(self, layer: Layer, method: str) -> Mapping[str, Any]:
        """The config as it is about this layer alone."""
        quantization = self.opened.quantization
        if method in ("compressed-tensors", "qkit"):
            label = self.groups.of.get(layer.name) or next(iter(self.groups.parsed), "")
            given = quantization.get("config_groups")
            group = given.get(label) if isinstance(given, dict) else None
            only = {"group_0": {**group, "targets": [layer.name]}} if isinstance(group, dict) else {}
            rotated = quantization.get("rotated")
            mine = {k: v for k, v in rotated.items() if k == layer.name} if isinstance(rotated, dict) else None
            kept = {k: v for k, v in quantization.items() if k not in ("config_groups", "ignore", "rotated")}
            return {**kept, "config_groups": only, "ignore": [], **({"rotated": mine} if mine else {})}
        if method in ("gptq", "awq"):
            rule = rule_of(self.opened, layer.name) or quantization
            bits = layer.weights.bits if layer.weights is not None else rule.get("bits", 4)
            told = method == "gptq" and self.opened.method == "gptq"
            simple = {
                "bits": bits,
                "sym": rule.get("sym"),
                "group_size": rule.get("group_size"),
                "version": rule.get("version"),
            }
            return {**simple, "checkpoint_format": version_of(self.opened)} if told else simple
        return quantization


def _filled(scale: Tensor) -> Tensor:
    wide = scale.to(torch.float32)
    return torch.where(wide == 0, torch.ones_like(wide), wide).to(scale.dtype)


def plain(info: TensorInfo) -> Tensor:
    """A plain tensor in float32."""
    return read_tensor(info).to(torch.float32)
