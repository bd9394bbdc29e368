"""The rule for qkit's own files: in a folder that a user can name, no other file is opened for writing or removed.

A folder of qkit says so itself, in a file of JSON, and lists or names by a fixed rule what belongs to it. What is not on
the list stays where it is, and a link is never followed on the way to a file that is written.
"""

from __future__ import annotations

import hashlib
import os
import re
import stat
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path

from qkit.errors import BadInput, IOFailure
from qkit.files.safefile import TEMP_PREFIX

_TEMP = re.compile(re.escape(TEMP_PREFIX) + r"[0-9a-f]{16}")


def is_temp(name: str) -> bool:
    """Whether qkit gives such a name to a file that is not finished."""
    return _TEMP.fullmatch(name) is not None


def temp_path(folder: Path, label: str) -> Path:
    """The place of an intermediate file: the same one for the same label."""
    return folder / (TEMP_PREFIX + hashlib.sha256(label.encode()).hexdigest()[:16])


def check_file(path: Path) -> None:
    """Raises BadInput for what is there and is no regular file of its own: a link, a second name of a file, a pipe."""
    _check(path, stat.S_ISREG, "a regular file")


def check_folder(path: Path) -> None:
    """Raises BadInput for what is there and is no folder: a link to one, or a file."""
    _check(path, stat.S_ISDIR, "a folder")


def _check(path: Path, fits: Callable[[int], bool], expected: str) -> None:
    try:
        state = os.lstat(path)
    except FileNotFoundError:
        return
    except OSError as e:
        raise IOFailure(f"cannot look at {path}: {e.strerror or e}: check the permissions") from e
    if stat.S_ISLNK(state.st_mode):
        kind = "a symbolic link"
    elif not fits(state.st_mode):
        kind = "something else"
    elif stat.S_ISREG(state.st_mode) and state.st_nlink > 1:
        kind = "a file with a second name (a hard link)"
    else:
        return
    raise BadInput(f"{path}: found {kind}, expected {expected} that qkit wrote: remove it, or choose another folder")


def files_below(folder: Path) -> list[str]:
    """Names of all that is below a folder and is no folder, relative to it, sorted; links are not followed.

    Raises IOFailure.
    """

    def refuse(error: OSError) -> None:
        raise IOFailure(f"cannot list {folder}: {error.strerror}: check the permissions") from error

    names: list[str] = []
    for place, folders, files in os.walk(folder, onerror=refuse):
        below = Path(place).relative_to(folder)
        names += [str(below / n) for n in files]
        names += [str(below / n) for n in folders if os.path.islink(os.path.join(place, n))]
    return sorted(names)


def remove_files(folder: Path, names: Iterable[str], keep: bool = False) -> None:
    """Remove these files below a folder, and then the folders that are empty, also the folder itself unless ``keep``.

    names: relative to the folder. Whatever else is there stays. Raises OSError for a file that cannot be removed.
    """
    if os.path.islink(folder):
        return
    for name in names:
        path = folder / name
        with suppress(FileNotFoundError, NotADirectoryError):
            if not any(parent.is_symlink() for parent in path.parents if parent.is_relative_to(folder)):
                os.unlink(path)
    for place, folders, _ in os.walk(folder, topdown=False):
        for name in folders:
            with suppress(OSError):  # not empty, or a link
                os.rmdir(os.path.join(place, name))
    with suppress(OSError):
        if not keep:
            os.rmdir(folder)
