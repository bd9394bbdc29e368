"""What a finished result is, read from its folder: nothing is computed anew."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qkit.engine.card import how_to_load
from qkit.files.card import CARD
from qkit.files.folder import read_record
from qkit.files.inspect import inspect
from qkit.files.safefile import read_bytes
from qkit.kvcache.policy import CachePolicy
from qkit.report.text import top_layers
from qkit.verification.model_engines import engine_lines
from qkit.verification.verify import engine_table

_COMMAND = re.compile(r"^    (qkit quantize .*)$", re.MULTILINE)  # in the card
_LARGEST = 1 << 24  # bytes of a card


def result_facts(folder: Path) -> dict[str, Any]:
    """{"model", "summary": {what: value}, "schemes": rows, "bits", "errors": {layer: value}, "layers": of the largest errors,
    "engines": [{"engine", "loads", "command", "notes"}], "hashes": {file: sha256}, "weights": {file: sha256}}.

    Of a folder that qkit did not write only the summary is filled. Raises BadCheckpoint for a record that cannot be read.
    """
    record = read_record(folder)
    found = inspect(folder)
    summary = {
        "size of the weights": f"{found.bytes:,} bytes" if found.weight_files else None,
        "bits a weight": None if found.bits is None else f"{found.bits:.3f}, embeddings and scales counted",
        "kind of model": found.architecture or found.model_type,
        "format": "; ".join(found.quantization) or "not quantized",
        "made by": found.made_by,
    }
    facts: dict[str, Any] = {"model": folder.resolve().name, "summary": summary, "schemes": [], "bits": {}}
    facts |= {"errors": {}, "layers": [], "engines": [], "hashes": {}, "weights": {}}
    if record is not None:
        linears: dict[str, Any] = record.get("linears", {})
        summary |= _made(record, folder)
        facts |= {
            "schemes": _schemes(linears),
            "bits": {name: float(entry["format"]["bits"]) for name, entry in linears.items()},
            "errors": {n: float(e["error"]) for n, e in linears.items() if isinstance(e.get("error"), float)},
            "layers": top_layers(folder),
            "engines": _engines(folder),
            "hashes": record.get("files", {}),
            "weights": record.get("shards", {}),
        }
    facts["summary"] = {name: value for name, value in summary.items() if value}
    return facts


def _made(record: Mapping[str, Any], folder: Path) -> dict[str, str | None]:
    """How it was made: source, method, calibration, command."""
    source, recipe, calibration = (record.get(key) or {} for key in ("source", "recipe", "calibration"))
    options = [f"{name}={value}" for name, value in sorted((recipe.get("options") or {}).items())]
    skipped: dict[str, list[str]] = {}
    for name, reason in (record.get("skipped") or {}).items():
        skipped.setdefault(reason, []).append(name)
    samples = (
        f"{calibration.get('samples')} samples of {calibration.get('seqlen')} tokens of {calibration.get('source')}"
    )
    kv = record.get("kv")
    return {
        "method": " with ".join([str(recipe.get("method") or "rtn"), *([", ".join(options)] if options else [])]),
        "calibration": samples if calibration else "none: the method looks at the weights alone",
        "KV cache": None if kv is None else CachePolicy.from_json(kv).name,
        "not quantized": "; ".join(f"{_some(names)}: {reason}" for reason, names in skipped.items()),
        "size of the original": f"{source['bytes']:,} bytes" if "bytes" in source else None,
        "sha256 of the original": source.get("sha256"),
        "made with": _command(folder),
    }


def _some(names: list[str], most: int = 3) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _command(folder: Path) -> str | None:
    """The command line, which stands in the card."""
    if not (folder / CARD).is_file():
        return None
    found = _COMMAND.search(read_bytes(folder / CARD, _LARGEST).decode(errors="replace"))
    return None if found is None else found[1]


def _schemes(linears: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One row for every scheme and solver, the most weights first; the error is a mean over layers."""
    groups: dict[tuple[str, str, str, str], list[tuple[str, Mapping[str, Any]]]] = {}
    for name, entry in linears.items():
        of = entry["format"]
        group = f"group of {of['group']}" if of.get("group") else str(of.get("strategy") or "")
        key = (str(entry.get("scheme")), str(of["name"]), group, str(entry.get("solver")))
        groups.setdefault(key, []).append((name, entry))
    rows = []
    for (scheme, weights, group, solver), entries in groups.items():
        errors = [e["error"] for _, e in entries if isinstance(e.get("error"), float)]
        rows.append(
            {
                "scheme": scheme,
                "weights": weights,
                "group": group,
                "solver": solver,
                "matrices": len(entries),
                "parameters": sum(e["shape"][0] * e["shape"][1] for _, e in entries),
                "error": sum(errors) / len(errors) if errors else None,
                "layers": ", ".join(dict.fromkeys(n.rpartition(".")[2] for n, _ in entries)),
            }
        )
    return sorted(rows, key=lambda row: -row["parameters"])


def _engines(folder: Path) -> list[dict[str, Any]]:
    """Those that load it come first."""
    gguf = any(folder.glob("*.gguf"))
    return sorted(
        (
            {
                "engine": line.engine,
                "loads": line.loads,
                "command": how_to_load(line.engine, gguf=gguf).replace("`", "") if line.loads else "",
                "notes": "; ".join(line.notes),
            }
            for line in engine_lines(engine_table(folder))
        ),
        key=lambda entry: not entry["loads"],
    )
