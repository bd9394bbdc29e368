"""qkit bench: the speed of products and models, compared with the limits of the machine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console
from rich.text import Text

from qkit.benchmark.shapes import MODELS, Shape, model_shapes, parse_shapes
from qkit.commands.common import (
    OutFile,
    Reporter,
    announce,
    command_line,
    megabytes,
    print_wide,
    wide_table,
    write_json,
)
from qkit.commands.verb import OptionGroup, Verb, in_group
from qkit.errors import UsageError
from qkit.files.safefile import write_atomic
from qkit.sensitivity.candidates import Candidate, parse_candidates
from qkit.system.extras import require

if TYPE_CHECKING:
    import torch

    from qkit.benchmark.decode import DecodeTiming
    from qkit.benchmark.host import Host

SECONDS = 0.5  # that a contender may take at a number of rows, cold, and again warm
ROUNDS = 5  # of each model in 'decode'
_DTYPES = {"bf16": "bfloat16", "float32": "float32"}  # as torch names them
_PRODUCTS = ("shapes", "formats", "group_size", "rows", "table", "figure")
_DECODE = ("prompt_tokens", "new_tokens", "baseline")

_MOST_USED, _PRODUCT = in_group(OptionGroup.MOST_USED), in_group(OptionGroup.PRODUCTS)
_DECODING, _DEVICE = in_group(OptionGroup.DECODING), in_group(OptionGroup.DEVICE)


@click.command("bench", cls=Verb)
@click.argument("what", type=click.Choice(["gemv", "gemm", "decode"]))
@_MOST_USED("--shapes", help=f"Shapes of the weights: {', '.join(MODELS)} or OUTxIN, separated by commas.")
@_MOST_USED("--model", help="Model, packed or not, for its shapes; the model to run with 'decode'.")
@_MOST_USED(
    "--formats", help="Weight formats: int2..int8, nvfp4, w8a8, .., or bf16 for no quantization (default: int4)."
)
@_MOST_USED("--m", "rows", help="Rows of activations, separated by commas (default: 1,4,16; gemm: 64,256).")
@_MOST_USED("--threads", type=click.IntRange(1), help="Number of threads of the products (default: torch's).")
@_MOST_USED("--json", "json_file", type=OutFile(), help="JSON file for the printed results.")
@_PRODUCT("--group-size", type=int, help="Weights per scale of the integer formats.")
@_PRODUCT(
    "--table", type=OutFile(), help="JSON file for the times of --model, for --latency. Nothing else is measured."
)
@_PRODUCT("--figure", type=OutFile(), help="PNG file for a figure of the times against the bandwidth floor.")
@_DECODING("--baseline", help="Original model, run in bf16 and in float32 for comparison.")
@_DECODING("--prompt-tokens", type=click.IntRange(1), help="Tokens of the prompt (default: 32).")
@_DECODING("--new-tokens", type=click.IntRange(1), help="Tokens to decode after the first one (default: 64).")
@_DEVICE("--dtype", type=click.Choice([*_DTYPES]), help="Number format of activations (default: bf16).")
@_DEVICE(
    "--device",
    type=click.Choice(["cpu", "cuda"]),
    default="cpu",
    show_default=True,
    help="Device of the measured products.",
)
def bench_command(what: str, device: str, threads: int | None, json_file: Path | None, **options: Any) -> None:
    """Measure matrix products of few rows (gemv), of many rows (gemm), or whole models (decode).

    Times are shown for weights in memory (cold) and in the cache (warm). They are compared with the floor that the memory
    bandwidth of this machine sets, with dense products, and with other installed libraries.

    \b
    Example:
      qkit bench gemv --shapes llama-3-8b --formats int4,int8 --m 1,4,16
      qkit bench gemv --model M --formats int4,int8,bf16 --table table.json
      qkit bench decode --model OUT --baseline M
    """
    console = Console()
    foreign = _PRODUCTS if what == "decode" else _DECODE
    wrong = next((name for name in foreign if options[name] is not None), None)
    if wrong is not None:
        option = {"rows": "m"}.get(wrong, wrong.replace("_", "-"))
        raise UsageError(f"--{option} cannot be used with 'bench {what}': leave it out")
    if options["figure"] is not None:
        require("--figure", "report", "matplotlib")
    if what == "decode" and options["model"] is None:
        raise UsageError("'bench decode' needs a model: add --model")
    if what != "decode":
        parse_candidates(options["formats"] or "int4", options["group_size"], "--formats")
        _rows(options["rows"] or "1")
        if (options["shapes"] is None) == (options["model"] is None):
            raise UsageError("no shapes, or two sources of them: use either --shapes or --model")
        if options["shapes"] is not None:
            parse_shapes(options["shapes"])
    announce(console, "measuring the memory of this machine first")

    import torch

    from qkit.benchmark.contenders import check_device
    from qkit.benchmark.host import describe_host, measure_host

    check_device(device)
    if threads is not None:
        torch.set_num_threads(threads)
    reporter = Reporter(console, command_line())
    with reporter.running():
        reporter.start("memory", 1)
        host = measure_host()
        data: dict[str, Any] = {"machine": describe_host(), "bandwidth": host.to_json(), "device": device}
        show_host(data, console)
        measured = decode_models if what == "decode" else products
        data.update(measured(what, device, options, host, reporter, console))
    data["clock_mhz_after"] = describe_host()["clock_mhz"]
    write_json(json_file, data)


def products(
    what: str, device: str, options: Mapping[str, Any], host: Host, reporter: Reporter, console: Console
) -> dict[str, Any]:
    """gemv and gemm: one table per product, or the latency table."""
    import torch

    from qkit.benchmark.contenders import random_product
    from qkit.benchmark.figure import time_figure
    from qkit.benchmark.products import compare, make_entrants, product_record
    from qkit.report.figures import png

    candidates = parse_candidates(options["formats"] or "int4", options["group_size"], "--formats")
    dtype: torch.dtype = getattr(torch, _DTYPES[options["dtype"] or "bf16"])
    rows = _rows(options["rows"] or ("64,256" if what == "gemm" else "1,4,16"))
    shapes = _shapes(options)
    if options["table"] is not None:
        return write_table(options, candidates, shapes, dtype, device, host, reporter, console)
    timings = []
    reporter.start("products", len(candidates) * len(shapes) * len(rows))
    for candidate in candidates:
        for shape in shapes:
            p = random_product(candidate, shape, dtype)
            entrants = make_entrants(p, device, host)
            results = []
            for count in rows:
                results += compare(p, entrants, count, host, SECONDS)
                reporter.step()
            del entrants
            timings.append(product_record(p, results))
            show_product(timings[-1], console)
    if options["figure"] is not None:
        write_atomic(options["figure"], png(time_figure(timings)))
        console.print(Text(f"figure: {options['figure']}"))
    return {"what": what, "products": timings}


def write_table(
    options: Mapping[str, Any],
    candidates: Sequence[Candidate],
    shapes: Sequence[Shape],
    dtype: torch.dtype,
    device: str,
    host: Host,
    reporter: Reporter,
    console: Console,
) -> dict[str, Any]:
    """The table of ``--latency``."""
    from qkit.benchmark.table import measure_table

    rows = _rows(options["rows"] or "1")
    if len(rows) > 1 or options["figure"] is not None:
        raise UsageError("--table is for one number of rows and no --figure: use one number for --m, or leave it out")
    reporter.start("table", len(candidates) * len(shapes))
    table, notes = measure_table(
        options["table"], candidates, shapes, dtype, device, rows[0], host, SECONDS, reporter.step
    )
    table.save()
    shown = wide_table("format", *(f"{a}x{b}" for a, b in shapes), title="microseconds")
    names = {(name, group) for name, group, _ in table.seconds}
    for name, group in sorted(names, key=str):
        times = [table.seconds.get((name, group, shape)) for shape in shapes]
        label = name if group is None else f"{name}, {group}"
        shown.add_row(label, *("-" if t is None else f"{t * 1e6:.1f}" for t in times))
    print_wide(console, shown)
    for note in notes:
        console.print(Text(note))
    console.print(Text(f"{table.file}: {len(table.seconds)} times, for --latency TIME@{table.file}"))
    return {"what": "table", "file": str(table.file), "notes": notes}


def decode_models(
    what: str, device: str, options: Mapping[str, Any], host: Host, reporter: Reporter, console: Console
) -> dict[str, Any]:
    """decode: tokens a second of a model, and of its original."""
    import torch

    from qkit.benchmark.decode import decode
    from qkit.runtime.loading import load

    dtype: torch.dtype = getattr(torch, _DTYPES[options["dtype"] or "bf16"])
    models = [(options["model"], load(options["model"], dtype, device))]
    if options["baseline"] is not None:
        models += [
            (f"{options['baseline']}, {n}", load(options["baseline"], getattr(torch, d), device))
            for n, d in _DTYPES.items()
        ]
    reporter.start("decode", ROUNDS * len(models))
    prompt, new = options["prompt_tokens"] or 32, options["new_tokens"] or 64
    timings = decode(models, prompt, new, ROUNDS, host, reporter.step)
    show_decoded(timings, console)
    return {
        "what": what,
        "dtype": options["dtype"] or "bf16",
        "prompt_tokens": prompt,
        "new_tokens": new,
        "models": [d.to_json() for d in timings],
    }


def _shapes(given: Mapping[str, Any]) -> tuple[Shape, ...]:
    return parse_shapes(given["shapes"]) if given["shapes"] is not None else model_shapes(given["model"])


def _rows(text: str) -> tuple[int, ...]:
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdigit() and int(part) for part in parts):
        raise UsageError(f"--m {text}: expected numbers of rows, for instance 1,4,16")
    return tuple(dict.fromkeys(map(int, parts)))


# ---- what is shown ---------------------------------------------------------------------------------------------


def show_host(data: Mapping[str, Any], console: Console) -> None:
    """The machine, in two lines."""
    machine, bandwidth = data["machine"], data["bandwidth"]
    load = "" if machine["load"] is None else f", load {machine['load']:.1f}"
    console.print(
        Text(f"{machine['processor']} ({machine['kind']}), {machine['threads']} of {machine['cores']} cores{load}")
    )
    console.print(
        f"memory: read {bandwidth['read'] / 1e9:.1f} GB/s, copy {bandwidth['copy'] / 1e9:.1f} GB/s; last-level cache "
        f"{bandwidth['cache'] / 2**20:.0f} MiB"
    )


def show_product(product: Mapping[str, Any], console: Console) -> None:
    """One product: a line per number of rows and contender."""
    from qkit.benchmark.contenders import OWN

    group = "" if product["group"] is None else f", groups of {product['group']}"
    title = f"{product['format']}{group}, {product['out']} x {product['in']}, {megabytes(product['bytes'])}"
    columns = (
        "rows",
        "contender",
        "cold us: p50 (p20 to p80)",
        "of floor",
        "warm us",
        "x bf16 (ideal)",
        "x float32",
        "error",
    )
    table = wide_table(*columns, title=title)
    for r in product["results"]:
        name = r["contender"] + (f" ({r['operator']})" if r["operator"] else "")
        cells = [str(r["rows"]), name]
        if r["refused"]:
            cells += ["refused", "", "", "", ""]
        else:
            cold, speed = r["cold"], r["speedup"]
            cells += [
                f"{cold['p50'] * 1e6:.1f} ({cold['p20'] * 1e6:.1f} to {cold['p80'] * 1e6:.1f})",
                f"{r['share']:.0%}",
                f"{r['warm']['p50'] * 1e6:.1f}",
                *(
                    f"{s['cold']:.2f}" + (f" ({s['ideal']:.2f})" if i == 0 else "") if (s := speed.get(n)) else ""
                    for i, n in enumerate(("dense bf16", "dense float32"))
                ),
            ]
        mark = "" if r["repeats"] else ", varies"
        table.add_row(*map(Text, (*cells, f"{r['error']:.2g}{mark}")), style="bold" if r["contender"] == OWN else "")
    print_wide(console, table)
    for r in product["results"]:
        if r["refused"]:
            console.print(Text(f"refused: {r['contender']}, {r['rows']} rows: {r['refused']}"))


def show_decoded(timings: Sequence[DecodeTiming], console: Console) -> None:
    """A line per model."""
    columns = ("model", "tokens/s (p80 to p20 of the time)", "prompt ms", "linears", "of floor", "speed-up")
    table = wide_table(*columns, title="decode")
    first = timings[0]
    for d in timings:
        if d.refused:
            table.add_row(Text(d.name), "refused", "", megabytes(d.size), "", "")
            continue
        t = d.token
        faster = "" if d is first or first.refused else f"{t.p50 / first.token.p50:.2f}x of it"
        table.add_row(
            Text(d.name),
            f"{1 / t.p50:.1f} ({1 / t.p80:.1f} to {1 / t.p20:.1f})",
            f"{d.prompt * 1e3:.1f}",
            megabytes(d.size),
            "-" if d.floor is None else f"{d.floor / t.p50:.0%}",
            Text(faster),
        )
    print_wide(console, table)
    for d in timings:
        if d.refused:
            console.print(Text(f"refused: {d.name}: {d.refused}"))
