"""The tensors of a GGUF file: every block decoded, and the weights against the original.

Types that qkit's own decoder does not know are decoded by the library gguf where it is installed.
"""

from __future__ import annotations

import re
import statistics
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from qkit.diagnosis.drift import Drift
from qkit.diagnosis.findings import Findings
from qkit.diagnosis.gguf_keys import number_of
from qkit.diagnosis.opened import DOWNLOAD, said
from qkit.diagnosis.rounding import gguf_format
from qkit.errors import QkitError
from qkit.files.gguf import TYPES, GgufHeader, GgufTensor, read_gguf
from qkit.files.gguf_places import SCALE
from qkit.files.safefile import open_regular, read_range
from qkit.verification.gguf_blocks import TYPES as OWN
from qkit.verification.gguf_blocks import Array, decode_blocks

if TYPE_CHECKING:
    from qkit.files.checkpoint import Checkpoint

PLAIN = ("F32", "F16", "BF16", "F64")
_OWN = {name for name, _, _ in OWN.values()}
_SIZES = {name: (columns, size) for name, columns, size in TYPES.values()}
_SCALE_AT = {  # where the float16 scale of a block lies, of types whose codes are all else
    "Q4_0": 0, "Q8_0": 0, "Q5_0": 0, "IQ4_NL": 0, "Q4_K": 0, "Q5_K": 0, "Q6_K": 208, "Q3_K": 108, "Q2_K": 80, "IQ4_XS": 0,
}  # fmt: skip
_CODES_AT = {
    "Q4_0": (2, 18), "Q8_0": (2, 34), "IQ4_NL": (2, 18), "Q4_K": (16, 144), "Q6_K": (0, 192), "IQ4_XS": (8, 136),
}  # fmt: skip
_BLOCK = re.compile(r"blk\.(\d{1,6})\.(.+)")
_CHUNK = 1 << 22
_LOW, _HIGH, _OTHERS = 1e-4, 1e3, 30.0


def open_gguf(files: list[Path], findings: Findings) -> list[tuple[Path, GgufHeader]]:
    """The headers that can be read."""
    headers = []
    for file in files:
        try:
            headers.append((file, read_gguf(file)))
        except QkitError as error:
            text = said(error).removeprefix(f"{file}: ")
            findings.fault("files", file.name, text, "a whole GGUF file", DOWNLOAD, 9)
    return headers


# ---- values --------------------------------------------------------------------------------------------------------


