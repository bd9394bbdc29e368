"""What an engine says that ran each layer, held against the layers that are packed in the file."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from qkit.engines.process import EngineAnswer
from qkit.files.folder import read_record

# Kernels that leave inputs in 16 bits whatever the scheme says, by parts of their names.
_INPUTS_KEPT = ("WNA16", "W4A16", "Marlin", "Machete", "Exllama", "AllSpark", "Conch")


def packed_names(out: Path) -> list[str]:
    """The layers that the record lists as packed; none for a folder that qkit did not write."""
    record = read_record(out) if out.is_dir() else None
    return [] if record is None else list(record.get("linears") or {})


def kernels_of(answer: EngineAnswer) -> dict[str, int]:
    """What runs the layers, and how many of them, most first."""
    names = Counter(
        f"{used.get('scheme') or _plain(used)}: {used['kernel']}"
        if "kernel" in used
        else used.get("scheme") or _plain(used)
        for used in answer.layers.values()
    )
    return dict(names.most_common())


def _plain(used: Mapping[str, str]) -> str:
    return used.get("method") or used["class"]


def unquantized(answer: EngineAnswer, packed: Sequence[str]) -> list[str]:
    """Layers that are packed in the file and that the engine runs as plain ones."""
    joined = {part: whole for whole, parts in answer.joined.items() for part in parts}
    found = []
    for name in packed:
        used = _layer(name, answer.layers, joined)
        if used is not None and "scheme" not in used and "Unquantized" in used.get("method", "Unquantized"):
            found.append(name)
    return found


def _layer(name: str, layers: Mapping[str, Mapping[str, str]], joined: Mapping[str, str]) -> Mapping[str, str] | None:
    """What runs a layer of the file: under its own name, that of the layer that it is a part of, or that of the experts that
    hold it; names may begin in another way in the engine."""
    parent, _, leaf = name.rpartition(".")
    names = [name, f"{parent}.{joined.get(leaf, leaf)}"]
    while parent:
        names.append(parent)
        parent = parent.rpartition(".")[0]
    for wanted in names:
        if wanted in layers:
            return layers[wanted]
        first = next((i for i, part in enumerate(wanted.split(".")) if part.isdigit()), None)
        end = None if first is None else "." + ".".join(wanted.split(".")[first:])
        fitting = [] if end is None else [layer for layer in layers if layer.endswith(end)]
        if len(fitting) == 1:
            return layers[fitting[0]]
    return None


def notes_of(out: Path, answer: EngineAnswer) -> list[str]:
    """What else one should know of how the engine ran the file."""
    notes = []
    record = (read_record(out) if out.is_dir() else None) or {}
    rounded = any(linear.get("activations") for linear in (record.get("linears") or {}).values())
    kernels = {
        used["kernel"] for used in answer.layers.values() if "kernel" in used and "A16" not in used.get("scheme", "")
    }
    kept = sorted(k for k in kernels if any(part in k for part in _INPUTS_KEPT))
    if rounded and kept:
        notes.append(f"{', '.join(kept)} leaves the inputs of layers in 16 bits, and the file says to round them")
    if answer.unused:
        more = f" (and {len(answer.unused) - 1} more)" if len(answer.unused) > 1 else ""
        notes.append(f"it does not use {answer.unused[0]}{more}")
    return notes
