"""qkit verify: the independent check of a packed checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import click
from rich.console import Console
from rich.table import Table
from rich.text import Text

from qkit.commands.common import OutFile, Reporter, command_line
from qkit.commands.engine_options import GPU_HELP, TP_HELP
from qkit.commands.engine_tables import gguf_file, require_python, show_proof
from qkit.commands.measured import json_bytes
from qkit.commands.verb import Verb
from qkit.engines.process import ENGINES, TIMEOUT, require_engine
from qkit.engines.selector import parse_gpus
from qkit.errors import Unsupported, UsageError, VerifyFailure
from qkit.files.folder import RECORD, read_record
from qkit.files.safefile import write_atomic
from qkit.verification.model_engines import Deployment, engine_lines
from qkit.verification.verify import Report, engine_table, summary, verify

if TYPE_CHECKING:
    from qkit.verification.engine_types import Selected

UNRECORDED = "no qkit.json beside it, so its bytes were not checked"
_SHOWN = 20  # problems listed on the terminal; --json has them all


def _table(title: str, columns: list[str], rows: list[list[str]]) -> Table:
    table = Table(title=Text(title), title_justify="left")
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*map(Text, row))
    return table


def show(report: Report, console: Console) -> None:
    """Prints the checks by topic, the support of each combination of formats by each engine, and the first problems."""
    rows = [[topic, f"{count:,}"] for topic, count in sorted(report.checks.items())]
    console.print(_table("checks made", ["topic", "checks"], rows))
    combinations = {(e.linears, e.weights, e.activations, e.packing): None for e in report.engines}
    for linears, weights, activations, packing in combinations:
        title = f"{linears} linears: weights {weights}, activations {activations}, stored as {packing}"
        fits = [e for e in report.engines if (e.weights, e.activations, e.packing) == (weights, activations, packing)]
        rows = [[e.engine, e.loads_as or "no", "; ".join(e.limits), e.known] for e in fits]
        console.print(_table(title, ["engine", "loads as", "limits", "known"], rows))
    for note in report.notes:
        console.print(Text(f"note: {note}"))
    for problem in report.problems[:_SHOWN]:
        console.print(Text(f"problem: {problem}"), soft_wrap=True)
    if len(report.problems) > _SHOWN:
        console.print(Text(f"... and {len(report.problems) - _SHOWN} more problems (--json FILE contains all)"))
    size = f"{report.linears} quantized linears, {report.skipped} skipped, {report.bytes:,} bytes"
    console.print(Text(f"{'sound' if report.ok else 'NOT sound'}: {size}, {sum(report.checks.values()):,} checks"))


def _ask(out: Path, python: Path, gpus: Sequence[str], tp: int, timeout: float, console: Console) -> Selected:
    """What vLLM's own code says of a folder."""
    from qkit.files.record import packed_record
    from qkit.workflows.asked_engine import ask_result

    reporter = Reporter(console, command_line())
    with reporter.running():
        return ask_result(out, packed_record(out)["linears"], python, reporter, gpus, tp, timeout)


def _tell_of_refusal(report: Report, out: Path, gpus: Sequence[str], asked: bool, console: Console) -> None:
    """Says that vLLM does not load a result on some of these kinds of GPU; raises Unsupported where vLLM was asked for."""
    from qkit.planning.engine_rules import TITLES, others_that_load, refused_by  # here: the help waits for no torch

    lines = engine_lines(report.engines)
    line = next((line for line in lines if line.engine == TITLES["vllm"]), None)
    why = None if line is None else refused_by(line, {"gpu": ",".join(gpus)}, str(out))
    if line is None or why is None:
        return
    refusal = f"{why}{others_that_load(line, lines)}"
    if asked:
        raise Unsupported(refusal)
    console.print(Text(f"warning: {refusal}"), soft_wrap=True)


