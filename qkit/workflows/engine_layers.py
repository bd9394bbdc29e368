"""What an engine says that ran each layer, held against the layers that are packed in the file."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
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
    found, joined = [], _joined(answer)
    for name in packed:
        place = place_of(name, answer.layers, joined)
        used = None if place is None else answer.layers[place]
        if used is not None and "scheme" not in used and "Unquantized" in used.get("method", "Unquantized"):
            found.append(name)
    return found


def _joined(answer: EngineAnswer) -> dict[str, str]:
    return {part: whole for whole, parts in answer.joined.items() for part in parts}


def place_of(name: str, layers: Collection[str], joined: Mapping[str, str]) -> str | None:
    """The layer that runs a linear of the file: under its own name, that of the layer that it is a part of, or that of the
    experts that hold it; names may begin in another way in the engine. joined: {part: the layer that has it}"""
    parent, _, leaf = name.rpartition(".")
    names = [name, f"{parent}.{joined.get(leaf, leaf)}"]
    while parent:
        names.append(parent)
        parent = parent.rpartition(".")[0]
    for wanted in names:
        if wanted in layers:
            return wanted
        first = next((i for i, part in enumerate(wanted.split(".")) if part.isdigit()), None)
        end = None if first is None else "." + ".".join(wanted.split(".")[first:])
        fitting = [] if end is None else [layer for layer in layers if layer.endswith(end)]
        if len(fitting) == 1:
            return fitting[0]
    return None


def with_inputs_kept(answer: EngineAnswer, rounding: Sequence[str]) -> dict[str, str]:
    """Those of the layers ``rounding``, whose inputs the file says to round, that the engine runs with inputs in 16 bits:
    {name: kernel}"""
    kept, joined = {}, _joined(answer)
    for name in rounding:
        place = place_of(name, answer.layers, joined)
        used = {} if place is None else answer.layers[place]
        kernel = used.get("kernel", "")
        if "inputs" not in used and any(part in kernel for part in _INPUTS_KEPT):
            kept[name] = kernel
    return kept


def notes_of(answer: EngineAnswer, kept: Mapping[str, str]) -> list[str]:
    """What else one should know of how the engine ran the file. kept: ``with_inputs_kept``"""
    notes = []
    if kept:
        kernels = ", ".join(sorted(set(kept.values())))
        notes.append(
            f"{kernels} leaves the inputs of {len(kept)} layers in 16 bits, and the file says to round them: qkit left them"
            " so too, to compare"
        )
    if answer.unused:
        more = f" (and {len(answer.unused) - 1} more)" if len(answer.unused) > 1 else ""
        notes.append(f"it does not use {answer.unused[0]}{more}")
    return notes
