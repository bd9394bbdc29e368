"""The record qkit.json in every folder that qkit writes, with the sums that show any change in the folder.

``files`` has the sha256 of every other file of the folder, ``config`` what config.json was written with besides its
quantization_config, and ``sum`` is the sha256 of the record itself, as JSON without the sum. A pipeline has one record in
the folder of its transformer and one at its top, for all other files, which has the first record among them.
"""

from __future__ import annotations

import json
from hashlib import sha256
from pathlib import Path
from typing import Any

from qkit.errors import BadCheckpoint
from qkit.files.folder import DENOISER, RECORD, RECORD_LIMIT, is_pipeline, load_json, read_record, weights_folder
from qkit.files.safefile import write_atomic

FORMAT_VERSION = 2  # 1: without files, config and sum


def to_bytes(data: dict[str, Any]) -> bytes:
    """The JSON text as qkit writes it: the same bytes for equal values."""
    return (json.dumps(data, indent=2, sort_keys=True, ensure_ascii=True, allow_nan=False) + "\n").encode()


def write_record(folder: Path, record: dict[str, Any]) -> str:
    """Write qkit.json with its sum; returns the sha256 of the file. Raises IOFailure."""
    unsummed = {key: value for key, value in record.items() if key != "sum"}
    digest = sha256(json.dumps(unsummed, sort_keys=True, ensure_ascii=True, allow_nan=False).encode()).hexdigest()
    data = to_bytes({**unsummed, "sum": digest})
    write_atomic(folder / RECORD, data)
    return sha256(data).hexdigest()


def packed_record(out: Path) -> dict[str, Any]:
    """qkit.json of the packed weights in ``out``, which may be a pipeline. Raises BadCheckpoint where there is none."""
    record = read_record(weights_folder(out))
    if record is None:
        raise BadCheckpoint(f"{weights_folder(out) / RECORD}: no such file: this folder is not a result of qkit")
    return record


def add_to_record(out: Path, key: str, value: Any) -> None:
    """Set an entry of the record of the packed weights in ``out``, and the sum of that record in the one around it."""
    digest = write_record(weights_folder(out), {**packed_record(out), key: value})
    if is_pipeline(out):
        around = load_json(out / RECORD, "record", RECORD_LIMIT)
        write_record(out, {**around, "files": {**around["files"], f"{DENOISER}/{RECORD}": digest}})
