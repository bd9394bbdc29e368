"""qkit list: the tables of schemes, methods, levels of quality, formats, caches, families and models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
from rich.console import Console

from qkit.commands.common import OutFile, print_wide, wide_table, write_json
from qkit.commands.verb import Verb
from qkit.families.declared import DECLARED
from qkit.files.embedded import reference_models
from qkit.kvcache.policy import KINDS, NAMED, SHORT, WIDTHS_OF
from qkit.planning.quality_levels import KINDS as SCHEME_KINDS
from qkit.planning.quality_levels import SETTINGS
from qkit.planning.recipe import AUTO, TRIES
from qkit.planning.request import REQUANT, REQUANT_OUTLIERS, REQUANT_SIGNIFICANT
from qkit.solvers.table import SOLVERS
from qkit.system.extras import require
from qkit.system.option import Options
from qkit.tensor.formats import (
    ACTIVATION_FORMATS,
    FORMATS,
    GGUF_FORMATS,
    GGUF_SCHEMES,
    SCHEMES,
    SUPER_BLOCK,
    Format,
    layout,
)
from qkit.transforms.table import TRANSFORMS


def _scale(f: Format) -> str:
    if f.scale == "super":
        return f"group of {f.group}, under those of {SUPER_BLOCK}"
    per = {"group": f"group of {f.group}", "tensor_group": f"group of {f.group} and tensor", "block": "128 x 128 block"}
    return per.get(f.strategy, f.strategy)


def schemes() -> list[dict[str, Any]]:
    """One row per scheme."""
    return [
        {
            "scheme": s.name,
            "weights": s.weights.name,
            "scale per": _scale(s.weights),
            "activations": "-" if s.activations is None else s.activations.name,
            "stored as": "GGUF" if s.weights.gguf else layout(s.weights, s.activations),
        }
        for s in (*SCHEMES.values(), *GGUF_SCHEMES.values())
    ]


def _method(name: str, kind: str, what: str, options: Options) -> dict[str, Any]:
    defaults = ", ".join(f"{key}={option.shown}" for key, option in options.items())
    return {"method": name, "kind": kind, "what": what, "options": defaults}


def methods() -> list[dict[str, Any]]:
    """One row per solver, transform, finisher and search."""
    solvers = [_method(n, "solver", s.summary, s.options) for n, s in SOLVERS.items()]
    transforms = [
        _method(n, "finisher" if t.stage == "block" else "transform", t.summary, t.options)
        for n, t in TRANSFORMS.items()
    ]
    repair = {
        "method": REQUANT,
        "kind": "repair",
        "what": "outlier search per layer, solving without outliers, restoring weights by loss sensitivity (arXiv 2503.01901)",
        "options": f"--outliers {REQUANT_OUTLIERS}, --significant {REQUANT_SIGNIFICANT}",
    }
    search = {
        "method": AUTO,
        "kind": "search",
        "what": "recipe search per block (" + "; ".join(TRIES) + "), by the error on held-out samples",
        "options": "",
    }
    return [*solvers, *transforms, search, repair]


def quality() -> list[dict[str, Any]]:
    """One row per kind of scheme, with what each level of --quality tries first."""
    return [
        {"for": what, **{level: str(settings[0]) for level, settings in SETTINGS[kind].items()}}
        for kind, what in SCHEME_KINDS.items()
    ]


def formats() -> list[dict[str, Any]]:
    """One row per number format."""
    both = [("weights", f) for f in (*FORMATS.values(), *GGUF_FORMATS.values())] + [
        ("activations", f) for f in ACTIVATION_FORMATS.values()
    ]
    return [
        {
            "format": f.name,
            "for": use,
            "bits": f.bits,
            "scale per": _scale(f),
            "zero point": "no" if f.symmetric else "minimum" if f.gguf else "yes",
        }
        for use, f in both
    ]


def families() -> list[dict[str, Any]]:
    """One row per declared family."""
    return [
        {
            "family": f.name,
            "models": f.note,
            "model_type": ", ".join(f.model_types),
        }
        for f in DECLARED
    ]


def caches() -> list[dict[str, Any]]:
    """One row per kind of KV cache, with the names for --kv."""
    rows = []
    for kind, what in KINDS.items():
        widths = WIDTHS_OF.get(kind, (8, 4, 3, 2))
        name = NAMED.get(kind) or SHORT.get(kind, kind) + str(widths[0])
        rows.append({"cache": name, "bits": ", ".join(map(str, widths)), "what": what})
    return rows


def models() -> list[dict[str, Any]]:
    """One row per embedded reference model."""
    require("the list of reference models", "data", "qkit_data")
    rows = []
    for name, path in reference_models().items():
        size = sum(p.stat().st_size for p in path.rglob("*.safetensors"))
        rows.append({"model": name, "bytes": size, "folder": str(path)})
    return rows


TABLES = {
    "schemes": schemes,
    "methods": methods,
    "quality": quality,
    "formats": formats,
    "caches": caches,
    "families": families,
    "models": models,
}


@click.command("list", cls=Verb)
@click.argument("what", type=click.Choice(list(TABLES)))
@click.option("--json", "json_file", type=OutFile(), help="JSON file for the table.")
def list_command(what: str, json_file: Path | None) -> None:
    """List the available schemes, methods, levels of quality, formats, caches, families or models.

    \b
    Example:
      qkit list schemes
    """
    rows = TABLES[what]()
    table = wide_table(*rows[0].keys(), prose=True)
    for row in rows:
        table.add_row(*(str(v) for v in row.values()))
    print_wide(Console(), table)
    write_json(json_file, rows)
