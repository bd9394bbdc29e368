"""A cache of slow measurements, written as they are made, so that a stopped command continues where it was."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from qkit.errors import BadCheckpoint, BadInput, JobConflict, write_failure
from qkit.files.owned import check_file
from qkit.files.safefile import parse_json


class ResultCache:
    """Measured values by key, in a file of JSON lines that are appended and synced one by one; a torn last line is dropped.

    identity: what all values depend on, by the name that a user knows it by. Raises JobConflict for a file of another
    identity, BadInput for one that is damaged; neither is touched.
    """

    def __init__(self, path: Path, identity: dict[str, Any]) -> None:
        self._path = path
        check_file(path)
        raw = path.read_bytes() if path.is_file() else b""
        complete = raw.rpartition(b"\n")[0]
        if not complete and not _line({"identity": identity}).startswith(raw):
            raise BadInput(f"{path}: not a file of measurements of qkit: choose another folder, or move the file away")
        recorded, self._known = _read(complete, path) if complete else (identity, {})
        differing = next((k for k in dict.fromkeys((*identity, *recorded)) if recorded.get(k) != identity.get(k)), None)
        if differing is not None:
            raise JobConflict(
                f"{path.parent}: what is there was measured with another {differing}: {recorded.get(differing)} there, "
                f"{identity.get(differing)} now: choose another folder, or delete this one"
            )
        content = complete + b"\n" if complete else _line({"identity": identity})
        if content != raw:
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(content)
            except OSError as e:
                raise write_failure(path, e) from e

    def get(self, key: str) -> Any:
        """The value of a key, or None."""
        return self._known.get(key)

    def put(self, key: str, value: Any) -> None:
        """Adds a value; it is durable when this returns."""
        try:
            with self._path.open("ab") as f:
                f.write(_line({"key": key, "value": value}))
                f.flush()
                os.fsync(f.fileno())
        except OSError as e:
            raise write_failure(self._path, e) from e
        self._known[key] = value


def _read(complete: bytes, path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """(identity, values)."""
    try:
        first, *entries = (parse_json(line, str(path)) for line in complete.split(b"\n"))
        return dict(first["identity"]), {line["key"]: line["value"] for line in entries}
    except (BadCheckpoint, KeyError, TypeError, ValueError) as e:
        raise BadInput(f"{path}: damaged: {e}: delete this file, and run the command again") from e


def _line(data: dict[str, Any]) -> bytes:
    return json.dumps(data, sort_keys=True).encode() + b"\n"
