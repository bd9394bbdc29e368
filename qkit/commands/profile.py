"""qkit profile: what each decision costs, measured once and read by quantize and plan."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console

from qkit.commands.common import (
    OutFile,
    OutFolder,
    Reporter,
    announce,
    command_line,
    megabytes,
    print_wide,
    wide_table,
    write_json,
)
from qkit.commands.verb import Verb
from qkit.errors import BadInput, UsageError
from qkit.files.locate import find_model
from qkit.files.safefile import write_atomic
from qkit.planning.request import Request, recipe_of
from qkit.sensitivity.candidates import parse_candidates
from qkit.sensitivity.names import MEASURES, PREFERRED, check_measures, curve_measure
from qkit.system.extras import require
from qkit.system.memory import bound_heap

if TYPE_CHECKING:
    from qkit.allocation.pareto import Point
    from qkit.sensitivity.profile import Profile


@click.command("profile", cls=Verb)
@click.option("--model", required=True, help="Model folder, reference model name, or hub id.")
@click.option(
    "--candidates",
    required=True,
    help="What a layer may get: int2..int8 (the same as w2a16..w8a16), any scheme (nvfp4, w8a8: activations too), int3+0.5% "
    "(the largest 0.5 % of its weights kept in 16 bits), int3+r16 (a low-rank part of rank 16), bf16 (left as it is).",
)
@click.option("--out", type=OutFolder(), required=True, help="Folder of the profile.")
@click.option(
    "--method",
    default="gptq",
    show_default=True,
    help="Solver of the probes, rtn or gptq: the one that quantize will use.",
)
@click.option(
    "--group-size",
    type=int,
    help="Weights per scale of the integer formats (default: 128); quantize takes it from the profile.",
)
@click.option("--calib", type=click.Path(path_type=Path), help="Calibration text, or pairs (default: embedded ones).")
@click.option("--samples", type=int, default=128, show_default=True, help="Calibration rows of the probes.")
@click.option("--seqlen", type=int, default=256, show_default=True, help="Tokens per calibration row.")
@click.option("--rows", type=int, help="Rows of them that losses are measured on (default: 32, or all if fewer).")
@click.option(
    "--measures",
    default="weight,output,pqi,kl",
    show_default=True,
    help=f"Some of {', '.join(MEASURES)}. Cheap: weight, output, "
    "output_norm; with gradients: first, first_x, fisher, pqi; the model run for every layer and candidate: loss, kl.",
)
@click.option("--points", type=click.IntRange(1), default=8, show_default=True, help="Of the path integral (pqi).")
@click.option("--audit", is_flag=True, help="Compare every measure with the true loss change on held-out rows.")
@click.option("--audit-text", type=click.Path(path_type=Path), help="Of that text or pairs (default: embedded ones).")
@click.option(
    "--pareto",
    is_flag=True,
    help=f"Write the curve of predicted cost against bytes, of the first of {', '.join(PREFERRED)} that was measured.",
)
@click.option(
    "--pareto-measure",
    type=click.IntRange(0),
    default=0,
    metavar="N",
    help="Measure the KL divergence of N plans along the curve.",
)
@click.option("--seed", type=int, default=0, show_default=True, help="For what is random (plans of the audit).")
@click.option("--threads", type=int, help="Workers (default: all cores); the result does not depend on it.")
@click.option("--json", "json_file", type=OutFile(), help="Write what is printed to this file.")
def profile_command(
    out: Path,
    candidates: str,
    rows: int | None,
    measures: str,
    points: int,
    audit_text: Path | None,
    pareto: bool,
    pareto_measure: int,
    json_file: Path | None,
    **given: Any,
) -> None:
    """Measure what every layer costs in every candidate format.

    The same command goes on after a stop. The profile does not depend on a budget: quantize and plan read it.

    \b
    Example:
      qkit profile --model tiny-llama --candidates int2,int3,int4,int8 --group-size 64 --out profile
    """
    bound_heap()
    console = Console()
    audited, seed = given.pop("audit"), given.pop("seed")
    if given["threads"] is not None and given["threads"] < 1:
        raise UsageError(f"--threads {given['threads']}: expected at least 1")
    wanted = tuple(m.strip() for m in measures.split(",") if m.strip())
    if pareto_measure and not pareto:
        raise UsageError("--pareto-measure goes with --pareto: add it")
    if audit_text is not None and not audited:
        raise UsageError("--audit-text goes with --audit: add it")
    if audit_text is not None and not audit_text.exists():
        raise BadInput(f"{audit_text}: no such text or folder for --audit-text")
    if pareto:
        require("--pareto", "report", "matplotlib")
    of = curve_measure(wanted) if pareto else None
    check_measures(wanted)
    base = Request(**given)
    recipe_of(replace(base, scheme="w4a16"))  # the method, before what takes seconds
    parse_candidates(candidates, base.group_size)
    announce(console, f"reading {base.model}")
    find_model(base.model)

    from qkit.allocation.pareto import uniform
    from qkit.report.figures import pareto_plot, png
    from qkit.workflows.profile import ProfileRequest, audit, forecast, profile

    request = ProfileRequest(base, candidates, wanted, rows, points)
    reporter = Reporter(console, command_line())
    with reporter.running():
        console.print(forecast(request).line())
        made = profile(request, out, reporter)
        found = audit(request, out, made, audit_text, reporter, seed=seed) if audited else None
        along = pareto_curve(request.base, made, of, pareto_measure, out, reporter) if of is not None else None
    show_profile(made, console)
    if found is not None:
        show_audit(found, console)
    data = {"units": len(made.units), "whole": made.whole, "base_loss": made.base_loss, "audit": found}
    if of is not None and along is not None:
        data["pareto"] = pareto_json(along, of)
        write_json(out / "pareto.json", data["pareto"])
        write_atomic(out / "pareto.png", png(pareto_plot(along, None, uniform(made, of), of)))
        show_pareto(along, of, made, console)
    write_json(json_file, data)


def pareto_curve(
    base: Request, made: Profile, measure: str, wanted: int, folder: Path, reporter: Reporter
) -> list[Point]:
    """The curve, ``wanted`` of its points measured with the weights of the probes."""
    from qkit.allocation.pareto import curve, measure_points
    from qkit.workflows.profile import measured_plans

    reporter.start("Pareto curve", 1)
    points = curve(made, measure)
    if not wanted:
        return points
    with measured_plans(base, made, folder, reporter) as measured:
        reporter.start("plans of the curve", min(wanted, len(points)))
        return measure_points(points, wanted, measured, reporter.step)


def pareto_json(points: list[Point], measure: str) -> dict[str, Any]:
    """What pareto.json holds: costs in the measure's unit, measured KL divergences in nats a token."""
    from qkit.report.figures import unit_of

    return {"measure": measure, "unit": unit_of(measure), "points": [asdict(p) for p in points]}


