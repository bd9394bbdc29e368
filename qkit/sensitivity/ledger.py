"""Measurements that took time, kept as they are made: a stopped command goes on where it was."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from qkit.errors import write_failure
from qkit.safefile import parse_json


class Ledger:
    """{key: JSON value} in a file of lines, appended and synced one by one; a torn last line is dropped.

    identity: what all values depend on; a file of another identity is started anew.
    """

    def __init__(self, path: Path, identity: str) -> None:
        self._path = path
        self._known: dict[str, Any] = {}
        raw = path.read_bytes() if path.exists() else b""
        whole = raw.rpartition(b"\n")[0]
        lines = [parse_json(line, str(path)) for line in whole.split(b"\n")] if whole else []
        if lines and lines[0] == {"identity": identity}:
            self._known = {line["key"]: line["value"] for line in lines[1:]}
            content = whole + b"\n"
        else:
            content = _line({"identity": identity})
        if content != raw:
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(content)
            except OSError as e:
                raise write_failure(path, e) from e

    def get(self, key: str) -> Any:
        """The value, or None."""
        return self._known.get(key)

    def put(self, key: str, value: Any) -> None:
        """Durable when this returns."""
        try:
            with self._path.open("ab") as f:
                f.write(_line({"key": key, "value": value}))
                f.flush()
                os.fsync(f.fileno())
        except OSError as e:
            raise write_failure(self._path, e) from e
        self._known[key] = value


def _line(data: dict[str, Any]) -> bytes:
    return json.dumps(data, sort_keys=True).encode() + b"\n"
