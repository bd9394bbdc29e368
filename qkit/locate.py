"""Where a model is: a folder, a reference model that travels with qkit, or the hub."""

from __future__ import annotations

import os
import re
from pathlib import Path

from qkit.checkpoint import Checkpoint
from qkit.errors import BadCheckpoint, QkitError
from qkit.folder import read_record, refuse_gguf, weights_folder
from qkit.safefile import write_atomic
from qkit.schema import foreign

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", re.ASCII)
SOURCE_FILE = "source"  # in the job folder: where the original was; the output itself names no local path


def find_model(model: str) -> Path:
    """A folder, the name of a reference model, or a hub id (downloaded, safetensors and JSON only).

    Raises BadCheckpoint when it is none of them.
    """
    import qkit_data

    path = Path(model)
    if not model:
        raise BadCheckpoint("'': that names no model: give a model folder, a reference model or a hub id")
    if path.is_dir():
        return path
    if path.is_file():
        if path.suffix == ".gguf":
            refuse_gguf(path)
        raise BadCheckpoint(f"{path}: a file, expected the folder of a model: give the folder that it lies in")
    embedded: Path | None = qkit_data.model_path(model)
    if embedded is not None:
        return embedded
    if not HUB_ID.fullmatch(model) or ".." in model or path.exists():
        names = ", ".join(qkit_data.models())
        raise BadCheckpoint(
            f"{model}: no such model folder, and not a reference model ({names}) or a hub id (owner/name)"
        )
    from huggingface_hub import snapshot_download

    wanted = ["*.safetensors", "*.json", "tokenizer*", "*.model", "merges.txt", "*.jinja"]
    fault = f"{model}: no such folder, and as the id of a model on the hub it was not to be had"
    with foreign(fault, "check the name and the network"):
        return Path(snapshot_download(model, allow_patterns=wanted))


def record_source(job: Path, source: Path) -> None:
    """Note in a job folder where its model came from."""
    write_atomic(job / SOURCE_FILE, str(source.resolve()).encode())


def recorded_source(out: Path) -> Path | None:
    """The original of a packed folder, if it is where the job beside it says, or is a reference model; else None.

    Believed only if its fingerprint is the one that qkit.json records.
    """
    import qkit_data

    record = read_record(weights_folder(out))
    if record is None:
        return None
    wanted = record.get("source", {}).get("fingerprint")
    note = out.with_name(out.name + ".job") / SOURCE_FILE
    candidates = [Path(os.fsdecode(note.read_bytes()))] if note.is_file() else []
    candidates += [path for name in qkit_data.models() if (path := qkit_data.model_path(name)) is not None]
    for path in candidates:
        try:
            if path.is_dir() and Checkpoint.open(weights_folder(path)).fingerprint() == wanted:
                return path
        except QkitError:
            continue
    return None
