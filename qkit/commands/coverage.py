"""What a plan does to each part of a model, as the verbs plan and quantize print it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Console
from rich.text import Text

from qkit.commands.grid import print_wide, wide_table
from qkit.files.side_files import code_keys, unread_files
from qkit.system.words import megabytes
from qkit.transforms.table import TRANSFORMS
from qkit.verification.model_engines import engine_lines
from qkit.verification.record import printable

if TYPE_CHECKING:
    from qkit.verification.engine_types import Selected
    from qkit.workflows.quantize import PreparedRequest


def show_coverage(prepared: PreparedRequest, console: Console, selected: Selected | None = None) -> None:
    """Quantized and skipped layers with reasons, the bytes, and the engines that load the result. selected: what vLLM's own
    code said of it, where it was asked"""
    from qkit.engine.parts import recorded_notes
    from qkit.families.pruned import PrunedStructure, whole_of
    from qkit.files.sources.opening import encodings
    from qkit.planning.engine_rules import unloaded_warning
    from qkit.planning.fused_layers import engine_rows_of
    from qkit.planning.methods import method_notes
    from qkit.workflows.quantize import coverage

    plan = prepared.plan
    decoded = encodings(whole_of(prepared.structure).checkpoint.tensors)
    if decoded:
        counts = ", ".join(f"{count} weights of {encoding}" for encoding, count in decoded.items())
        console.print(Text(f"the source is quantized already and decoded on reading: {counts}"))
    if isinstance(prepared.structure, PrunedStructure):
        console.print(prepared.structure.cut.summary)
    kinds: dict[tuple[str, str, str, str], list[int]] = {}
    for p in plan.packed.values():
        group = str(p.weights.group or p.weights.strategy)
        acts = "-" if p.activations is None else p.activations.name
        learned = [t for t in plan.transforms if TRANSFORMS[t].stage == "block" and p.name in plan.linears]
        solver = "+".join((p.solver, *learned))
        entry = kinds.setdefault((p.scheme, f"{p.weights.name}, {group}", acts, solver), [0, 0])
        entry[0] += 1
        entry[1] += p.shape[0] * p.shape[1]
    table = wide_table(
        "scheme",
        "weights, group",
        "activations",
        "solver",
        "linears",
        "weights (M)",
        title="coverage",
    )
    for (scheme, weights, acts, solver), (count, size) in kinds.items():
        table.add_row(scheme, weights, acts, solver, str(count), f"{size / 1e6:.2f}")
    print_wide(console, table)
    reasons: dict[str, list[str]] = {}
    for name, reason in plan.skipped.items():
        reasons.setdefault(reason, []).append(name)
    for reason, names in reasons.items():
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        console.print(Text(f"skipped: {names[0]}{more}: {reason}"))
    notes: dict[str, list[str]] = {}
    for p in plan.packed.values():
        if p.note:
            notes.setdefault(p.note, []).append(p.name)
    for note, names in notes.items():
        console.print(
            Text(f"note: {names[0]}" + (f" and {len(names) - 1} more" if len(names) > 1 else "") + f": {note}")
        )
    for note in (
        *method_notes(plan, prepared.structure),
        *recorded_notes(plan, prepared.structure),
        *prepared.notes,
    ):
        console.print(Text(f"note: {note}"), soft_wrap=True)
    for understood in () if plan.calibration is None else plan.calibration.summary:
        console.print(Text(f"calibration: {understood}"), soft_wrap=True)
    if plan.calibration is not None and plan.calibration.written:
        c = plan.calibration
        data = f"{c.samples} samples and " if c.samples else ""
        console.print(f"calibration: {data}{c.written} synthetic samples of {c.seqlen} tokens")
    _show_copied(prepared, console)
    done = coverage(plan)
    console.print(
        f"{done['quantized']} linears quantized, {done['skipped']} skipped; tensors: {megabytes(plan.source_bytes)} before, "
        f"{megabytes(plan.packed_bytes)} after ({plan.packed_bytes / plan.source_bytes:.3f}x)"
    )
    lines = engine_lines(engine_rows_of(plan, prepared.structure, selected))
    for line in lines:
        console.print(Text(str(line)))
    warning = unloaded_warning(plan, prepared.structure, lines)
    if warning is not None:
        console.print(Text(f"warning: {warning}"), soft_wrap=True)


def _show_copied(prepared: PreparedRequest, console: Console) -> None:
    """Files and config keys that are left out of the result."""
    folder = prepared.structure.checkpoint.path
    behind = unread_files(folder)
    if behind:
        more = f" and {len(behind) - 1} more" if len(behind) > 1 else ""
        console.print(
            Text(f"not copied: {printable(behind[0])}{more}: code, pickles, archives and weights in other formats")
        )
    dropped = {
        "config.json": list(prepared.structure.checkpoint.dropped),
        **code_keys(folder, prepared.plan.side_files),
    }
    for name, keys in dropped.items():
        if keys:
            console.print(
                Text(f"left out of {printable(name)}: {printable(', '.join(keys))}: these keys select code to run")
            )
