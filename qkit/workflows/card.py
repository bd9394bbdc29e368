"""What the card of a result (README.md) says of its KV cache: a section of its own, the rest of the card stays as it is."""

from __future__ import annotations

import re
from hashlib import sha256
from pathlib import Path
from typing import Any

from qkit.errors import BadCheckpoint, Unsupported
from qkit.files.folder import is_pipeline
from qkit.files.owned import check_file
from qkit.files.record import packed_record, write_record
from qkit.files.safefile import read_bytes, write_atomic

CARD = "README.md"
ENTRY = "serving"  # of the measurement in qkit.json
_BEGIN, _END = "\n<!-- qkit: KV cache -->\n", "<!-- /qkit: KV cache -->\n"
_SECTION = re.compile(re.escape(_BEGIN) + ".*?" + re.escape(_END), re.DOTALL)
_MOST = 1 << 24  # bytes of a card


def store_measurement(out: Path, data: dict[str, Any], section: str) -> None:
    """Write a measurement into the record of a result and ``section`` into its card.

    A kill between the two leaves a folder that the next call completes. Raises BadCheckpoint for a card that was changed after
    the export, Unsupported for a pipeline.
    """
    if is_pipeline(out):
        raise Unsupported(f"{out}: a diffusion pipeline has no KV cache")
    record = packed_record(out)
    if not isinstance(record.get("files"), dict):
        raise BadCheckpoint(f"{out}: its record has no sums of files (written by an older qkit): quantize again")
    check_file(out / CARD)
    text = read_bytes(out / CARD, _MOST).decode() if (out / CARD).is_file() else ""
    base = _SECTION.sub("", text)
    _refuse_changed(out, record, text, base)
    card = f"{base}{_BEGIN}{section.rstrip()}\n{_END}".encode()
    write_atomic(out / CARD, card)
    files = {**record["files"], CARD: sha256(card).hexdigest()}
    write_record(out, {**record, "files": files, ENTRY: {**data, "card_without": _digest(base)}})


def _refuse_changed(out: Path, record: dict[str, Any], text: str, base: str) -> None:
    """A card has to be what the record says, or that with another section: what a kill leaves."""
    listed, before = record["files"].get(CARD), (record.get(ENTRY) or {}).get("card_without")
    known = {listed, before} - {None}
    if listed is None and base == "":
        return
    if _digest(text) not in known and _digest(base) not in known:
        raise BadCheckpoint(
            f"{out / CARD}: it changed after the export: put the card that qkit wrote there, or remove what was added"
        )


def _digest(text: str) -> str:
    return sha256(text.encode()).hexdigest()
