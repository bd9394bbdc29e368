"""The latency table of a model on this machine: every format at every shape, for ``--latency``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from qkit_kernels import cores

from qkit.allocation.latency import Key, LatencyTable
from qkit.benchmark.contenders import OWN, random_product
from qkit.benchmark.host import Host
from qkit.benchmark.products import compare, make_entrants
from qkit.benchmark.shapes import Shape
from qkit.errors import NumericFailure, Unsupported
from qkit.sensitivity.candidates import Candidate

Step = Callable[[], None]


def measure_table(
    file: Path,
    candidates: Sequence[Candidate],
    shapes: Sequence[Shape],
    dtype: torch.dtype,
    device: str,
    rows: int,
    host: Host,
    seconds: float,
    step: Step,
) -> tuple[LatencyTable, list[str]]:
    """The table, still to be saved, and a note for each format that a shape cannot have. step: called after each entry.

    Raises NumericFailure for a result that is wrong or cannot be, UsageError for a file that is something else.
    """
    name = str(dtype).removeprefix("torch.")
    table = LatencyTable(
        file=file,
        machine=cores.name(),
        device=device,
        dtype=name,
        rows=rows,
        threads=torch.get_num_threads(),
        seconds={},
    )
    table.merge()  # refuses a file that it must not replace before anything is measured
    seconds_by_key: dict[Key, float] = {}
    notes = []
    for candidate in candidates:
        group = None if candidate.scheme is None else candidate.scheme.weights.group
        for shape in shapes:
            try:
                p = random_product(candidate, shape, dtype)
            except Unsupported as e:
                notes.append(f"left out: {candidate.name} at {shape[0]}x{shape[1]}: {e}")
                continue
            finally:
                step()
            (result,) = compare(p, make_entrants(p, device, host, names=(OWN,)), rows, host, seconds)
            if result.cold is None:
                raise NumericFailure(
                    f"{candidate.name} at {shape[0]}x{shape[1]}: {result.refused}: no table is written: try again on an idle "
                    "machine"
                )
            seconds_by_key[candidate.name, group, shape] = result.cold.p50
    return replace(table, seconds=seconds_by_key).merge(), notes
