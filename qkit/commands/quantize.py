"""qkit quantize: from a checkpoint to a packed, proven checkpoint."""

from __future__ import annotations

import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.text import Text

from qkit.allocation.allocate import parse_bytes
from qkit.commands.budget import budget_options, decided_request, show_allocation
from qkit.commands.common import (
    Reporter,
    command_line,
    megabytes,
    request_options,
    show_coverage,
    write_json,
)
from qkit.commands.plan import plan_json, show_forecast
from qkit.errors import UsageError
from qkit.kvplan import CachePlan, plan_cache
from qkit.memory import bound_heap
from qkit.pipeline import prepare, quantize


@click.command("quantize")
@request_options
@budget_options
@click.option("--kv", metavar="POLICY", help="KV cache to run with: pm-kvq:4-2, kivi2, int8 or rotate4.")
@click.option("--kv-memory", help="Budget of the KV cache of a sequence of --max-length tokens, for instance 2GB.")
@click.option(
    "--max-length", type=click.IntRange(1), help="Tokens that the KV cache is made for (default: the model's)."
)
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Folder of the result; must not exist.")
@click.option("--work", type=click.Path(path_type=Path), help="Job folder (default: OUT.job).")
@click.option("--overwrite", is_flag=True, help="Replace what is in OUT, once the new result is proven.")
@click.option("--keep-job", is_flag=True, help="Keep the parts in the job folder after success.")
def quantize_command(
    json_file: Path | None,
    out: Path,
    work: Path | None,
    overwrite: bool,
    keep_job: bool,
    kv: str | None,
    kv_memory: str | None,
    max_length: int | None,
    **given: Any,
) -> None:
    """Quantize a model into a packed checkpoint, and prove it.

    The same command goes on after a stop, a crash or a kill.

    \b
    Example:
      qkit quantize --model tiny-llama --scheme w4a16 --method gptq --out out
    """
    bound_heap()
    console = Console()
    began = time.monotonic()
    request, budgeted = decided_request(given, out, work, console)
    if kv is None and (kv_memory or max_length):
        raise UsageError("--kv-memory and --max-length are about the cache of --kv, and there is none; leave them out")
    reporter = Reporter(console, command_line())
    cache = None
    if kv is not None:
        with reporter.running():
            memory = None if kv_memory is None else parse_bytes(kv_memory, "--kv-memory")
            cache = plan_cache(request, kv, memory, max_length, reporter)
        request = replace(request, kv=cache.policy.to_json())
    found = prepare(request)
    if budgeted is not None:
        show_allocation(budgeted, console)
    show_coverage(found, console)
    show_forecast(found, console)
    if cache is not None:
        show_cache(cache, console)
    with reporter.running():
        report = quantize(
            request,
            out,
            reporter,
            work=work,
            overwrite=overwrite,
            keep_job=keep_job,
            prepared=found,
        )
    console.print(
        Text(
            f"{out}: {report.linears} quantized linears, {megabytes(report.bytes)}, verified with "
            f"{sum(report.checks.values()):,} checks, {time.monotonic() - began:.1f} s"
        )
    )
    for engine in sorted({e.engine + ": " + e.loads_as for e in report.engines if e.loads_as}):
        console.print(Text(f"loads in {engine}"))
    allocation = {} if budgeted is None else {"allocation": asdict(budgeted.allocation)}
    write_json(json_file, {**plan_json(found), **allocation})


def show_cache(found: CachePlan, console: Console) -> None:
    """Which cache, what it takes, and the final widths of the layers."""
    p = found.policy
    share = f"{megabytes(found.bytes)}, {found.bytes / found.plain_bytes:.3f} of 16 bits"
    console.print(Text(f"KV cache: {p.name}, {share}" + (f", at {p.length} tokens of a sequence" if p.length else "")))
    if p.finals and len(set(p.finals)) > 1:
        console.print(Text("final bits by layer: " + " ".join(map(str, p.finals))))
