"""Defects for model.gguf, as edits of its bytes: see ``seeded_files``."""

import struct
from pathlib import Path

import numpy as np
from seeded_files import Edit, Seed, cut

from qkit.files.gguf import TYPES, read_gguf


def gguf_seeds() -> list[Seed]:
    """Edits of the bytes of model.gguf."""
    return [
        Seed("cut file", cut("model.gguf", 0.6), ("files",), "model.gguf"),
        Seed("unknown type", gguf_type("blk.0.ffn_down.weight", 250), ("unknown types", "files"), ""),
        Seed("misaligned tensor", gguf_offset("blk.0.ffn_down.weight", 8), ("files",), "model.gguf"),
        Seed("block_count", gguf_key("block_count", 1), ("config", "lost tensors"), "block_count"),
        Seed("embedding_length", gguf_key("embedding_length", 32), ("config",), "embedding_length"),
        Seed("head_count", gguf_key("attention.head_count", 2), ("config",), "head_count"),
        Seed("super-block scales of NaN", gguf_scale("blk.0.ffn_down.weight", 0x7E00), ("scales",), "blk.0.ffn_down"),
        Seed(
            "super-block scales of zero",
            gguf_scale("blk.0.ffn_up.weight", 0),
            ("scales", "zero layers"),
            "blk.0.ffn_up",
        ),
        Seed("no output norm", gguf_name("output_norm.weight", "output_xxxx.weight"), ("lost tensors",), "output_norm"),
        Seed(
            "a tensor of a block is lost",
            gguf_name("blk.1.attn_k.weight", "blk.1.attn_x.weight"),
            ("lost tensors",),
            "blk.1",
        ),
        Seed("not a GGUF file", gguf_bytes(0, b"GGML"), ("files",), "model.gguf"),
        Seed("no tokens", gguf_name("tokenizer.ggml.tokens", "tokenizer.ggml.tokenz"), ("tokenizer",), "tokens"),
        Seed(
            "weights twice as large",
            gguf_scale("blk.0.attn_v.weight", None),
            ("drift",),
            "layers.0.self_attn.v_proj",
            True,
        ),
    ]


def gguf_bytes(place: int, data: bytes) -> Edit:
    """Bytes at a place of the file."""

    def edit(folder: Path) -> None:
        with (folder / "model.gguf").open("r+b") as file:
            file.seek(place)
            file.write(data)

    return edit


def _entry(raw: bytes, name: str) -> int:
    """Where the entry of a tensor begins behind its name."""
    mark = struct.pack("<Q", len(name)) + name.encode()
    return raw.index(mark) + len(mark)


def gguf_type(name: str, kind: int) -> Edit:
    """Another number of a type."""

    def edit(folder: Path) -> None:
        raw = (folder / "model.gguf").read_bytes()
        place = _entry(raw, name)
        (rank,) = struct.unpack_from("<I", raw, place)
        gguf_bytes(place + 4 + 8 * rank, struct.pack("<I", kind))(folder)

    return edit


def gguf_offset(name: str, more: int) -> Edit:
    """Another offset."""

    def edit(folder: Path) -> None:
        raw = (folder / "model.gguf").read_bytes()
        place = _entry(raw, name)
        (rank,) = struct.unpack_from("<I", raw, place)
        place += 4 + 8 * rank + 4
        (offset,) = struct.unpack_from("<Q", raw, place)
        gguf_bytes(place, struct.pack("<Q", offset + more))(folder)

    return edit


def gguf_name(name: str, other: str) -> Edit:
    """Another name of the same length."""

    def edit(folder: Path) -> None:
        raw = (folder / "model.gguf").read_bytes()
        assert len(name) == len(other)
        gguf_bytes(_entry(raw, name) - len(name), other.encode())(folder)

    return edit


def gguf_key(key: str, value: int) -> Edit:
    """Another number under a key of the architecture llama."""

    def edit(folder: Path) -> None:
        raw = (folder / "model.gguf").read_bytes()
        place = _entry(raw, f"llama.{key}")
        gguf_bytes(place + 4, struct.pack("<I", value))(folder)

    return edit


def gguf_scale(name: str, bits: int | None) -> Edit:
    """The float16 scale of each block of a tensor replaced; None: twice as large."""

    def edit(folder: Path) -> None:
        found = next(t for t in read_gguf(folder / "model.gguf").tensors if t.name == name)
        size = next(s for n, _, s in TYPES.values() if n == found.dtype)
        at = {
            "Q6_K": [208],
            "Q3_K": [108],
            "Q2_K": [80, 82],
            "Q4_K": [0, 2],
            "Q5_K": [0, 2],
            "Q4_1": [0, 2],
            "Q5_1": [0, 2],
        }
        raw = np.fromfile(folder / "model.gguf", dtype=np.uint8)
        blocks = raw[found.begin : found.begin + found.nbytes].reshape(-1, size)
        for place in at.get(found.dtype, [0]):
            if bits is None:
                halves = np.ascontiguousarray(blocks[:, place : place + 2]).view("<f2") * np.float16(2)
                blocks[:, place : place + 2] = halves.astype("<f2").view(np.uint8)
            else:
                blocks[:, place : place + 2] = np.frombuffer(struct.pack("<H", bits), dtype=np.uint8)
        raw.tofile(folder / "model.gguf")

    return edit
