"""What the card (README.md) of a result in GGUF says of the file: a section behind the card of the source, which stays."""

from __future__ import annotations

import re

from qkit.files.gguf_container import MODEL
from qkit.planning.plan import Plan
from qkit.system.version import __version__
from qkit.tensor.gguf_blocks import block_bytes

CARD = "README.md"
_BEGIN, _END = b"\n<!-- qkit: GGUF -->\n", b"<!-- /qkit: GGUF -->\n"
_SECTION = re.compile(re.escape(_BEGIN) + b".*?" + re.escape(_END), re.DOTALL)


def gguf_card(before: bytes, plan: Plan, size: int) -> bytes:
    """The card with the section. before: the card of the source, or nothing; size: bytes of the file"""
    types: dict[str, list[tuple[int, int]]] = {}
    for p in plan.packed.values():
        types.setdefault(p.weights.ggml, []).append((p.shape[0] * p.shape[1], block_bytes(p.weights, p.shape)))
    rows = [
        f"| {name} | {len(entries)} | {sum(n for n, _ in entries) / 1e6:.2f} | "
        f"{8 * sum(b for _, b in entries) / sum(n for n, _ in entries):.3f} |"
        for name, entries in types.items()
    ]
    data = plan.calibration
    seen = "" if data is None else f", calibrated on {data.samples * data.seqlen:,} tokens of {data.source}"
    lines = [
        "## GGUF, quantized with qkit",
        "",
        f"`{MODEL}` ({size:,} bytes) was written by qkit {__version__} with the method {plan.recipe['method']}{seen}.",
        "It was decoded again by an independent program and compared with the weights that were meant.",
        "",
        "| type | tensors | weights (M) | bits per weight |",
        "| --- | --- | --- | --- |",
        *rows,
        "",
        f"Run it in llama.cpp: `llama-server --model {MODEL}`. Check it with `qkit verify` on this folder.",
    ]
    section = "".join(f"{line}\n" for line in lines).encode()
    return _SECTION.sub(b"", before) + _BEGIN + section + _END
