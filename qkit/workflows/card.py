"""What the card of a result (README.md) says of its KV cache: a section of its own, the rest of the card stays as it is."""

from __future__ import annotations

import re
from hashlib import sha256
from pathlib import Path
from typing import Any

from qkit.engine.card import CARD
from qkit.errors import BadCheckpoint, Unsupported
from qkit.files.folder import is_pipeline
from qkit.files.owned import check_file
from qkit.files.record import packed_record, write_record
from qkit.files.safefile import read_bytes, write_atomic

ENTRY = "serving"  # of the measurement in qkit.json
_BEGIN, _END = "\n<!-- qkit: KV cache -->\n", "<!-- /qkit: KV cache -->\n"
_SECTION = re.compile(re.escape(_BEGIN) + ".*?" + re.escape(_END), re.DOTALL)
_MOST = 1 << 24  # bytes of a card


def check_storable(out: Path) -> None:
    """Raises BadCheckpoint for a folder that has no place for a measurement, or a card that was changed after the export;
    Unsupported for a pipeline. To be asked before the work of measuring."""
    _card_and_record(out)


def store_measurement(out: Path, data: dict[str, Any], section: str) -> None:
    """Write a measurement into the record of a result and ``section`` into its card.

    A kill between the two leaves a folder that the next call completes. Raises as ``check_storable``.
    """
    base, record = _card_and_record(out)
    card = f"{base}{_BEGIN}{section.rstrip()}\n{_END}".encode()
    write_atomic(out / CARD, card)
    files = {**record["files"], CARD: sha256(card).hexdigest()}
    write_record(out, {**record, "files": files, ENTRY: {**data, "card_without": _digest(base)}})


def forget_measurement(out: Path) -> bool:
    """Take the measurement out of the record and its section out of the card; False where there is none.

    A card that the measurement alone made goes with it. Raises as ``check_storable``.
    """
    base, record = _card_and_record(out)
    if ENTRY not in record:
        return False
    files = {name: digest for name, digest in record["files"].items() if name != CARD}
    if base:
        write_atomic(out / CARD, base.encode())
        files[CARD] = _digest(base)
    else:
        (out / CARD).unlink(missing_ok=True)
    write_record(out, {**{key: value for key, value in record.items() if key != ENTRY}, "files": files})
    return True


def _card_and_record(out: Path) -> tuple[str, dict[str, Any]]:
    """The card without the section of a measurement, "" where there is none, and the record."""
    if is_pipeline(out):
        raise Unsupported(f"{out}: a diffusion pipeline has no KV cache")
    record = packed_record(out)
    if not isinstance(record.get("files"), dict):
        raise BadCheckpoint(f"{out}: its record has no sums of files (written by an older qkit): quantize again")
    check_file(out / CARD)
    text = read_bytes(out / CARD, _MOST).decode() if (out / CARD).is_file() else ""
    base = _SECTION.sub("", text)
    _refuse_changed(out, record, text, base)
    return base, record


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
