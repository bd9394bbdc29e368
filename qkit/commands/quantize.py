"""qkit quantize: from a checkpoint to a packed, verified checkpoint."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console
from rich.text import Text

from qkit.commands.asked import options_of
from qkit.commands.budget import budget_options
from qkit.commands.cache import cache_options
from qkit.commands.common import (
    OutFolder,
    Reporter,
    command_line,
    megabytes,
    request_options,
    write_json,
)
from qkit.commands.coverage import show_coverage
from qkit.commands.engine_options import engine_options
from qkit.commands.experts import left_out, tokens_seen
from qkit.commands.plan import plan_json, show_forecast
from qkit.commands.verb import OptionGroup, Verb, in_group
from qkit.files.folder import RECORD, weights_folder
from qkit.files.record import packed_record
from qkit.files.safefile import parse_json
from qkit.system.memory import bound_heap
from qkit.verification.model_engines import engine_lines

if TYPE_CHECKING:
    from qkit.workflows.quantize import PreparedRequest


@click.command("quantize", cls=Verb)
@request_options
@budget_options
@cache_options
@engine_options
@in_group(OptionGroup.MOST_USED)(
    "--out",
    type=OutFolder(),
    required=True,
    help="Folder of the result. A finished result of the same command is only verified again.",
)
@in_group(OptionGroup.JOB)("--work", type=OutFolder(), help="Job folder (default: OUT.job).")
@in_group(OptionGroup.MODEL)(
    "--overwrite", is_flag=True, help="Replace the content of OUT after the new result is verified."
)
@in_group(OptionGroup.JOB)(
    "--keep-job", is_flag=True, help="Keep the intermediate files of the job folder after success."
)
def quantize_command(
    json_file: Path | None,
    out: Path,
    work: Path | None,
    overwrite: bool,
    keep_job: bool,
    **values: Any,
) -> None:
    """Quantize a model into a packed checkpoint and verify the result.

    After a stop, a crash or a kill the same command continues the job.

    \b
    Example:
      qkit quantize --model tiny-llama --scheme w4a16 --method gptq --out out
    """
    from qkit.workflows.places import check_places, check_result_there  # here: the help does not wait for pydantic

    bound_heap()
    console = Console()
    began = time.monotonic()
    options = options_of(values, out, console)
    check_places(options.request.model, out, work, overwrite)  # before torch is imported, which takes seconds
    check_result_there(options, out, overwrite)

    from qkit.commands.decide import decided_json, resolve_request, show_decided
    from qkit.engine.export import is_export_of
    from qkit.engine.job import finished_blocks
    from qkit.workflows.quantize import prepare, quantize

    decided = resolve_request(options, out, work, console)
    request = decided.request
    prepared_request = prepare(request, decided.rows)
    show_decided(decided, console)
    show_coverage(prepared_request, console)
    show_forecast(prepared_request, console)
    there = is_export_of(out, prepared_request.plan)
    before = _written(out)
    finished = 0 if there else finished_blocks(work or out.with_name(out.name + ".job"))
    if finished:
        console.print(Text(f"{finished} blocks were finished earlier"))
    reporter = Reporter(console, command_line())
    blocks = stages(prepared_request)
    reporter.expect(blocks, finished, *around(prepared_request, sum(sum(weights) for _, weights in blocks)))
    with reporter.running():
        report = quantize(
            request,
            out,
            reporter,
            work=work,
            overwrite=overwrite,
            keep_job=keep_job,
            prepared=prepared_request,
        )
    kept = ", already complete" if _written(out) == before else ""
    console.print(
        Text(
            f"{out}{kept}: {report.linears} quantized linears, {megabytes(report.bytes)}, "
            f"verified with {sum(report.checks.values()):,} checks, {time.monotonic() - began:.1f} s"
        )
    )
    for line in (
        *_components(prepared_request, out),
        *_policy(out),
        *_recipes(out),
        *left_out(out),
        *tokens_seen(out),
        *_rows(prepared_request, work, out),
    ):
        console.print(Text(line))
    for engine in engine_lines(report.engines):
        if engine.loads:
            console.print(Text(f"loads in {engine.engine}: {', '.join(engine.classes)}"))
    write_json(json_file, {**plan_json(prepared_request), **decided_json(decided)})


def _written(out: Path) -> tuple[int, int] | None:
    """Identifies a result, to see whether it was replaced."""
    file = weights_folder(out) / RECORD
    state = file.stat() if file.is_file() else None
    return None if state is None else (state.st_ino, state.st_mtime_ns)


def stages(prepared: PreparedRequest) -> list[tuple[str, list[float]]]:
    """The blocks that a run goes through, for ``Reporter.expect``, by the number of weights in each."""
    from qkit.families.blocks import LANGUAGE
    from qkit.planning.plan import sequences

    return [
        (
            "" if s.name == LANGUAGE else s.name,
            [float(sum(x.shape[0] * x.shape[1] for x in block.linears)) for block in s.blocks],
        )
        for s in sequences(prepared.plan, prepared.structure)
    ]


def around(prepared: PreparedRequest, blocks: float) -> tuple[dict[str, float], dict[str, float]]:
    """The phases that a run goes through before its blocks, and after them, for ``Reporter.expect``.

    blocks: what all blocks count together
    """
    from qkit.engine.end_to_end import END_TO_END

    operations = prepared.forecast.operations
    before, after = prepared.before, [name for name in (END_TO_END,) if name in operations]
    rest = sum(n for name, n in operations.items() if name not in (*before, *after))
    if not rest:
        return {}, {}
    ahead, behind = ({name: blocks * operations[name] / rest for name in names} for names in (before, after))
    return ahead, behind


def _components(prepared: PreparedRequest, out: Path) -> Iterator[str]:
    """The sizes of a pipeline's text encoders, before and after."""
    for name, request in prepared.components.items():
        before, after = (
            sum(f.stat().st_size for f in p.glob("*.safetensors")) for p in (Path(request.model), out / name)
        )
        yield f"{name}: {str(request.scheme).upper()}, {megabytes(before)} before, {megabytes(after)} after"


def _recipes(out: Path) -> Iterator[str]:
    """The recipes that method auto kept."""
    record = packed_record(out)
    kept = Counter(x["recipe"] for x in record["linears"].values() if "recipe" in x)
    if kept:
        yield "recipes kept by the search: " + "; ".join(f"{r} for {n} linears" for r, n in kept.most_common())


def _rows(prepared: PreparedRequest, work: Path | None, out: Path) -> list[str]:
    "Notices about calibration samples, from the journal of the job."
    from qkit.engine.parts import row_notices

    file = (work or out.with_name(out.name + ".job")) / "journal.jsonl"
    lines = file.read_bytes().splitlines() if file.is_file() else []
    return row_notices((parse_json(line, str(file)) for line in lines), prepared.plan.dtype)


def _policy(out: Path) -> Iterator[str]:
    """The expected effect of a policy by step, and what was asked for."""
    from qkit.workflows.diffusion_policy import ENTRY

    decided = packed_record(out).get(ENTRY)
    if decided is not None:
        asked, expected = decided["asked"], decided["fit"]["expected"]
        skips = f"{100 * expected['skips']:.0f} % of runs of blocks skipped (asked {100 * asked['skips']:.0f} %)"
        above = ": inputs with outliers stay in 16 bits" if expected["width"] > asked["width"] + 0.05 else ""
        yield f"expected: {skips}, {expected['width']:.2f} bits of inputs (asked {asked['width']:g}){above}"