def decode(file: Path, t: GgufTensor, findings: Findings) -> Array | None:
    """float32 [rows, columns] of a tensor; None where nothing here decodes its type. Scales of blocks are looked at."""
    if t.nbytes is None or not t.shape or 0 in t.shape:
        return None
    with open_regular(file) as source:
        raw = np.frombuffer(read_range(file, source, t.begin, t.nbytes, t.name), dtype=np.uint8)
    columns = t.shape[0]
    rows = raw.reshape(-1, len(raw) // (t.count // columns))
    _check_blocks_of(t, raw, findings)
    if t.dtype in _OWN:
        result = np.empty((len(rows), columns), dtype=np.float32)
        step = max(1, _CHUNK // columns)
        with np.errstate(all="ignore"):
            for first in range(0, len(rows), step):
                result[first : first + step] = decode_blocks(t.dtype, rows[first : first + step], columns)
        return result
    return _by_library(t, rows)


def _by_library(t: GgufTensor, rows: Array) -> Array | None:
    try:
        import gguf
    except ImportError:
        return None
    kind = getattr(gguf.GGMLQuantizationType, t.dtype, None)
    try:
        with np.errstate(all="ignore"):
            return None if kind is None else np.asarray(gguf.quants.dequantize(rows, kind), dtype=np.float32)
    except NotImplementedError:
        return None


def _check_blocks_of(t: GgufTensor, raw: Array, findings: Findings) -> None:
    """Blocks whose scale is zero although their codes are not."""
    at, codes = _SCALE_AT.get(t.dtype), _CODES_AT.get(t.dtype)
    if at is None or codes is None:
        return
    blocks = raw.reshape(-1, _SIZES[t.dtype][1])
    scale = np.ascontiguousarray(blocks[:, at : at + 2]).view("<f2")[:, 0]
    idle = blocks[scale == 0][:, codes[0] : codes[1]]
    if len(idle):
        lost = int((idle != idle[:, :1]).any(axis=1).sum())
        if lost:
            findings.fault(
                "scales",
                t.name,
                f"{lost} of {len(blocks)} blocks have a scale of zero and codes that are not",
                "a scale above zero",
                "quantize the model again",
                8,
            )


def check_values(
    file: Path,
    header: GgufHeader,
    drift: Drift | None,
    name_of: Callable[[GgufTensor, Array], tuple[str, Array]],
    findings: Findings,
    step: Callable[[], object],
) -> dict[str, str]:
    """Every tensor decoded, one at a time; what was not, with the reason."""
    sizes: dict[str, list[tuple[str, float]]] = {}
    unread: dict[str, str] = {}
    beside = {t.name.removesuffix(SCALE): t for t in header.tensors if t.name.endswith(SCALE) and t.count == 1}
    for t in header.tensors:
        step()
        if t.dtype in ("I8", "I16", "I32", "I64"):
            continue
        values = decode(file, t, findings)
        if values is None:
            if 0 not in t.shape and t.shape:
                unread[t.name] = _why_undecoded(t)
            continue
        scale = beside.get(t.name.removesuffix(".weight"))
        factor = decode(file, scale, findings) if scale is not None and scale is not t else None
        if factor is not None:  # of NVFP4: llama.cpp multiplies products with it
            values = values * factor.reshape(-1)[0]
        bad = int(values.size - np.isfinite(values).sum())
        if bad:
            findings.fault(
                "scales",
                t.name,
                f"{bad} of {values.size} decoded weights are NaN or infinite",
                "finite weights",
                "quantize the model again",
                9,
            )
            continue
        rms = float(np.sqrt(np.square(values, dtype=np.float32).mean(dtype=np.float64)))
        if len(t.shape) > 1 and rms == 0:
            findings.fault("zero layers", t.name, "all its weights are zero", "weights", "quantize the model again", 9)
            continue
        if len(t.shape) > 1:
            _check_size(t, rms, sizes, findings)
        if drift is not None:
            name, ordered = name_of(t, values)
            drift.add(name, torch.from_numpy(ordered.copy()), None if t.dtype in PLAIN else gguf_format(t.dtype))
    _compare(sizes, findings)
    return unread


def _why_undecoded(t: GgufTensor) -> str:
    if t.nbytes is None:
        return f"its type is not known ({t.dtype})"
    try:
        import gguf  # noqa: F401
    except ImportError:
        return f"qkit decodes no {t.dtype} by itself: pip install gguf"
    return f"neither qkit nor the library gguf that is installed decodes {t.dtype}"


def check_places(file: Path, header: GgufHeader, findings: Findings) -> None:
    """Tensors one behind the other, as llama.cpp demands, and nothing behind the last."""
    known = sorted((t for t in header.tensors if t.nbytes), key=lambda t: t.begin)
    alignment = number_of(header.values, "general.alignment") or 32
    for one, following in pairwise(known):
        end = one.begin + (one.nbytes or 0)
        if following.begin < end:
            findings.fault(
                "files", [one.name, following.name], f"{following.name} begins at byte {following.begin}, within {one.name}, "
                f"which ends at {end}", "each byte in one tensor", DOWNLOAD, 9,
            )  # fmt: skip
        elif following.begin >= end + alignment:
            findings.fault(
                "files", following.name, f"it begins at byte {following.begin}, and the tensor before it ends at {end}",
                f"at most {alignment - 1} bytes between two tensors: llama.cpp refuses the file", DOWNLOAD, 8,
            )  # fmt: skip
    if known and len(known) == len(header.tensors):
        end, size = known[-1].begin + (known[-1].nbytes or 0), file.stat().st_size
        if size >= end + alignment:
            findings.warn(
                "files", file.name, f"{size - end} bytes lie behind the last tensor: the file has {size} bytes", f"{end} bytes",
                DOWNLOAD, 6,
            )  # fmt: skip


def _check_size(t: GgufTensor, rms: float, sizes: dict[str, list[tuple[str, float]]], findings: Findings) -> None:
    if not _LOW < rms * t.shape[0] ** 0.5 < _HIGH:
        findings.fault(
            "magnitude",
            t.name,
            f"its decoded weights have the size {rms:.2g} (root of the mean square)",
            f"about {t.shape[0] ** -0.5:.2g}",
            "quantize the model again",
            8,
        )
        return
    if match := _BLOCK.fullmatch(t.name):
        sizes.setdefault(match[2], []).append((t.name, rms))


def _compare(sizes: dict[str, list[tuple[str, float]]], findings: Findings) -> None:
    for leaf, members in sizes.items():
        middle = statistics.median(rms for _, rms in members)
        for name, rms in members if len(members) > 2 else ():
            if not 1 / _OTHERS < rms / middle < _OTHERS:
                findings.fault(
                    "magnitude",
                    name,
                    f"its decoded weights are {rms / middle:.3g} times as large as those of the other {leaf}",
                    "weights of about one size",
                    "quantize the model again",
                    7,
                )


# ---- names in the original -------------------------------------------------------------------------------------------


def names_in(original: Checkpoint, header: GgufHeader) -> dict[str, tuple[str, int]] | None:
    """{tensor of the file: (its name in the original, heads whose rows are interleaved)}; None without the library gguf."""
    try:
        import gguf
    except ImportError:
        return None
    architecture = header.values.get("general.architecture")
    arch = next((a for a, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture), None)
    if arch is None:
        return {}
    known = gguf.get_tensor_name_map(arch, number_of(header.values, f"{architecture}.block_count") or 1)
    heads = number_of(header.values, f"{architecture}.attention.head_count") or 0
    shared = number_of(header.values, f"{architecture}.attention.head_count_kv") or heads
    names: dict[str, tuple[str, int]] = {}
    for tensor in original.tensors:
        found = known.get_name(tensor, try_suffixes=(".weight", ".bias"))
        if found is not None:
            turned = {"attn_q": heads, "attn_k": shared}.get(found.split(".")[-2], 0) if architecture == "llama" else 0
            names[found] = (tensor, turned)
    return names


def in_order(rows: Array, heads: int) -> Array:
    """Rows as the checkpoint has them: of each head the first halves of all rotations, then the second ones."""
    if not heads or len(rows) % (2 * heads):
        return rows
    pairs = rows.reshape(heads, len(rows) // heads // 2, 2, *rows.shape[1:])
    return np.ascontiguousarray(np.swapaxes(pairs, 1, 2).reshape(rows.shape))
