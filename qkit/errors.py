"""Every way qkit can fail, each with its exit code.

An error message is one sentence that names what is wrong, where (file and tensor or field), what was
found against what was expected, and what to do. The command line prints it without a traceback.
"""

from __future__ import annotations

import errno
import shutil
from contextlib import suppress
from pathlib import Path


class QkitError(Exception):
    """Base of all errors that qkit raises on purpose."""

    exit_code = 1


class RenamedWarning(FutureWarning):
    """An option under its former name, which goes on working for one version."""


class UsageError(QkitError):
    """The command or the call cannot be carried out as it is written."""

    exit_code = 2


class BadInput(QkitError):
    """An input of qkit is wrong."""

    exit_code = 3


class BadCheckpoint(BadInput):
    """A model folder or one of its files is damaged, incomplete, ambiguous or unsafe."""


class BadRecipe(BadInput):
    """A recipe or a budget file cannot be understood."""


class BadCalibration(BadInput):
    """The calibration data cannot be used: it is too short, unreadable, or outside the vocabulary."""


class Unsupported(BadInput):
    """The input is sound, but qkit cannot do this with it."""


class NumericFailure(QkitError):
    """Values that are not finite, or too many layers that fell back to rounding."""

    exit_code = 4


class VerifyFailure(QkitError):
    """A packed checkpoint does not hold what it should."""

    exit_code = 4


class BudgetNotMet(QkitError):
    """A measured quality or size is outside its budget."""

    exit_code = 4


class IOFailure(QkitError):
    """Reading or writing failed: full disk, missing permission, input/output error."""

    exit_code = 5


class JobConflict(QkitError):
    """The job folder belongs to another job, or another process is working in it."""

    exit_code = 6


class Stopped(QkitError):
    """A signal asked the run to stop; the same command goes on from there."""

    exit_code = 75


def write_failure(path: Path, error: OSError, size: int | None = None) -> IOFailure:
    """The error for a file (of ``size`` bytes) that could not be written: what failed, and the room that there is where that is
    the cause."""
    if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return IOFailure(f"cannot write {path}: {error.strerror or error}: use a folder that can be written to")
    room = ""
    with suppress(OSError):
        needed = "" if size is None else f"{size} bytes are needed, "
        room = f" ({needed}{shutil.disk_usage(path.parent).free} are free)"
    return IOFailure(f"cannot write {path}: {error.strerror}{room}: free some space, then run the same command again")
