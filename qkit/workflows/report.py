"""The figures that ``qkit report`` shows: those of a file of ``qkit eval`` that were measured on the weights in a folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qkit.errors import BadInput, UsageError
from qkit.files.folder import load_json

_LARGEST = 1 << 26  # bytes of a file of qkit eval
_NEEDED = {"model": str, "window": int, "size": dict}


def measured_of(results: Sequence[Mapping[str, Any]], files: Sequence[Path]) -> list[dict[str, Any]]:
    """The entry of each result (``report.result.result_facts``) in the files, the last one that has it.

    An entry belongs to a result if its sums of the weight files are the same, or, where it has none, by its name. Raises
    BadInput for a file that 'qkit eval' did not write, UsageError for a result that was not measured, or measured on other
    weights, and for results that were measured against different baselines or on different texts.
    """
    if not files:
        return []
    entries = [entry for file in files for entry in _entries(file)]
    found = [_entry_of(result, entries, files) for result in results]
    first = found[0]
    for result, entry in zip(results, found, strict=True):
        for what, said in (("baseline", str), ("texts", list), ("window", str)):
            if _basis(entry, what) != _basis(first, what):
                raise UsageError(
                    f"{result['model']} and {results[0]['model']} were measured with different {what}: "
                    f"{said(_basis(entry, what))} and {said(_basis(first, what))}; measure them in one 'qkit eval'"
                )
    if any("suite" in entry for entry in found) and not all("suite" in entry for entry in found):
        raise UsageError("only some of the results were measured with --suite: measure them in one 'qkit eval'")
    return found


def _basis(entry: Mapping[str, Any], what: str) -> Any:
    return sorted(entry.get("texts", {})) if what == "texts" else entry.get(what)


def _entry_of(result: Mapping[str, Any], entries: Sequence[dict[str, Any]], files: Sequence[Path]) -> dict[str, Any]:
    where, name, weights = " and ".join(map(str, files)), result["model"], result["weights"]
    for entry in reversed(entries):
        sums = entry.get("suite", {}).get("weights", {})
        if sums and sums == weights:
            return {**entry, "model": name}
    named = [entry for entry in entries if entry["model"] == name]
    if not named:
        raise UsageError(f"{where}: no figures of {name}: measure it with 'qkit eval', or leave --eval out")
    if weights and named[-1].get("suite", {}).get("weights"):
        raise UsageError(
            f"{where}: the figures of {name} are of other weights than the folder has now: measure it again with 'qkit eval'"
        )
    return named[-1]


def _entries(file: Path) -> list[dict[str, Any]]:
    data = load_json(file, "file of qkit eval", _LARGEST)
    models = data.get("models", [data]) if isinstance(data, dict) else None
    entries = [entry for entry in models if _is_entry(entry)] if isinstance(models, list) else []
    if not entries or entries != models:
        raise BadInput(f"{file}: found other data than figures of models: use the file that 'qkit eval --json' writes")
    return entries


def _is_entry(entry: Any) -> bool:
    if not isinstance(entry, dict) or not all(isinstance(entry.get(key), kind) for key, kind in _NEEDED.items()):
        return False
    suite, texts = entry.get("suite", {}), entry.get("texts", {})
    return isinstance(texts, dict) and isinstance(suite, dict) and isinstance(suite.get("weights", {}), dict)
