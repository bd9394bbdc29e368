"""qkit demo: all steps once, with the embedded reference model."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.text import Text

from qkit.commands.common import OutFile, OutFolder, Reporter, announce, megabytes, print_wide, wide_table, write_json
from qkit.commands.grid import Grid, printable
from qkit.commands.measured import progress_bar
from qkit.commands.verb import Verb
from qkit.evaluation.request import EvalRequest
from qkit.files.embedded import embedded_text
from qkit.files.locate import find_model
from qkit.files.output import check_output_dir, remove_result
from qkit.planning.request import Request
from qkit.system.extras import require

MODEL = "tiny-llama"
SCHEMES = ("W4A16", "W4A8")
METHOD = "gptq"
WINDOWS = 24  # of 512 tokens: enough for the differences to show, seconds on two cores
PROMPT = "When she came home in the evening,"


@click.command("demo", cls=Verb)
@click.option("--work", type=OutFolder(), default="qkit-demo", show_default=True, help="Folder of the demo.")
@click.option("--overwrite", is_flag=True, help="Replace the results of an earlier demo in this folder.")
@click.option("--json", "json_file", type=OutFile(), help="JSON file for the figures.")
def demo_command(work: Path, overwrite: bool, json_file: Path | None) -> None:
    """Quantize the embedded reference model to W4A16 and W4A8, verify both results, and compare them with the original.

    The demo takes about a minute on two cores and needs no network.

    \b
    Example:
      qkit demo --work demo --json demo.json
    """
    console = Console()
    began = time.monotonic()
    require("the demo", "demo", "qkit_data")
    original = find_model(MODEL)
    check_output_dir(work, original, overwrite, replace=False)
    work.mkdir(parents=True, exist_ok=True)
    announce(console, f"quantizing {MODEL} in {work}")
    reporter = Reporter(console, f"qkit demo --work {work} --overwrite")
    rows = []
    for scheme in SCHEMES:
        console.print(f"{MODEL} to {scheme} with {METHOD}, calibrated with the embedded text")
        with reporter.running():
            made = _make(scheme, work / scheme, reporter)
        console.print(f"{scheme}: quantized and verified with {made['checks']:,} checks, {made['seconds']:.1f} s")
        rows.append(made | _measured(work / scheme, original))
    rows.insert(0, _original(rows[0], original))
    print_wide(console, _table(rows))
    for row in rows:
        console.print(Text(f"{row['model']}: {PROMPT}{printable(row['text'])}"), soft_wrap=True)
    console.print(Text(f"{work}: both models, in {time.monotonic() - began:.0f} s"))
    write_json(json_file, {"prompt": PROMPT, "rows": rows})


def _make(scheme: str, out: Path, reporter: Reporter) -> dict[str, Any]:
    """Quantize and verify. The job of a stopped demo is continued, a finished result is made again."""
    from qkit.files.job_folder import remove_job
    from qkit.workflows.quantize import quantize

    job = out.with_name(out.name + ".job")
    if out.exists():
        remove_result(out)
        remove_job(job)
    began = time.monotonic()
    report = quantize(Request(model=MODEL, scheme=scheme, method=METHOD), out, reporter, work=job)
    return {"model": scheme, "checks": sum(report.checks.values()), "seconds": time.monotonic() - began}


def _measured(out: Path, original: Path) -> dict[str, Any]:
    """Figures of the packed model, loaded from disk, against the original."""
    from qkit.evaluation.measure import measure

    text = embedded_text("evaluation")
    with progress_bar(Console(stderr=True)) as progress:
        measured = measure(out, original, EvalRequest(texts=[text], windows=WINDOWS), progress)
    (figures,) = measured["texts"].values()
    return {
        "bytes": measured["size"]["bytes"],
        "baseline_bytes": measured["size"]["baseline_bytes"],
        "perplexity": figures["perplexity"],
        "baseline_perplexity": figures["baseline_perplexity"],
        "change_percent": figures["change_percent"],
        "kl_mean": figures["kl"]["mean"],
        "same_top1": figures["same_top1"],
        "text": _continuation(out),
    }


def _original(row: dict[str, Any], original: Path) -> dict[str, Any]:
    """The row of the original, from a comparison with it."""
    return {
        "model": "original",
        "bytes": row["baseline_bytes"],
        "perplexity": row["baseline_perplexity"],
        "text": _continuation(original),
    }


def _continuation(folder: Path) -> str:
    """The greedy continuation of the prompt, on one line."""
    import torch

    from qkit.runtime.loading import load, load_tokenizer

    tokenizer, model = load_tokenizer(folder), load(folder, dtype=torch.float32)
    ids = tokenizer(PROMPT, return_tensors="pt")["input_ids"]
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=24,
        do_sample=False,
        pad_token_id=model.config.eos_token_id,
    )
    text: str = tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
    return " " + " ".join(text.split())


def _table(rows: list[dict[str, Any]]) -> Grid:
    columns = ("model", "bytes", "ratio", "perplexity", "change", "KL mean", "same top-1")
    title = f"{MODEL} on the embedded evaluation text, {WINDOWS} windows of 512"
    table = wide_table(*columns, title=title)
    for row in rows:
        ratio = row["bytes"] / rows[0]["bytes"]
        cells = [row["model"], megabytes(row["bytes"]), f"{ratio:.3f}x", f"{row['perplexity']:.2f}"]
        if "kl_mean" in row:
            cells += [f"{row['change_percent']:+.2f} %", f"{row['kl_mean']:.4f}", f"{row['same_top1']:.4f}"]
        table.add_row(*map(Text, cells))
    return table