def show_profile(made: Profile, console: Console) -> None:
    """Whole-model figures of every candidate, and the units that cost most."""
    table = wide_table("candidate", "bytes of linears", "loss change", "KL", *(f"sum of {m}" for m in made.measures))
    for name in made.candidates:
        if name not in made.whole:
            continue
        size = sum(u.choices[name].bytes for u in made.units if name in u.choices)
        sums = [sum(u.choices[name].costs[m] for u in made.units if name in u.choices) for m in made.measures]
        whole = made.whole[name]
        table.add_row(name, megabytes(size), f"{whole['loss']:.5f}", f"{whole['kl']:.5f}", *(f"{s:.5g}" for s in sums))
    print_wide(console, table)


def show_pareto(points: list[Point], measure: str, made: Profile, console: Console) -> None:
    """Some points along the curve, and all that were measured."""
    from qkit.allocation.pareto import spread

    shown = {*spread(len(points), 8), *(i for i, p in enumerate(points) if p.measured is not None)}
    table = wide_table("bits", "bytes", measure, "measured KL", "layers", title="Pareto curve")
    for i in sorted(shown):
        p = points[i]
        counts = {n: sum(len(u.linears) for u in made.units if p.picks[u.key] == n) for n in made.candidates}
        formats = ", ".join(f"{n} {count}" for n, count in counts.items() if count)
        measured = "-" if p.measured is None else f"{p.measured:.5g}"
        table.add_row(f"{p.bits:.3f}", megabytes(p.bytes), f"{p.cost:.5g}", measured, formats)
    print_wide(console, table)
    console.print(f"{len(shown)} of {len(points)} points; all of them are in pareto.json and pareto.png")


def show_audit(found: dict[str, Any], console: Console) -> None:
    """Rank correlation and predicted / true of every measure."""
    table = wide_table("measure", "rank, one layer", "predicted/true", "rank, plans", "predicted/true", title="audit")
    for name, figures in found["measures"].items():
        cells = [f"{figures[k][v]:.3f}" for k in ("single", "plans") for v in ("rank", "ratio")]
        table.add_row(name, *cells)
    print_wide(console, table)
