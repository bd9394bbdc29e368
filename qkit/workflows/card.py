"""What was measured of a result, in its record and in sections of its card (README.md)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from qkit.errors import Unsupported
from qkit.files.card import CACHE, check_rewritable, rewrite_card, with_section, without_sections
from qkit.files.folder import is_pipeline
from qkit.files.record import packed_record, write_record

ENTRY = "serving"  # of the measured KV cache in qkit.json


def check_storable(out: Path) -> None:
    """Raises BadCheckpoint for a folder that has no place for a measured KV cache, Unsupported for a pipeline. To be asked
    before the work of measuring."""
    if is_pipeline(out):
        raise Unsupported(f"{out}: a diffusion pipeline has no KV cache")
    packed_record(out)
    check_rewritable(out)


def store_measurement(out: Path, data: dict[str, Any], section: str) -> None:
    """Write a measurement into the record of a result and ``section`` into its card.

    A kill between the two leaves a folder that the next call completes. Raises as ``check_storable``.
    """
    check_storable(out)
    rewrite_card(out, lambda card: with_section(card, CACHE, section.encode()))
    write_record(out, {**packed_record(out), ENTRY: data})


def forget_measurement(out: Path) -> bool:
    """Take the measurement out of the record and its section out of the card; False where there is none.

    A card that the measurement alone made goes with it. Raises as ``check_storable``.
    """
    check_storable(out)
    if ENTRY not in packed_record(out):
        return False
    rewrite_card(out, lambda card: without_sections(card, CACHE))
    write_record(out, {key: value for key, value in packed_record(out).items() if key != ENTRY})
    return True
