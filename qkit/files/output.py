"""The rules for output folders: where one may be, which of its files qkit wrote, and how a finished one gets its name.

A model is built in a folder of another name and renamed as the last step, so that a reader sees all of it or nothing. What
a folder holds beside the files that its own record lists is the user's, and is never removed.
"""

from __future__ import annotations

import os
import re
import secrets
from collections.abc import Collection
from errno import ENOTEMPTY
from pathlib import Path
from typing import Any

from qkit.errors import BadCheckpoint, IOFailure, UsageError
from qkit.files.folder import RECORD, list_names, load_json
from qkit.files.owned import files_below, remove_files
from qkit.files.safefile import shown, sync_dir

OLD_PREFIX = ".qkit-old-"
REJECTED = "qkit-rejected.json"  # what 'qkit check' leaves in a folder that is outside its budget
# Names of the files that qkit copied beside the weights before its record listed them all.
_UNLISTED = re.compile(
    r"(tokenizer.*\.json|.*\.model|.*\.tiktoken|tekken\.json|special_tokens_map\.json|added_tokens\.json|vocab\.json|vocab\.txt|"
    r"merges\.txt|chat_template.*\.(json|jinja)|generation_config\.json|.*processor_config\.json|config\.json|"
    r".*\.safetensors\.index\.json)"
)


def result_files(out: Path) -> set[str]:
    """Files that qkit wrote into a folder, by the record in it, relative to it; nothing where there is no record.

    Raises BadCheckpoint for a record that cannot be read.
    """
    if not (out / RECORD).is_file():
        return set()
    record: Any = load_json(out / RECORD, "record", 1 << 28)
    if not isinstance(record, dict):
        raise BadCheckpoint(f"{out / RECORD}: found a {type(record).__name__}, expected a JSON object")
    listed, shards, part = (record.get(key) for key in ("files", "shards", "pipeline"))
    names = {RECORD, REJECTED, *(listed if isinstance(listed, dict) else ())}
    if isinstance(part, str):
        names |= {f"{part}/{name}" for name in result_files(out / part)}
    elif isinstance(shards, dict) and not isinstance(listed, dict):
        names |= {*shards, *(n for n in list_names(out) if _UNLISTED.fullmatch(n))}
    return names


def remove_result(out: Path) -> None:
    """Remove the files that qkit wrote into a folder, and the folder if nothing else is in it.

    Raises OSError, BadCheckpoint.
    """
    remove_files(out, result_files(out))


def check_output_dir(out: Path, source: Path, overwrite: bool, replace: bool = True) -> None:
    """Refuses an output folder that would cost the user something.

    Never allowed: a link, something that is no folder, a folder that is, holds or lies in the input model, and
    one that holds the working or the home directory. A folder with content needs ``overwrite``, and where it will be
    replaced as a ``replace`` it has to be one that qkit made. Raises UsageError.
    """
    if os.path.islink(out):
        raise UsageError(
            f"{out}: the output folder is a symbolic link, expected a folder or a new name: choose another"
        )
    if os.path.exists(out) and not os.path.isdir(out):
        raise UsageError(f"{out}: the output exists and is not a folder: choose another name")
    for fault, inner, outer in (
        ("is or lies in the input model", out, source),
        ("holds the input model", source, out),
        ("holds the working directory", Path.cwd(), out),
        ("holds the home directory", Path("~").expanduser(), out),
    ):
        if _lies_in(inner, outer):
            raise UsageError(f"{out}: the output folder {fault}: choose another folder")
    filled = os.path.exists(out) and bool(list_names(out))
    if filled and not overwrite:
        raise UsageError(f"{out}: the output folder is not empty: choose another, or add --overwrite to replace it")
    if filled and replace:
        _refuse_strangers(out)


def _refuse_strangers(out: Path) -> None:
    """Raises UsageError for a folder with files that qkit did not write."""
    if not os.path.isfile(out / RECORD):
        raise UsageError(
            f"{out}: --overwrite replaces what qkit made, and there is no {RECORD} in it: choose another folder"
        )
    listed = result_files(out)
    stranger = next((n for n in files_below(out) if n not in listed), None)
    if stranger is not None:
        raise UsageError(
            f"{out}: --overwrite replaces what qkit made, and {shown(stranger)} is not on the list in its {RECORD}: move that "
            "file away, or choose another folder"
        )


def _lies_in(inner: Path, outer: Path) -> bool:
    """Whether inner is outer or below it, also through links and on a file system that ignores case."""
    real = Path(os.path.realpath(inner))
    places = (place for place in (real, *real.parents) if os.path.exists(place))
    return os.path.exists(outer) and any(os.path.samefile(place, outer) for place in places)


def commit_dir(partial: Path, out: Path, overwrite: bool) -> None:
    """Gives the finished folder ``partial`` its name ``out``, in the same parent, as one durable step.

    With ``overwrite`` a folder that is there is first renamed aside, and what qkit wrote into it is removed at the end; a
    crash in between leaves the old one under a name that starts with ``.qkit-old-``.
    Raises UsageError when ``out`` has content and may not be replaced, IOFailure.
    """
    if os.path.realpath(partial.parent) != os.path.realpath(out.parent):
        raise UsageError(f"{partial} and {out} are in different folders: build the output beside its final place")
    replaced = os.path.lexists(out)
    if replaced and (os.path.islink(out) or not os.path.isdir(out) or (list_names(out) and not overwrite)):
        raise UsageError(f"{out}: exists and is not an empty folder: choose another, or add --overwrite to replace it")
    if replaced and list_names(out):
        _refuse_strangers(out)
    old_files: Collection[str] = result_files(out) if replaced else ()
    aside = out.with_name(OLD_PREFIX + secrets.token_hex(8))
    try:
        _sync_tree(partial)
        if replaced:
            os.rename(out, aside)
        try:
            os.rename(partial, out)
        except OSError:
            if replaced:
                os.rename(aside, out)
            raise
        sync_dir(out.parent)
    except OSError as error:
        raise IOFailure(
            f"cannot rename {partial} to {out}: {error.strerror}: the finished model is in {partial}"
        ) from error
    try:
        if replaced:
            remove_files(aside, old_files)
        if os.path.lexists(aside):
            raise OSError(ENOTEMPTY, "it holds files that qkit did not write")
    except OSError as error:
        raise IOFailure(
            f"{out} is complete, but the old result in {aside} could not be removed: {error.strerror}: look at that folder"
        ) from error


def _sync_tree(folder: Path) -> None:
    for place, _, names in os.walk(folder):
        for name in names:
            handle = os.open(os.path.join(place, name), os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)
        sync_dir(Path(place))