@click.command("verify", cls=Verb)
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--job", type=click.Path(path_type=Path), help="Job folder whose journal every weight is compared with.")
@click.option(
    "--source",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    help="Folder of the model that OUT was made from, for results of --prune-experts: experts that stay are compared with it.",
)
@click.option(
    "--engine",
    type=click.Choice(list(ENGINES)),
    help="Also run the file in this engine and compare its log-probabilities with qkit's own.",
)
@click.option("--python", type=click.Path(path_type=Path), help="Python interpreter that has the engine of --engine.")
@click.option(
    "--gpu", help=f"{GPU_HELP}: vLLM's own code is asked what it selects there, with --engine vllm. Nothing is run."
)
@click.option(
    "--tp", type=click.IntRange(1), default=1, show_default=True, help=f"{TP_HELP}, for the table of engines."
)
@click.option(
    "--engine-timeout",
    type=click.FloatRange(1),
    default=TIMEOUT,
    show_default=True,
    help="Seconds that the engine may take.",
)
@click.option("--json", "json_file", type=OutFile(), help="JSON file for the report.")
def verify_command(
    out: Path,
    job: Path | None,
    source: Path | None,
    engine: str | None,
    python: Path | None,
    gpu: str | None,
    tp: int,
    engine_timeout: float,
    json_file: Path | None,
) -> None:
    """Verify that the packed checkpoint in OUT is complete and correct.

    The command reads every byte with a decoder that shares no code with the writer. With --engine, a real engine then runs the
    file in its own Python environment. The exit code is 4 if anything is wrong, and 3 if vLLM refuses the file on the GPUs of
    --engine vllm --gpu.

    \b
    Example:
      qkit verify out/tiny-llama-w4a16 --json verify.json
      qkit verify out/tiny-llama-w4a16 --engine vllm --python VENV/bin/python
      qkit verify out/w4a16 --engine vllm --python VENV/bin/python --gpu sm90
    """
    chosen = require_python(engine, python)
    if gpu is not None and engine not in (None, "vllm"):
        raise UsageError(f"--gpu {gpu}: only vLLM's choice of kernels can be asked for: use --engine vllm")
    gpus = parse_gpus(gpu)
    if source is not None and (read_record(out) or {}).get("experts") is None:
        raise UsageError(
            f"--source {source}: it is for results of --prune-experts, whose experts are compared with the source, and {out} "
            "is none: leave it out"
        )
    console = Console()
    if out.is_file() and (out.parent / RECORD).is_file():  # model.gguf in a result of qkit
        out = out.parent
    if gpu is not None and (out / "config.json").is_file() and not (out / RECORD).is_file():
        raise UsageError(
            f"--gpu {gpu}: {out} has no {RECORD}, as only results of qkit have one, and vLLM is asked by what it lists: "
            f"'qkit doctor {out}' says which GPUs load the folder, and --engine vllm without --gpu runs it"
        )
    file = gguf_file(out, engine)
    if chosen is not None:
        require_engine(ENGINES[chosen[0]], chosen[1])  # seen at once, and reading all bytes may take long
    foreign = out.is_dir() and gpu is None and chosen is not None and (out / "config.json").is_file()
    if (file is not None or foreign) and not (out / RECORD).is_file():
        # What another tool wrote has no record: there the engine is all that is asked.
        report = Report(notes=[UNRECORDED])
        console.print(Text(f"note: {file or out}: {UNRECORDED}"), soft_wrap=True)
    else:
        report = verify(out, job, source)
        if report.engines and (gpu is not None or tp > 1):
            selected = (
                None if chosen is None or gpu is None else _ask(out, chosen[1], gpus, tp, engine_timeout, console)
            )
            on = Deployment(platforms=gpus, ranks=tp, selected=selected)
            report = replace(report, engines=engine_table(out, on))
        show(report, console)
    proof = None
    if chosen is not None and gpu is None and report.ok:
        from qkit.workflows.engine_proof import prove, proved_rows

        console.print(Text(f"running {file or out} in {ENGINES[chosen[0]].title}, with {chosen[1]}"), soft_wrap=True)
        proof = prove(file or out, *chosen, engine_timeout, report.engines)
        report = replace(report, engines=proved_rows(report.engines, proof))
        show_proof(proof, console)
    if json_file is not None:
        content = report.to_json() | ({} if proof is None else {"engine_proof": proof.to_json()})
        write_atomic(json_file, json_bytes(content | {"ok": report.ok and (proof is None or proof.ok)}))
    if report.ok and gpu is not None:
        _tell_of_refusal(report, out, gpus, engine is not None, console)
    if not report.ok:
        raise VerifyFailure(summary(report) + ("" if chosen is None else "; the engine was not run"))
    if proof is not None and not proof.ok:
        raise VerifyFailure(proof.verdict)
