"""Where a model is: a folder, a reference model that travels with qkit, or the hub."""

from __future__ import annotations

from pathlib import Path

from qkit.errors import BadCheckpoint


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
        raise BadCheckpoint(f"{model}: no such folder, and the hub did not give it: {str(e).splitlines()[0]}") from e
