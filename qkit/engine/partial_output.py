"""OUT.partial: where one process builds a result, until the folder is renamed to OUT.

The process holds a lock on the folder itself, so no other command writes there; the kernel releases it however the process
ends.
The job folder lists the files before they are written. Files of a killed run are removed by that list, and a folder with any
other file is refused.
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
        """Create OUT.partial, or claim the one that the job in ``work`` made. It is empty or holds listed files.

        Raises JobConflict where another process holds it, or it has a file that this job did not list; BadInput for a
        link; IOFailure.
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
        """Files that the job listed before writing them, and their unfinished copies."""
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
        """Bytes of the files in the folder now."""
        return sum(os.lstat(self.path / n).st_size for n in files_below(self.path))


def partial_path(out: Path) -> Path:
    """Path of the folder in which a result is built, beside its final path."""
    return out.with_name(out.name + ".partial")


def _hold(path: Path, out: Path) -> int:
    """A locked handle of the folder, which is created if it does not exist."""
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
