"""Where a model is: a folder, a reference model that travels with qkit, or the hub."""

from __future__ import annotations

from pathlib import Path

from qkit.errors import BadCheckpoint, QkitError
from qkit.folder import RECORD, weights_folder
from qkit.safefile import parse_json, write_atomic

SOURCE_FILE = "source"  # in the job folder: where the original was; the output itself names no local path


def find_model(model: str) -> Path:
    """A folder, the name of a reference model, or a hub id (downloaded, safetensors and JSON only).

    Raises BadCheckpoint when it is none of them.
    """
    import qkit_data

    path = Path(model)
    if path.is_dir():
        return path
    embedded: Path | None = qkit_data.model_path(model)
    if embedded is not None:
        return embedded
    if model.count("/") != 1 or model.startswith(("/", ".", "~")) or path.exists():
        names = ", ".join(qkit_data.models())
        raise BadCheckpoint(
            f"{model}: no such model folder, and not a reference model ({names}) or a hub id (owner/name)"
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

    wanted = ["*.safetensors", "*.json", "tokenizer*", "*.model", "merges.txt", "*.jinja"]
    try:
        return Path(snapshot_download(model, allow_patterns=wanted))
    except (HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError, OSError) as e:
        raise BadCheckpoint(
            f"{model}: no such folder, and as the id of a model on the hub it was not to be had: {str(e).splitlines()[0]}"
        ) from e


def record_source(job: Path, source: Path) -> None:
    """Note in a job folder where its model came from."""
    write_atomic(job / SOURCE_FILE, str(source.resolve()).encode())


def recorded_source(out: Path) -> Path | None:
    """The original of a packed folder, if it is where the job beside it says, or is a reference model; else None.

    Believed only if its fingerprint is the one that qkit.json records.
    """
    import qkit_data

    from qkit.checkpoint import Checkpoint  # brings torch, which finding a folder does not need

    record = weights_folder(out) / RECORD
    if not record.is_file():
        return None
    wanted = parse_json(record.read_bytes(), str(record)).get("source", {}).get("fingerprint")
    note = out.with_name(out.name + ".job") / SOURCE_FILE
    candidates = [Path(note.read_text())] if note.is_file() else []
    candidates += [path for name in qkit_data.models() if (path := qkit_data.model_path(name)) is not None]
    for path in candidates:
        try:
            if path.is_dir() and Checkpoint.open(weights_folder(path)).fingerprint() == wanted:
                return path
        except QkitError:
            continue
    return None
