"""The page of language models: the figures, the layers that rounding changed most, and the answers to fixed prompts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qkit.errors import QkitError
from qkit.files.folder import RECORD, load_json
from qkit.report.page import page

_LAYERS = 20  # with the largest errors, that the page names


def text_page(measured: Sequence[Mapping[str, Any]], folders: Sequence[Path], tables: Sequence[Any]) -> str:
    """The page of one or more models (each as ``qkit.evaluation.measure`` gives it); folders: of the same models.

    tables: what the terminal shows, {"title", "columns", "rows"} each. What a folder records of its layers is read from its
    qkit.json; a folder without one has no such table.
    """
    layers = [
        {"model": figures["model"], "rows": top_layers(folder)}
        for figures, folder in zip(measured, folders, strict=True)
    ]
    prompts = [p["prompt"] for p in measured[0].get("continuations", [])]
    baseline = measured[0]["baseline"]
    continuations = []
    for i, prompt in enumerate(prompts):
        entries = [figures["continuations"][i] for figures in measured]
        continuations.append(
            {
                "prompt": prompt,
                "baseline": entries[0].get("baseline_said"),
                "said": [
                    {"text": e["said"], "differs": baseline is not None and e["said"] != e["baseline_said"], **e}
                    for e in entries
                ],
            }
        )
    continuations.sort(key=lambda row: not any(x["differs"] for x in row["said"]))
    return page(
        "text",
        models=[figures["model"] for figures in measured],
        baseline=baseline,
        tables=list(tables),
        layers=[entry for entry in layers if entry["rows"]],
        said=continuations,
        differing=sum(any(x["differs"] for x in row["said"]) for row in continuations),
    )


def top_layers(folder: Path, count: int = _LAYERS) -> list[dict[str, Any]]:
    """The layers whose outputs rounding changed most, by the record of the folder: {"name", "scheme", "solver", "error",
    "baseline_error"}, the largest error first. Empty where there is no record that can be read."""
    try:
        record = load_json(folder / RECORD, "record", 1 << 28)
    except QkitError:
        return []
    linears = record.get("linears") if isinstance(record, dict) else None
    if not isinstance(linears, dict):
        return []
    layers: list[dict[str, Any]] = [
        {
            "name": str(name),
            "scheme": str(entry.get("scheme")),
            "solver": str(entry.get("solver")),
            "error": float(entry["error"]),
            "baseline_error": entry.get("baseline_error"),
        }
        for name, entry in linears.items()
        if isinstance(entry, dict) and isinstance(entry.get("error"), (int, float))
    ]
    return sorted(layers, key=lambda x: (-x["error"], x["name"]))[:count]
