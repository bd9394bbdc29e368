"""The errors of other libraries on file content, as errors of qkit.

What only another library can judge (a config for transformers, a tokenizer) goes through ``foreign_errors``.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from qkit.errors import BadCheckpoint, QkitError
from qkit.files.safefile import shown

AGAIN = "get the file again from its source"


@contextmanager
def foreign_errors(label: str, advice: str = AGAIN, error: type[QkitError] = BadCheckpoint) -> Iterator[None]:
    """The context for calls of another library on file content: its errors become errors of qkit. label: file and fault, for
    the message.

    Such libraries raise anything at all for a hostile file, a full memory and too deep a recursion included, and panics of
    Rust, which are no Exceptions: all of it means that the file cannot be used. Errors of qkit pass. No code of qkit
    belongs in here, for its faults would be called the file's.
    """
    try:
        yield
    except (QkitError, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as e:
        raise error(f"{label}: {reason(e)}: {advice}") from e


def reason(failure: BaseException) -> str:
    """The message of another library's exception, in one short line."""
    if isinstance(failure, MemoryError):
        return "it needs more memory than there is"
    if isinstance(failure, RecursionError):
        return "nested too deep"
    lines = [line.strip().rstrip(".:,;") for line in str(failure).splitlines() if line.strip()]
    first = " ".join(lines[:2]) if isinstance(failure, ValueError) and len(lines) > 1 else (lines or [""])[0]
    named = first if " " in first else f"{type(failure).__name__} {first}".strip()
    return shown(named, 200)[1:-1] if not named.isprintable() else named[:200]
