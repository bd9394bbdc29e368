"""README.md of a result, its card: the user's to edit, but for the sections between marks, which qkit writes anew.

A record knows the card as it was exported, so that an edited one can be told; it is never refused for that.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

from qkit.errors import BadCheckpoint, BadInput
from qkit.files.folder import RECORD, RECORD_LIMIT, load_json
from qkit.files.owned import check_file
from qkit.files.record import write_record
from qkit.files.safefile import read_bytes, write_atomic

CARD = "README.md"
QUANTIZATION, CACHE, FIGURES = "quantization", "KV cache", "figures"  # the sections
_MOST = 1 << 24  # bytes of a card


def read_card(folder: Path) -> bytes:
    """The card of a folder, nothing where there is none. Raises BadInput for a link or a folder of its name."""
    check_file(folder / CARD)
    return read_bytes(folder / CARD, _MOST) if (folder / CARD).is_file() else b""


def section(card: bytes, name: str) -> bytes | None:
    """What is between the marks of a section."""
    found = _pattern(name).search(card)
    return None if found is None else found[1]


def with_section(card: bytes, name: str, text: bytes) -> bytes:
    """The card with a section of that content, in the place of the one that was there, else at the end."""
    made = b"\n<!-- qkit: %s -->\n%s\n<!-- /qkit: %s -->\n" % (name.encode(), text.rstrip(), name.encode())
    found = _pattern(name).search(card)
    if found is None:
        return card + (b"" if card.endswith(b"\n") or not card else b"\n") + made
    return card[: found.start()] + made + without_sections(card[found.end() :], name)


def without_sections(card: bytes, *names: str) -> bytes:
    """The card without these sections: the words of others."""
    for name in names:
        card = _pattern(name).sub(b"", card)
    return card


def rewrite_card(out: Path, change: Callable[[bytes], bytes]) -> None:
    """Write the card that ``change`` gives for the present one; one that becomes empty is removed.

    The record follows where the card was as it says. Raises BadCheckpoint for a folder that is no result, or one whose record
    has no sums.
    """
    record = check_rewritable(out)
    before = read_card(out)
    card, files = change(before), dict(record["files"])
    if files.pop(CARD, None) == (_digest(before) if before else None) and card:
        files[CARD] = _digest(card)
    elif CARD in record["files"] and card:
        files[CARD] = record["files"][CARD]
    if card:
        write_atomic(out / CARD, card)
    else:
        (out / CARD).unlink(missing_ok=True)
    if files != record["files"]:
        write_record(out, {**record, "files": files})


def check_rewritable(out: Path) -> dict[str, Any]:
    """The record around the card. Raises as ``rewrite_card``."""
    file = out / RECORD
    if not file.is_file():
        raise BadCheckpoint(f"{file}: no such file: this folder is not a result of qkit")
    record = load_json(file, "record", RECORD_LIMIT)
    if not isinstance(record, dict) or not isinstance(record.get("files"), dict):
        raise BadCheckpoint(f"{out}: its record has no sums of files (written by an older qkit): quantize again")
    check_file(out / CARD)
    return record


def edited_card(out: Path) -> bytes | None:
    """The card of a result, where somebody changed it since the export; None where nobody did, or there is no result."""
    try:
        record, card = check_rewritable(out), read_card(out)
    except BadInput:  # no record, or a link in the place of the card
        return None
    return card if card and record["files"].get(CARD) != _digest(card) else None


def _pattern(name: str) -> re.Pattern[bytes]:
    mark = re.escape(name.encode())
    return re.compile(rb"(?:\r?\n)?<!-- qkit: %s -->\r?\n(.*?)\r?\n?<!-- /qkit: %s -->\r?\n?" % (mark, mark), re.DOTALL)


def _digest(data: bytes) -> str:
    return sha256(data).hexdigest()
