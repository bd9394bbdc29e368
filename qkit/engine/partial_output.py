"""OUT.partial: where one process builds a result, until the folder is renamed to OUT.

The process holds a lock on the folder itself, so that no other command writes there, and the kernel gives it up however the
process ends. The job folder lists the files before they are written: what a killed run left is removed by that list, and a
folder with anything else in it is refused.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from qkit.errors import JobConflict, write_failure
from qkit.files.owned import check_folder, files_below, is_temp, remove_files
from qkit.files.safefile import parse_json, read_bytes, shown, write_atomic

LISTING = "export.json"  # of a job folder


class Partial:
    """The claimed folder. Use ``Partial.claim`` as a context manager."""

    def __init__(self, path: Path, listing: Path, state: os.stat_result) -> None:
        self.path = path
        self._listing = listing
        self._identity = {"folder": str(path.resolve()), "device": state.st_dev, "inode": state.st_ino}

    @classmethod
    @contextmanager
    def claim(cls, out: Path, work: Path) -> Iterator[Partial]:
        """Make OUT.partial, or go on with the one that the job in ``work`` made; it is empty or holds listed files then.

        Raises JobConflict where another process holds it, or where something is in it that this job did not list;
        BadInput for a link; IOFailure.
        """
        path = partial_path(out)
        handle = _hold(path, out)
        try:
            state = os.fstat(handle)
            partial = cls(path, work / LISTING, state)
            stranger = next((n for n in files_below(path) if n not in partial._listed()), None)
            if stranger is not None:
                raise JobConflict(
                    f"{path}: it holds {shown(stranger)}, which this job did not write: another run left it, or it is yours; "
                    "move the folder away, or choose another --out"
                )
            yield partial
        finally:
            with suppress(OSError):  # of a run that built nothing
                if os.path.samestat(os.lstat(path), os.fstat(handle)):
                    os.rmdir(path)
            os.close(handle)

    def _listed(self) -> set[str]:
        """Files that the job said it would write, and their unfinished copies."""
        if not self._listing.exists():
            return set()
        content: Any = parse_json(read_bytes(self._listing, 1 << 28), str(self._listing))
        if not isinstance(content, dict) or {k: content.get(k) for k in self._identity} != self._identity:
            return set()
        listed = {str(n) for n in content.get("files", ())}
        unfinished = {n for n in files_below(self.path) if is_temp(Path(n).name)}
        return listed | unfinished

    def begin(self, names: Iterable[str]) -> None:
        """Empty the folder and list what is written next: names of files, relative to it. Raises IOFailure."""
        try:
            remove_files(self.path, self._listed(), keep=True)
        except OSError as e:
            raise write_failure(self.path, e) from e
        write_atomic(self._listing, json.dumps({**self._identity, "files": sorted(names)}, indent=1).encode())

    @property
    def nbytes(self) -> int:
        """Bytes of the files that are in it now."""
        return sum(os.lstat(self.path / n).st_size for n in files_below(self.path))


def partial_path(out: Path) -> Path:
    """Where the result is built, beside its final place."""
    return out.with_name(out.name + ".partial")


def _hold(path: Path, out: Path) -> int:
    """A handle of the folder, made if it is not there, with a lock on it."""
    while True:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with suppress(FileExistsError):
                os.mkdir(path)
            check_folder(path)
            handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except FileNotFoundError:
            continue  # another process gave it its final name meanwhile
        except OSError as e:
            raise write_failure(path, e) from e
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as e:
            os.close(handle)
            raise JobConflict(
                f"{path} is in use by another process that writes to {out}: wait for it, or choose another --out"
            ) from e
        with suppress(FileNotFoundError):
            if os.path.samestat(os.lstat(path), os.fstat(handle)):
                return handle
        os.close(handle)
