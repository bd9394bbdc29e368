"""The files of a result of qkit against the sums that its qkit.json has of them."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from qkit.diagnosis.findings import Findings
from qkit.files.folder import RECORD
from qkit.verification.files import CARD, sha256_of

_KIND = "changed bytes"
_WEIGHTS = (".safetensors", ".gguf")
_ADVICE = "get the file again, or quantize again"


def check_sums(folder: Path, record: Mapping[str, Any], findings: Findings) -> bool:
    """Whether weights changed: a fault for each file of them whose bytes are not those that were written, a note for other
    files. Files that are not there, and the card, which users edit, are left out."""
    listed = [record.get(key) for key in ("files", "shards")]
    sums = {name: sha for part in listed if isinstance(part, dict) for name, sha in part.items() if name != CARD}
    changed = False
    for name, expected in sums.items():
        found = sha256_of(folder / name) if Path(name).name == name else None
        if found is None or found == expected:
            continue
        text = f"its sha256 is not the one in {RECORD}: bytes changed after qkit wrote them"
        if name.endswith(_WEIGHTS):
            changed = True
            findings.fault(_KIND, name, text, "the bytes that qkit wrote", _ADVICE)  # after what names a layer
        else:
            findings.note(_KIND, name, text)
    return changed


def check_layer(name: str, weight: Tensor, record: Mapping[str, Any], findings: Findings) -> None:
    """A fault where a decoded weight, float32, is not the one of the record. For files whose sum is wrong: what else changes a
    weight on its way, such as a rotation, is not undone here."""
    linears = record.get("linears")
    known = linears.get(name) if isinstance(linears, dict) else None
    expected = known.get("weight_sha256") if isinstance(known, dict) else None
    if expected is None or not weight.is_floating_point():
        return
    found = hashlib.sha256(weight.float().contiguous().numpy().astype("<f4", copy=False).data).hexdigest()
    if found != expected:
        findings.fault(_KIND, name, f"its weight is not the one in {RECORD}", "the weight that qkit wrote", _ADVICE, 6)
