"""AWQ as AutoAWQ stores it (``version: gemm``), 4 bits with a zero point for each group.

Of a linear [out, in]: ``qweight`` int32 [in, out / 8], ``qzeros`` int32 [groups, out / 8] and ``scales`` [groups, out]. A
word holds eight neighbouring outputs, from the lowest bits on in the order 0, 2, 4, 6, 1, 3, 5, 7. The plain weight is
(code - zero) * scale in the dtype of the scales, then rounded to that of the model.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from qkit.errors import Unsupported
from qkit.files.safefile import TensorInfo, shown
from qkit.files.sources.decoded import DecodedInfo, Found, Parts, Stored, number
from qkit.files.sources.groups import Groups, decode_groups, kept_groups

if TYPE_CHECKING:
    from torch import Tensor

_BITS, _LANES = 4, 8
_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def find(stored: Stored) -> Found:
    """The AWQ linears of a folder. Raises Unsupported for other layouts, BadCheckpoint for shapes that do not fit."""
    version = str(stored.quantization.get("version") or stored.quantization.get("format") or "gemm").lower()
    bits = number(stored, "bits" if "bits" in stored.quantization else "w_bit", _BITS)
    if version != "gemm" or bits != _BITS:
        raise Unsupported(
            f"{stored.where}: config.json: AWQ of version {shown(version)} with {bits} bits, and qkit decodes 'gemm' with "
            f"{_BITS}: dequantize the model first, or use the original"
        )
    names = [name.removesuffix(".qweight") for name in stored.tensors if name.endswith(".qweight")]
    return Found({f"{n}.weight": _linear(stored, n) for n in names}, ())


def _linear(stored: Stored, name: str) -> DecodedInfo:
    parts = {"codes": stored.tensors[f"{name}.qweight"]}
    for leaf, role in (("scales", "scale"), ("qzeros", "zero")):
        parts[role] = stored.part(f"{name}.{leaf}", "tensor", f"{name}.qweight")
    shape = _shape(stored, parts)
    decode = partial(decode_groups, shape=shape, cut=_cut, unpack=_unpack, dtype=stored.torch_dtype)
    return stored.decoded(
        f"{name}.weight", shape, parts, decode, "AWQ with 4 bits", kept_groups(_BITS, shape, parts["scale"], _unpack)
    )


def _shape(stored: Stored, parts: dict[str, TensorInfo]) -> tuple[int, int]:
    codes, scale, zero = parts["codes"], parts["scale"], parts["zero"]
    if codes.dtype != "I32" or len(codes.shape) != 2:
        stored.refuse(codes.name, f"is {codes.dtype} {list(codes.shape)}, expected I32 [in, out / {_LANES}]")
    columns, rows = codes.shape[0], codes.shape[1] * _LANES
    floats = scale.dtype in ("F16", "BF16", "F32")
    if len(scale.shape) != 2 or scale.shape[1] != rows or not scale.shape[0] or columns % scale.shape[0] or not floats:
        found = f"is {scale.dtype} {list(scale.shape)}"
        stored.refuse(scale.name, f"{found}, expected floats [groups, {rows}] with groups that divide {columns}")
    expected = (scale.shape[0], codes.shape[1])
    if zero.dtype != "I32" or zero.shape != expected:
        stored.refuse(zero.name, f"is {zero.dtype} {list(zero.shape)}, expected I32 {list(expected)}")
    return rows, columns


def _lanes(words: Tensor) -> Tensor:
    """uint8 [n, 8 m] from int32 [n, m], in the order of the outputs."""
    import torch

    place = torch.empty(_LANES, dtype=torch.int64)
    place[torch.tensor(_ORDER)] = torch.arange(_LANES)
    lanes = [((words >> (_BITS * int(i))) & 15).to(torch.uint8) for i in place]
    return torch.stack(lanes, dim=-1).flatten(1)


def _cut(parts: Parts, some: slice) -> Parts:
    """The stored tensors of some outputs, whose number divides by 8."""
    words = slice(some.start // _LANES, some.stop // _LANES)
    return {"codes": parts["codes"][:, words], "zero": parts["zero"][:, words], "scale": parts["scale"][:, some]}


def _unpack(parts: Parts) -> Groups:
    import torch

    codes, zero = (_lanes(parts[role]).T.to(torch.int16) for role in ("codes", "zero"))
    return Groups(codes, zero, parts["scale"].T, None)
