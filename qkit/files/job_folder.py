"""The rules for job folders: how one is recognised, who may work in it, and which of its files are removed.

A folder is used when it is empty or its job.json says that it is a job folder. Any other is refused untouched, and so are
links in a job folder. Only files with the names below are ever removed.
"""

from __future__ import annotations

import fcntl
import os
import re
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from qkit.errors import BadInput, JobConflict, UsageError, write_failure
from qkit.files.folder import list_names
from qkit.files.owned import check_file, check_folder, is_temp, remove_files
from qkit.files.safefile import parse_json, read_bytes, shown

VERSION = 2
KIND = "qkit job"  # in job.json: the folder says itself what it is
FILES = ("job.json", "journal.jsonl", "lock", "source", "export.json")
FOLDERS = ("parts", "rows", "components")
_PART = re.compile(r"(\d{4,}|written|experts)\.safetensors")
_ROWS = re.compile(r"\d{4,}(-original)?\.bin")


def remove_job(path: Path) -> None:
    """Remove a job folder: the files that a job makes, and what is empty then. Raises as ``Job.open`` for a folder that is no
    job's, or in use."""
    if not path.exists():
        return
    refuse_foreign(path)
    try:
        with locked(path):
            remove_bulk(path)
            remove_files(path, [*(n for n in list_names(path) if is_temp(n)), *(f for f in FILES if f != "job.json")])
            remove_files(path, ["job.json"])  # the last: until then the folder says what it is
    except OSError as e:
        raise write_failure(path, e) from e


def refuse_foreign(path: Path) -> None:
    """Raises UsageError for what is there and is no job folder, BadInput for links and the like in one; touches nothing."""
    if not os.path.lexists(path):
        return
    if not path.is_dir():
        raise UsageError(f"{path}: the job folder is not a folder: choose another with --work")
    names = list_names(path)
    own_names = {
        n for n in names if n == "lock" or is_temp(n)
    }  # all that a run that was killed at its very start leaves
    is_starting = "lock" not in own_names or _is_lock(path / "lock")
    if "job.json" not in names and (
        set(names) - own_names or not is_starting or (own_names and "lock" not in own_names)
    ):
        stranger = next((n for n in names if n not in own_names), names[0])
        raise UsageError(
            f"{path}: it holds {shown(stranger)} and no job.json, so it is not a job folder of qkit: choose another with "
            "--work, or move it away"
        )
    for name in FILES:
        check_file(path / name)
    for name in FOLDERS:
        check_folder(path / name)
        if name != "components" and name in names:
            for inside in list_names(path / name):
                if _PART.fullmatch(inside) or _ROWS.fullmatch(inside) or is_temp(inside):
                    check_file(path / name / inside)
    if "job.json" in names:
        read_job(path / "job.json")


def _is_lock(file: Path) -> bool:
    """Whether it can be the lock of a job: qkit writes one short line."""
    check_file(file)
    content = read_bytes(file, 1 << 20)
    return not content or re.fullmatch(rb"pid \d+ on [^\n]*", content) is not None


def read_job(file: Path) -> dict[str, Any]:
    """The identity in a job.json, and 'finished' of a job that is done. Raises BadInput."""
    content = parse_json(read_bytes(file, 1 << 28), str(file))
    if not isinstance(content, dict) or content.pop("kind", None) != KIND or content.pop("version", None) != VERSION:
        raise BadInput(
            f"{file}: not the job file of this version of qkit (it is damaged, of another version or of another program): "
            "choose another --work folder, or move this one away"
        )
    return content


def parts_in(path: Path) -> list[Path]:
    """The files with finished parts in a job folder."""
    folder = path / "parts"
    return [folder / n for n in list_names(folder) if _PART.fullmatch(n)] if folder.is_dir() else []


def remove_bulk(path: Path) -> None:
    """Remove parts and rows of a job folder. Raises OSError."""
    remove_files(path / "parts", [p.name for p in parts_in(path)])
    rows = path / "rows"
    if rows.is_dir():
        remove_files(rows, [n for n in list_names(rows) if _ROWS.fullmatch(n) or is_temp(n)])


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """The lock of a job folder, held until the process ends, however it ends: the kernel releases it."""
    file = path / "lock"
    check_file(file)
    try:
        handle = os.open(file, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
    except OSError as e:
        raise write_failure(file, e) from e
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as e:
            holder = os.pread(handle, 200, 0).decode(errors="replace").strip() or "unknown"
            raise JobConflict(f"{path} is in use by another process ({holder}): wait for it") from e
        try:
            os.ftruncate(handle, 0)
            os.pwrite(handle, f"pid {os.getpid()} on {socket.gethostname()}".encode(), 0)
        except OSError as e:
            raise write_failure(file, e) from e
        yield
    finally:
        os.close(handle)
