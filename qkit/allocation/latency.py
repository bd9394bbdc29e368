"""Measured times of products as a resource: the table of ``--latency 12ms@table.json``.

The table is one that ``qkit bench gemv --table`` wrote on the target machine. A unit costs what its linears cost, one after
the other; of the experts of a block, the share that a token visits. What is not in it (attention, norms, embeddings and the
head) is not counted.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from qkit.errors import BadInput, UsageError
from qkit.families.structure import ModelStructure
from qkit.files.folder import load_json
from qkit.files.safefile import write_atomic
from qkit.files.schema import LatencyFile, validate
from qkit.sensitivity.profile import Profile
from qkit.tensor.formats import scheme

VERSION = 1
Key = tuple[str, int | None, tuple[int, int]]  # candidate, group size, (out, in)


@dataclass(frozen=True, kw_only=True)
class LatencyTable:
    """Measured times of products on one machine.

    seconds: median of a product with weights from memory; machine, device, dtype (of activations), rows and threads: where
    and of what it was measured.
    """

    file: Path
    machine: str
    device: str
    dtype: str
    rows: int
    threads: int
    seconds: Mapping[Key, float]

    def origin(self) -> dict[str, Any]:
        """The file and the machine that the times come from, JSON-able."""
        return {
            "file": str(self.file),
            "machine": self.machine,
            "device": self.device,
            "dtype": self.dtype,
            "m": self.rows,
            "threads": self.threads,
        }

    def merge(self) -> LatencyTable:
        """The table with the times of other products that the file has. Raises UsageError for a file that is something else,
        or was measured elsewhere or otherwise: it stays what it is."""
        if not self.file.exists():
            return self
        try:
            stored = LatencyTable.load(self.file)
        except BadInput as e:
            raise UsageError(f"--table {self.file}: the file exists and is no latency table: use another name") from e
        description, stored_description = self.origin(), stored.origin()
        differing = next((k for k in description if description[k] != stored_description[k]), None)
        if differing is not None:
            raise UsageError(
                f"--table {self.file}: the file has times of another {differing}: {stored_description[differing]} "
                f"there, {description[differing]} now: use another name"
            )
        return replace(self, seconds={**stored.seconds, **self.seconds})

    def save(self) -> None:
        """Writes the file."""
        entries = [
            {"format": name, "group": group, "out": out, "in": columns, "seconds": seconds}
            for (name, group, (out, columns)), seconds in self.seconds.items()
        ]
        data = {"version": VERSION, **self.origin(), "entries": entries}
        del data["file"]
        write_atomic(self.file, (json.dumps(data, indent=1) + "\n").encode())

    @staticmethod
    def load(file: Path) -> LatencyTable:
        """The table in a file. Raises BadInput for a file that is missing, damaged or of another version."""
        if not file.is_file():
            raise BadInput(f"{file}: no such latency table: make it with 'qkit bench gemv --model .. --table {file}'")
        data = load_json(file, "latency table", 1 << 26)
        again = "make it again with 'qkit bench gemv --table'"
        if not isinstance(data, dict) or data.get("version") != VERSION:
            raise BadInput(f"{file}: not a latency table of this version of qkit: {again}")
        validate(LatencyFile, data, f"{file}: damaged latency table", again, BadInput)
        seconds: dict[Key, float] = {
            (e["format"], e["group"], (e["out"], e["in"])): float(e["seconds"]) for e in data["entries"]
        }
        return LatencyTable(
            file=file,
            machine=data["machine"],
            device=data["device"],
            dtype=data["dtype"],
            rows=data["m"],
            threads=data["threads"],
            seconds=seconds,
        )


@dataclass(frozen=True)
class Latency:
    """A latency budget. limit: nanoseconds that the units may use together; times: nanoseconds by (unit, candidate)."""

    limit: int
    times: Mapping[tuple[str, str], int]

    def of(self, picks: Mapping[str, str]) -> int:
        """The nanoseconds of a plan."""
        return sum(self.times[unit, name] for unit, name in picks.items())


def unit_times(
    profile: Profile, structure: ModelStructure, table: LatencyTable, model: str
) -> dict[tuple[str, str], int]:
    """The time of every choice of a profile, {(unit, candidate): nanoseconds}.

    model: as it was named, for the message. Raises BadInput for what the table lacks.
    """
    linears = {x.name: x for block in structure.blocks for x in block.linears}
    visited = _visited(structure)
    times = {}
    for unit in profile.units:
        for name in unit.choices:
            group = requested_group(profile, name)
            total = 0.0
            for x in (linears[n] for n in unit.linears if n in linears):
                seconds = table.seconds.get((name, group, x.shape))
                if seconds is None:
                    raise BadInput(_missing(table, profile, (name, group, x.shape), model))
                total += seconds * (visited if x.expert is not None else 1.0)
            times[unit.key, name] = round(total * 1e9)
    return times


def requested_group(profile: Profile, name: str) -> int | None:
    """The group size that a candidate of a profile asks for; None: the format has none, or keeps the weight."""
    if name == "keep":
        return None
    group: int | None = profile.request["group_sizes"][name]
    if group is None:
        return scheme(name.partition("+")[0]).weights.group
    return group if group > 0 else None


def _visited(structure: ModelStructure) -> float:
    """Share of the experts that a token visits."""
    config: Any = structure.text_config
    expert_numbers: Iterable[int] = (x.expert + 1 for b in structure.blocks for x in b.linears if x.expert is not None)
    count = max(expert_numbers, default=1)
    return float(min(1.0, getattr(config, "num_experts_per_tok", count) / count))


def _missing(table: LatencyTable, profile: Profile, key: Key, model: str) -> str:
    name, group, (out, columns) = key
    sizes = {
        requested_group(profile, n) for n in profile.candidates if profile.request["group_sizes"].get(n) is not None
    }
    group_option = f" --group-size {sizes.pop() or -1}" if sizes else ""
    formats = ",".join("bf16" if n == "keep" else n.lower() for n in profile.candidates)
    in_groups = "" if group is None else f" in groups of {group}"
    return (
        f"{table.file}: no time for format {name}{in_groups} at {out}x{columns}: measure it with 'qkit bench gemv --model "
        f"{shlex.quote(model)} --formats {formats}{group_option} --table {shlex.quote(str(table.file))}'"
    )
