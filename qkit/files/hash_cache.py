"""A cache of the sha256 of large files, kept from one run to the next.

What is kept is a file in the user's cache folder (XDG_CACHE_HOME/qkit/sha256), one for each file that was read. It is
believed while path, size, device, inode and both times of the file are what they were; anything else, damage included,
means that the file is read again. Nothing depends on the cache but time.
"""

from __future__ import annotations

import json
import os
import time
from contextlib import suppress
from hashlib import sha256
from pathlib import Path
from typing import Any

from qkit.errors import BadCheckpoint, QkitError
from qkit.files.safefile import read_bytes, sha256_file, write_atomic

SETTLED = 100_000_000  # ns; a file changed this short before it was read could change again and keep its times
_LIMIT = 1 << 16


def cached_sha256(file: Path) -> str:
    """The sha256 of every byte of a file, in hex, read now or kept from before. Raises BadCheckpoint, IOFailure."""
    state, read_at = _state(file), time.time_ns()
    entry = _entry(state["path"])
    cached = _read(entry)
    if cached is not None and {**cached, "sha256": None} == {**state, "sha256": None}:
        return str(cached["sha256"])
    digest = sha256_file(file)
    settled = read_at - max(state["mtime_ns"], state["ctime_ns"]) > SETTLED
    if settled and _state(file) == state:
        with suppress(OSError, QkitError):  # a cache that cannot be written is none
            entry.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(entry, json.dumps({**state, "sha256": digest}).encode())
    return digest


def _entry(path: str) -> Path:
    """Where the hash of that file is kept."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    caches = Path(base if os.path.isabs(base) else os.path.expanduser("~/.cache"))
    return caches.absolute() / "qkit" / "sha256" / f"{sha256(path.encode()).hexdigest()}.json"


def _state(file: Path) -> dict[str, Any]:
    try:
        real = file.resolve(strict=True)
        status = os.stat(real)
    except (OSError, RuntimeError) as error:  # RuntimeError: a loop of links, before Python 3.13
        raise BadCheckpoint(f"{file}: cannot be read ({error}): check that the model folder is complete") from error
    return {
        "path": os.fsencode(real).hex(),
        "size": status.st_size,
        "device": status.st_dev,
        "inode": status.st_ino,
        "mtime_ns": status.st_mtime_ns,
        "ctime_ns": status.st_ctime_ns,
    }


def _read(entry: Path) -> dict[str, Any] | None:
    """What was kept, if it is there and whole."""
    try:
        cached = json.loads(read_bytes(entry, _LIMIT))
        digest = cached["sha256"]
        sound = isinstance(digest, str) and len(digest) == 64 and int(digest, 16) >= 0
    except (OSError, QkitError, ValueError, KeyError, TypeError, RecursionError):
        return None
    return cached if sound else None
