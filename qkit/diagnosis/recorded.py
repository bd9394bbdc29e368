"""The files of a result of qkit against the sums that its qkit.json has of them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qkit.diagnosis.findings import Findings
from qkit.files.folder import RECORD
from qkit.verification.files import CARD, sha256_of

_WEIGHTS = (".safetensors", ".gguf")


def check_sums(folder: Path, record: Mapping[str, Any], findings: Findings) -> None:
    """A fault for weights whose bytes are not those that were written, a note for other files. Files that are not there, and
    the card, which users edit, are left out."""
    listed = [record.get(key) for key in ("files", "shards")]
    sums = {name: sha for part in listed if isinstance(part, dict) for name, sha in part.items() if name != CARD}
    for name, expected in sums.items():
        found = sha256_of(folder / name) if Path(name).name == name else None
        if found is None or found == expected:
            continue
        text = f"its sha256 is not the one in {RECORD}: bytes changed after qkit wrote them"
        if name.endswith(_WEIGHTS):
            advice = f"get the file again, or quantize again; 'qkit verify {folder}' names the layers"
            findings.fault("changed bytes", name, text, f"sha256 {expected}", advice)  # after what names a layer
        else:
            findings.note("changed bytes", name, text)
