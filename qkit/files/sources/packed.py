"""A quantized folder of any writer as codes and scales: what a conversion reads, in the words of compressed-tensors."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor

from qkit.errors import Unsupported, UsageError
from qkit.files.checkpoint import Checkpoint
from qkit.files.folder import list_names, load_json
from qkit.files.safefile import TensorInfo
from qkit.files.sources.decoded import CACHE_SCALES, DecodedInfo, Kept
from qkit.files.sources.opening import quantization_of
from qkit.tensor import compressed_tensors as ct
from qkit.tensor.formats import FORMATS, Format
from qkit.tensor.qtensor import Params, QTensor


@dataclass(frozen=True)
class PackedLinear:
    """One quantized linear [out, in] of a folder."""

    name: str
    info: DecodedInfo
    kept: Kept

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        return self.info.shape[0], self.info.shape[1]

    def read(self, checkpoint: Checkpoint) -> tuple[QTensor, Tensor | None]:
        """Codes and scales, and the scale of the inputs where it is stored. Zero points that are all 0 are left out."""
        tensors = self.kept.make(checkpoint.read_stored(self.info))
        q = ct.read(tensors, self.kept.weights, self.shape)
        static = tensors.get("input_scale", tensors.get("input_global_scale"))
        return without_zeros(q), static


@dataclass(frozen=True)
class PackedFolder:
    """linears: what is quantized; plain: all that is not, by name; cache: scales of the KV cache, by their names in
    compressed-tensors, {name: where they lie}; method: how config.json calls the layout; ignored: layers that it names as not
    quantized"""

    checkpoint: Checkpoint
    linears: Mapping[str, PackedLinear]
    plain: Mapping[str, TensorInfo]
    cache: Mapping[str, TensorInfo]
    method: str
    ignored: tuple[str, ...]


def looked_at(info: DecodedInfo, checkpoint: Checkpoint) -> Kept | str:
    """How a linear is kept, after a look at its small tensors, or why it is not."""
    kept = info.kept
    if isinstance(kept, str):
        return kept
    return kept.doubt(lambda role: checkpoint.read_stored(info, role)[role]) or kept


def without_zeros(q: QTensor) -> QTensor:
    """The weight without zero points where all of them are 0: as symmetric, which is the same and runs faster."""
    if q.params.zero is None or bool(q.params.zero.any()):
        return q
    symmetric = replace(q.format, symmetric=True)
    name = next((f.name for f in FORMATS.values() if _alike(f, symmetric)), symmetric.name)
    return QTensor(q.codes, Params(q.params.scale), replace(symmetric, name=name), q.sparse, q.low_rank)


def _alike(a: Format, b: Format) -> bool:
    return (a.kind, a.bits, a.strategy, a.symmetric, a.scale) == (b.kind, b.bits, b.strategy, b.symmetric, b.scale)


def open_packed(folder: Path, export: str = "") -> PackedFolder:
    """The quantized folder. export: the layout that it is read for, which messages name

    Raises UsageError for a folder that is not quantized, Unsupported for a linear whose numbers have no place in another
    layout, and what ``Checkpoint.open`` raises.
    """
    checkpoint, stored = Checkpoint.open(folder), Checkpoint.open(folder, quantized=True).tensors
    linears: dict[str, PackedLinear] = {}
    layout = f" (--export {export} writes that layout)" if export not in ("", "compressed-tensors") else ""
    command = f"qkit quantize --model {shlex.quote(str(folder))} --scheme w4a16 --out OUT"
    for full, info in checkpoint.tensors.items():
        if not isinstance(info, DecodedInfo):
            continue
        kept = looked_at(info, checkpoint)
        name = full.removesuffix(".weight")
        if isinstance(kept, str) or len(info.shape) != 2:
            why = kept if isinstance(kept, str) else "it is no matrix of one linear"
            raise Unsupported(
                f"{name}: it cannot be converted as it is stored ({info.encoding}): {why}: quantize it anew, better from its "
                f"original{layout}: {command}"
            )
        linears[name] = PackedLinear(name, info, kept)
    if not linears:
        raise UsageError(
            f"{folder}: the model is not quantized, so there is nothing to convert: quantize it{layout}: {command}"
        )
    plain = {name: info for name, info in checkpoint.tensors.items() if not isinstance(info, DecodedInfo)}
    cache = {name: info for name, info in stored.items() if name.endswith(CACHE_SCALES)}
    said = (
        quantization_of(folder, list_names(folder), load_json(folder / "config.json", "model config", 16 << 20)) or {}
    )
    ignored = said.get("ignore")
    names = tuple(x for x in ignored if isinstance(x, str)) if isinstance(ignored, list) else ()
    return PackedFolder(checkpoint, linears, plain, cache, str(said.get("quant_method") or "unnamed"), names)
