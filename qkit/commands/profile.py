"""qkit profile: the cost of each format for each layer, measured once and read by quantize and plan."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console

from qkit.commands.common import (
    CALIB_HELP,
    OutFile,
    OutFolder,
    Reporter,
    announce,
    command_line,
    megabytes,
    print_wide,
    row_options,
    wide_table,
    write_json,
)
from qkit.commands.verb import OptionGroup, Verb, in_group
from qkit.errors import BadInput, UsageError
from qkit.files.locate import find_model
from qkit.files.safefile import write_atomic
from qkit.planning.request import Request, recipe_of
from qkit.sensitivity.candidates import parse_candidates
from qkit.sensitivity.names import MEASURES, PREFERRED, best_measure, check_measures
from qkit.system.extras import require
from qkit.system.memory import bound_heap
from qkit.workflows.places import check_profile_folder

if TYPE_CHECKING:
    from qkit.allocation.pareto import Point
    from qkit.sensitivity.profile import Profile

_MOST_USED, _CALIBRATION, _JOB = (
    in_group(OptionGroup.MOST_USED),
    in_group(OptionGroup.CALIBRATION),
    in_group(OptionGroup.JOB),
)
_MEASURES, _CURVE = in_group(OptionGroup.MEASURES), in_group(OptionGroup.CURVE)


@click.command("profile", cls=Verb)
@_MOST_USED("--model", required=True, help="Model folder, reference model name, or hub id.")
@_MOST_USED(
    "--candidates",
    required=True,
    help="Formats to measure for every layer: int2..int8 (the same as w2a16..w8a16), any scheme such as nvfp4 or w8a8 "
    "(activations too), or bf16 (not quantized). int3+0.5% keeps the largest 0.5 % of the weights in 16 bits. int3+r16 adds a "
    "low-rank branch of rank 16. Types of GGUF such as q4_k, or gguf for the usual ones, are not mixed with others.",
)
@_MOST_USED("--out", type=OutFolder(), required=True, help="Folder of the profile.")
@_MOST_USED(
    "--method",
    default="gptq",
    show_default=True,
    help="Solver of the measurements, rtn or gptq: the one that quantize will use.",
)
@_MOST_USED(
    "--group-size",
    type=int,
    help="Weights per scale of the integer formats (default: 128). quantize reads it from the profile.",
)
@_MOST_USED("--calib", multiple=True, metavar="DATA[:COLUMN][:WEIGHT]", help=CALIB_HELP + " (default: embedded data).")
@row_options(_CALIBRATION)
@in_group(OptionGroup.SCHEME)(
    "--embeddings",
    flag_value="auto",
    help="Include the embeddings among the layers; a budget then chooses their format, too.",
)
@in_group(OptionGroup.SCHEME)(
    "--head", flag_value="auto", help="Include the output head. A tied one is one matrix with the embeddings."
)
@_CALIBRATION(
    "--rows",
    type=int,
    help="Number of calibration samples on which losses are measured (default: 32, or all if fewer).",
)
@_MEASURES(
    "--measures",
    default="weight,output,pqi,kl",
    show_default=True,
    help=f"Measures of the cost, separated by commas: {', '.join(MEASURES)}. Fast: weight, output, "
    "output_norm. With gradients: first, first_x, fisher, pqi. With a model run per layer and candidate: loss, kl.",
)
@_MEASURES(
    "--points",
    type=click.IntRange(1),
    default=8,
    show_default=True,
    help="Number of points of the path integral (pqi).",
)
@_MEASURES("--audit", is_flag=True, help="Compare every measure with the true loss change on held-out samples.")
@_MEASURES(
    "--audit-text",
    type=click.Path(path_type=Path),
    help="Held-out text or image-text data of the audit (default: embedded data).",
)
@_CURVE(
    "--pareto",
    is_flag=True,
    help="Write the curve of predicted cost against bytes, for the first of these measures that was computed: "
    f"{', '.join(PREFERRED)}.",
)
@_CURVE(
    "--pareto-measure",
    type=click.IntRange(0),
    default=0,
    metavar="N",
    help="Number of plans along the curve whose KL divergence is measured.",
)
@_JOB("--seed", type=int, default=0, show_default=True, help="Random seed of the audited plans.")
@_JOB("--threads", type=int, help="Number of worker threads (default: all cores). The result does not depend on it.")
@_JOB("--json", "json_file", type=OutFile(), help="JSON file for the printed results.")
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
    **options: Any,
) -> None:
    """Measure the cost of every candidate format for every layer.

    After a stop the same command continues. The profile does not depend on a budget: quantize and plan read it for any budget.

    \b
    Example:
      qkit profile --model tiny-llama --candidates int2,int3,int4 --out profile
    """
    bound_heap()
    console = Console()
    audited, seed = options.pop("audit"), options.pop("seed")
    if options["threads"] is not None and options["threads"] < 1:
        raise UsageError(f"--threads {options['threads']}: expected at least 1")
    names = tuple(m.strip() for m in measures.split(",") if m.strip())
    if pareto_measure and not pareto:
        raise UsageError("--pareto-measure needs --pareto: add it")
    if audit_text is not None and not audited:
        raise UsageError("--audit-text needs --audit: add it")
    if audit_text is not None and not audit_text.exists():
        raise BadInput(f"{audit_text}: no such file or folder for --audit-text")
    if pareto:
        require("--pareto", "report", "matplotlib")
    of = best_measure(names) if pareto else None
    check_measures(names)
    base = Request(**{name: value for name, value in options.items() if value not in (None, ())})
    recipe_of(replace(base, scheme="w4a16", embeddings=None, head=None))  # the method, before what takes seconds
    parse_candidates(candidates, base.group_size)
    check_profile_folder(out)
    announce(console, f"reading {base.model}")
    find_model(base.model)

    from qkit.allocation.pareto import uniform
    from qkit.report.figures import pareto_plot, png
    from qkit.workflows.profile import ProfileRequest, audit, forecast, profile

    request = ProfileRequest(base, candidates, names, rows, points)
    reporter = Reporter(console, command_line())
    with reporter.running():
        console.print(forecast(request).line())
        profiled = profile(request, out, reporter)
        audited_figures = audit(request, out, profiled, audit_text, reporter, seed=seed) if audited else None
        along = pareto_curve(request.base, profiled, of, pareto_measure, out, reporter) if of is not None else None
    show_profile(profiled, console)
    if audited_figures is not None:
        show_audit(audited_figures, console)
    data = {
        "units": len(profiled.units),
        "whole": profiled.whole,
        "base_loss": profiled.base_loss,
        "audit": audited_figures,
    }
    if of is not None and along is not None:
        data["pareto"] = pareto_json(along, of)
        write_json(out / "pareto.json", data["pareto"])
        write_atomic(out / "pareto.png", png(pareto_plot(along, None, uniform(profiled, of), of)))
        show_pareto(along, of, profiled, console)
    write_json(json_file, data)


def pareto_curve(
    base: Request, profiled: Profile, measure: str, count: int, folder: Path, reporter: Reporter
) -> list[Point]:
    """The curve, ``wanted`` of its points measured with the weights of the probes."""
    from qkit.allocation.pareto import curve, measure_points
    from qkit.workflows.profile import plan_measurement

    reporter.start("Pareto curve", 1)
    points = curve(profiled, measure)
    if not count:
        return points
    with plan_measurement(base, profiled, folder, reporter) as measured:
        reporter.start("plans of the curve", min(count, len(points)))
        return measure_points(points, count, measured, reporter.step)


def pareto_json(points: list[Point], measure: str) -> dict[str, Any]:
    """The content of pareto.json: costs in the unit of the measure, KL divergences in nats per token."""
    from qkit.report.figures import unit_of

    return {"measure": measure, "unit": unit_of(measure), "points": [asdict(p) for p in points]}


def show_profile(profiled: Profile, console: Console) -> None:
    """Whole-model figures of every candidate, and the units that cost most."""
    table = wide_table(
        "candidate", "bytes of linears", "loss change", "KL", *(f"sum of {m}" for m in profiled.measures)
    )
    for name in profiled.candidates:
        if name not in profiled.whole:
            continue
        size = sum(u.choices[name].bytes for u in profiled.units if name in u.choices)
        sums = [sum(u.choices[name].costs[m] for u in profiled.units if name in u.choices) for m in profiled.measures]
        whole = profiled.whole[name]
        table.add_row(name, megabytes(size), f"{whole['loss']:.5f}", f"{whole['kl']:.5f}", *(f"{s:.5g}" for s in sums))
    print_wide(console, table)


def show_pareto(points: list[Point], measure: str, profiled: Profile, console: Console) -> None:
    """Some points along the curve, and all that were measured."""
    from qkit.allocation.pareto import spread

    shown = {*spread(len(points), 8), *(i for i, p in enumerate(points) if p.measured is not None)}
    table = wide_table("bits", "bytes", measure, "measured KL", "layers", title="Pareto curve")
    for i in sorted(shown):
        p = points[i]
        counts = {n: sum(len(u.linears) for u in profiled.units if p.picks[u.key] == n) for n in profiled.candidates}
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
