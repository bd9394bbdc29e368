"""The sources of texts for a measurement.

A text is given as a path, as ``NAME=path`` to choose the name it goes by, or as ``dataset:NAME[:config][:split]
[:column]`` for a data set of the ``datasets`` package (a hub id or a local folder; its rows are joined by blank lines).
"""

from __future__ import annotations

from pathlib import Path

from qkit.errors import BadInput, Unsupported, UsageError
from qkit.files.text_file import TextFile


def text_name(spec: Path | str) -> str:
    """The name a text goes by. Raises BadInput for a file that is not there, UsageError for a bad data set."""
    if is_dataset(spec):
        name, config, _, _ = _dataset_parts(str(spec))
        return Path(name).name if config is None else f"{Path(name).name}-{config}"
    return _named_file(spec)[0]


def read_text(spec: Path | str) -> str:
    """The content of a text. Raises BadInput when it cannot be read, Unsupported without the datasets package."""
    if is_dataset(spec):
        return _read_dataset(str(spec))
    return text_file(spec).text()[0]


def text_file(spec: Path | str) -> TextFile:
    """The text file of a specification. Raises BadInput for one that is not there."""
    return TextFile(_named_file(spec)[1], "text")


def _named_file(spec: Path | str) -> tuple[str, Path]:
    path = Path(spec)
    name = path.stem
    if isinstance(spec, str) and "=" in spec and not path.exists():
        name, _, file = spec.partition("=")
        path = Path(file)
    if not path.exists():
        raise BadInput(f"text {path}: there is no such file; use the path of a text file")
    if not path.is_file():
        raise BadInput(f"text {path}: found a folder, a pipe or a device; use the path of a text file")
    return name, path


def is_dataset(spec: Path | str) -> bool:
    """Whether a text is a data set of the ``datasets`` package, not a file."""
    return isinstance(spec, str) and spec.startswith("dataset:")


def _dataset_parts(spec: str) -> tuple[str, str | None, str, str]:
    """(name, config, split, column)"""
    parts = spec.split(":")[1:]
    if not parts[0] or len(parts) > 4:
        raise UsageError(f"{spec!r} is not a data set; write dataset:NAME[:config][:split][:column]")
    name, config, split, column = [*parts, "", "", ""][:4]
    return name, config or None, split or "test", column or "text"


def _read_dataset(spec: str) -> str:
    name, config, split, column = _dataset_parts(spec)
    try:
        import datasets
    except ImportError as error:
        raise Unsupported(f"{spec} needs the datasets package: pip install qkit[eval]") from error
    try:
        rows = datasets.load_dataset(name, config, split=split)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise BadInput(
            f"data set {name!r} (config {config}, split {split}) cannot be loaded: {first_line(error)}; "
            "check its name and the network, or use a text file"
        ) from error
    if column not in rows.column_names:
        raise BadInput(f"data set {name!r} has no column {column!r}; it has {', '.join(rows.column_names)}")
    return "\n\n".join(str(row) for row in rows[column])


def first_line(error: Exception) -> str:
    """The first line of another library's message, as a part of a sentence."""
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__
