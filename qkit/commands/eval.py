"""qkit eval: what quantization cost, measured on the packed model."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
import qkit_data
from rich.console import Console
from rich.progress import Progress, TaskID
from rich.table import Table
from rich.text import Text

from qkit.commands.common import OutFile, print_wide, wide_table
from qkit.errors import UsageError
from qkit.evaluation import text
from qkit.evaluation.measure import DTYPES, EvalRequest, jsonable, measure
from qkit.evaluation.vbench import dimensions_of
from qkit.kvcache.policy import Policy, parse, stored
from qkit.pairs import QUESTIONS
from qkit.safefile import write_atomic

PATIENCE = 2.0  # seconds before a progress bar appears
EXAMPLES = 12  # pictures of a report


@click.command("eval")
@click.argument("out")
@click.option("--baseline", help="The original model: adds its perplexity, the change, KL divergence, same top-1.")
@click.option("--text", "texts", multiple=True, help="FILE, NAME=FILE or dataset:NAME[:config][:split][:column].")
@click.option("--window", default=512, show_default=True, type=click.IntRange(2), help="Tokens per window.")
@click.option("--windows", default=200, show_default=True, type=click.IntRange(1), help="Windows per text, at most.")
@click.option("--tasks", help="Tasks of lm-eval or qkit, separated by commas, or vbench:DIMENSION,...")
@click.option("--limit", type=click.IntRange(1), help="Samples per task, at most.")
@click.option(
    "--kv",
    "kv",
    multiple=True,
    metavar="POLICY",
    help="KV caches to compare by decoding: pm-kvq:2, kivi2, int8, ..; stored is that of OUT.",
)
@click.option("--prompt", type=click.IntRange(1), help="Tokens of a window before decoding begins (default: half).")
@click.option(
    "--kv-step", default=1, show_default=True, type=click.IntRange(1), help="Tokens that are decoded at a time."
)
@click.option(
    "--retrieval", is_flag=True, help="Compare the caches by what can be retrieved through them, not by decoding."
)
@click.option("--pairs", help="Questions about pictures: drawn, a file of JSON lines, or a folder as for --calib.")
@click.option("--questions", type=click.IntRange(1), help="Questions of --pairs, at most (default: 500).")
@click.option("--videos", type=click.IntRange(1), help="Of a diffusion pipeline: prompts and seeds to sample.")
@click.option("--vbench-python", type=click.Path(path_type=Path), help="The interpreter that VBench is installed for.")
@click.option("--videos-dir", type=click.Path(path_type=Path), help="Keep the videos that VBench judges there.")
@click.option(
    "--report",
    "report_file",
    type=OutFile(),
    help="Write a page with pictures and answers to this file.",
)
@click.option("--dtype", default="float32", show_default=True, type=click.Choice(list(DTYPES)), help="Of arithmetic.")
@click.option("--device", default="cpu", show_default=True, help="cpu, cuda, cuda:1, ...")
@click.option("--task-dir", type=click.Path(path_type=Path), help="A folder of further lm-eval task files.")
@click.option("--allow-task-code", is_flag=True, help="Let the task files of --task-dir run code.")
@click.option("--json", "json_file", type=OutFile(), help="Write the figures to this file.")
def eval_command(
    out: str,
    baseline: str | None,
    texts: tuple[str, ...],
    window: int,
    windows: int,
    tasks: str | None,
    limit: int | None,
    kv: tuple[str, ...],
    prompt: int | None,
    kv_step: int,
    retrieval: bool,
    pairs: str | None,
    questions: int | None,
    videos: int | None,
    vbench_python: Path | None,
    videos_dir: Path | None,
    report_file: Path | None,
    dtype: str,
    device: str,
    task_dir: Path | None,
    allow_task_code: bool,
    json_file: Path | None,
) -> None:
    """Measure the model in the folder OUT: perplexity of texts, accuracy on tasks, answers about pictures, videos.

    Without --text, --tasks and --pairs the evaluation text that comes with qkit is used. A quantized folder is loaded packed;
    every text is tokenised whole and cut into windows, and intervals are 95 %, over windows.

    \b
    Example:
      qkit eval out/tiny-llama-w4a16 --baseline tiny-llama --text wiki.txt --json eval.json
    """
    from qkit.locate import find_model

    names = split_names(tasks)
    bench = dimensions_of(names)
    if (videos or bench) and (texts or pairs or kv or retrieval or len(names) > len(bench)):
        raise UsageError("--videos is about diffusion pipelines, and the other measurements are not; leave one out")
    if not bench and (vbench_python or videos_dir):
        raise UsageError(
            "--vbench-python and --videos-dir are about --tasks vbench:..., and there is none; leave them out"
        )
    if not texts and not videos and (kv or retrieval or not (names or pairs)):
        texts = (str(qkit_data.text_path("evaluation")),)
    if allow_task_code and task_dir is None:
        raise UsageError("--allow-task-code is about the files of --task-dir, and there is none; leave it out")
    caches = [_cache(name, find_model(out)) for policies in kv for name in split_names(policies) if name != "none"]
    if not caches and kv_step != 1 and not retrieval:
        raise UsageError("--kv-step is about the caches of --kv, and there is none; leave it out")
    if prompt is not None and not caches:
        raise UsageError("--prompt is about the caches of --kv, and there is none; leave it out")
    if retrieval and (prompt is not None or kv_step != 1):
        raise UsageError("--prompt and --kv-step are about decoding, and --retrieval takes its place; leave them out")
    if pairs is None and (questions is not None or (report_file is not None and (bench or not videos))):
        raise UsageError(
            "--questions and --report are about --pairs (or --videos), and there are none; add --pairs drawn"
        )
    request = EvalRequest(
        texts,
        window,
        windows,
        names,
        limit,
        task_dir,
        allow_task_code,
        dtype,
        device,
        caches,
        prompt,
        kv_step,
        retrieval,
        pairs,
        QUESTIONS if questions is None else questions,
        0 if report_file is None else EXAMPLES,
        videos or 0,
        vbench_python,
        videos_dir,
    )
    original = None if baseline is None else find_model(baseline)
    with progress_bar(Console(stderr=True)) as progress:
        measured = measure(find_model(out), original, request, progress)
    samples = measured.pop("samples", None)
    if json_file is not None:
        write_atomic(json_file, json_bytes(measured))
    if report_file is not None and samples is not None:
        from qkit.report.videos import strips, videos_page

        write_atomic(report_file, videos_page(measured, strips(*samples)).encode())
    if report_file is not None and pairs is not None:
        from qkit.report.pairs import pairs_page

        (name,) = measured["pairs"]
        write_atomic(report_file, pairs_page(measured, name, pairs, request.questions).encode())
    show(measured, Console())


def split_names(tasks: str | None) -> list[str]:
    """'a, b' -> ['a', 'b'], each once."""
    return list(dict.fromkeys(name.strip() for name in (tasks or "").split(",") if name.strip()))


def json_bytes(value: Any) -> bytes:
    return (json.dumps(jsonable(value), indent=1, allow_nan=False) + "\n").encode()


@contextmanager
def progress_bar(console: Console) -> Iterator[text.Progress | None]:
    """A bar per text on a terminal, from the third second on; nothing elsewhere."""
    if not console.is_terminal:
        yield None
        return
    start = time.monotonic()
    bar = Progress(console=console, transient=True)
    shown: dict[str, TaskID] = {}

    def advance(name: str, done: int, total: int) -> None:
        if time.monotonic() - start < PATIENCE:
            return
        bar.start()
        if name not in shown:
            shown[name] = bar.add_task(printable(name), total=total)
        bar.update(shown[name], completed=done)

    try:
        yield advance
    finally:
        bar.stop()


def _cache(name: str, folder: Path) -> Policy:
    """The policy of that name, or the checkpoint's own. Raises UsageError where widths would have to be chosen first."""
    if name == "stored":
        found = stored(folder)
        if found is None:
            raise UsageError(f"--kv stored: {folder} was quantized without --kv: name a policy, for instance kivi2")
        return found
    found = parse(name)
    if len(found.widths) > 1:
        raise UsageError(
            f"--kv {name}: which layer gets which width is decided by 'qkit quantize --kv {name} --kv-memory ..': then give "
            "'stored' here, or else one width, as in pm-kvq:2"
        )
    return found


def show(measured: Mapping[str, Any], console: Console) -> None:
    """Prints the tables of what was measured."""
    if measured.get("texts"):
        print_wide(console, texts_table(measured["texts"]))
    for text_, caches in measured.get("caches", {}).items():
        print_wide(console, caches_table(text_, caches))
    for text_, caches in measured.get("retrieval", {}).items():
        print_wide(console, retrieval_table(text_, caches))
    for name, figures in measured.get("pairs", {}).items():
        print_wide(console, accuracy_table(name, figures))
        print_wide(console, answers_table(name, figures))
    if "videos" in measured:
        print_wide(console, videos_table(measured["videos"]))
    if measured.get("tasks"):
        print_wide(console, tasks_table(measured["tasks"], measured.get("baseline_tasks", {})))


def caches_table(text: str, caches: Mapping[str, Mapping[str, Any]]) -> Table:
    """A row per cache: perplexity by decoding, and the bytes that a sequence takes in the end."""
    columns = ("KV cache", "perplexity", "change % (95 % ci)", "same greedy", "kB", "of 16 bits")
    table = wide_table(*columns, title=f"decoding {printable(text)}", title_justify="left")
    for name, entry in caches.items():
        change = (
            f"{entry['change_percent']:+.2f} {_interval(entry['change_ci'], '+.2f')}" if "change_ci" in entry else ""
        )
        cells = [name, f"{entry['perplexity']:.2f}", change, f"{entry['same_greedy']:.1f}"]
        table.add_row(*map(Text, [*cells, f"{entry['bytes'] / 1e3:,.0f}", f"{entry['share']:.3f}"]))
    return table


def retrieval_table(text: str, caches: Mapping[str, Sequence[Mapping[str, Any]]]) -> Table:
    """A row per cache, task, length and depth."""
    choices = next(iter(caches.values()))[0]["choices"]
    best = f"best of {choices} % (chance {100 / choices:.1f})"
    columns = ("KV cache", "of 16 bits", "task", "tokens", "depth", "nats/token", "gain (95 % ci)", "exact %", best)
    table = wide_table(*columns, title=f"retrieval from {printable(text)}", title_justify="left")
    for name, rows in caches.items():
        for row in rows:
            gain = f"{row['gain']:+.2f} {_interval(row['gain_ci'], '+.2f')}"
            cells = [name, f"{row['share']:.3f}", row["task"], f"{row['length']:,}", f"{row['depth']:.2f}"]
            cells += [f"{row['nll']:.2f}", gain, f"{100 * row['exact']:.0f}", f"{100 * row['best']:.0f}"]
            table.add_row(*map(Text, cells))
    return table


def accuracy_table(name: str, figures: Mapping[str, Any]) -> Table:
    """A row per kind of question, and one of all."""
    paired = "baseline_percent" in figures["accuracy"]
    extra = ("baseline", "change (95 % ci)") if paired else ()
    title = f"exactly right answers, {printable(name)}"
    table = wide_table("kind", "questions", "right % (95 % ci)", *extra, title=title, title_justify="left")
    for kind, entry in [*figures["kinds"].items(), ("all", figures)]:
        found = entry["accuracy"]
        cells = [printable(kind), str(entry["questions"]), f"{found['percent']:.1f} {_interval(found['ci'], '.1f')}"]
        if paired:
            change = f"{found['change']:+.1f} {_interval(found['change_ci'], '+.1f')}"
            cells += [f"{found['baseline_percent']:.1f}", change]
        table.add_row(*map(Text, cells))
    return table


def answers_table(name: str, figures: Mapping[str, Any]) -> Table:
    """What likelihoods of the right answers' tokens say; with a baseline also how far hidden states are from its own."""
    rows = {"perplexity (95 % ci)": f"{figures['perplexity']:.4f} {_interval(figures['ci'], '.4f')}"}
    if "kl" in figures:
        kl = figures["kl"]
        rows |= {
            "baseline": f"{figures['baseline_perplexity']:.4f} {_interval(figures['baseline_ci'], '.4f')}",
            "change %": f"{figures['change_percent']:+.2f} {_interval(figures['change_ci'], '+.2f')}",
            "KL mean": f"{kl['mean']:.4g} {_interval(kl['ci'], '.4g')}",
            "KL p99": f"{kl['p99']:.4g}",
            "same top-1": f"{figures['same_top1']:.4f}",
        }
        for kind, error in figures["errors"].items():
            rows[f"error of hidden states, {kind} tokens"] = f"{error['mean']:.4g} {_interval(error['ci'], '.4g')}"
    table = wide_table(
        "answer tokens", str(figures["tokens"]), title=f"answers, {printable(name)}", title_justify="left"
    )
    for what, value in rows.items():
        table.add_row(Text(what), Text(value))
    return table


def videos_table(figures: Mapping[str, Any]) -> Table:
    """A row per figure with its interval."""
    table = wide_table("figure", "value (95 % ci)", title=f"{figures['videos']} samples", title_justify="left")
    units = {
        "psnr": "PSNR, dB",
        "ssim": "SSIM",
        "latent_error": "error of latents, last step",
        "width": "bits of inputs",
    }
    for key, value in figures.items():
        name = units.get(key, key.replace("_", " "))
        if isinstance(value, list) and key not in ("latent_errors", "bits", "skips"):
            table.add_row(name, Text(f"{value[0]:.4g} {_interval(value[1:], '.4g')}"))
        elif isinstance(value, (int, float)) and key != "videos":
            table.add_row(name, f"{value:.4g}")
    return table


def texts_table(texts: Mapping[str, Mapping[str, Any]]) -> Table:
    """Columns without a baseline: the first three."""
    paired = any("kl" in entry for entry in texts.values())
    extra = ("baseline", "change %", "KL mean", "KL p99", "same top-1") if paired else ()
    table = wide_table("text", "perplexity (95 % ci)", "windows", *extra, title="texts", title_justify="left")
    for name, entry in texts.items():
        cells = [printable(name), f"{entry['perplexity']:.2f} {_interval(entry['ci'], '.2f')}", str(entry["windows"])]
        if paired:
            cells += [
                f"{entry['baseline_perplexity']:.2f}",
                f"{entry['change_percent']:+.2f} {_interval(entry['change_ci'], '+.2f')}",
                f"{entry['kl']['mean']:.4g}",
                f"{entry['kl']['p99']:.4g}",
                f"{entry['same_top1']:.4f}",
            ]
        table.add_row(*map(Text, cells))
    return table


def tasks_table(tasks: Mapping[str, Any], baseline: Mapping[str, Any]) -> Table:
    extra = ("baseline", "change (95 % ci)") if baseline else ()
    table = wide_table("task", "metric", "value (95 % ci)", "samples", *extra, title="tasks", title_justify="left")
    for task, entry in tasks.items():
        for metric, figures in entry["metrics"].items():
            value = f"{figures['value']:.4g}" + (f" {_interval(figures['ci'], '.4g')}" if figures["ci"] else "")
            cells = [printable(task), printable(metric), value, str(entry["samples"])]
            if baseline:
                before = baseline.get(task, {}).get("metrics", {}).get(metric)
                cells.append("" if before is None else f"{before['value']:.4g}")
                paired = "change" in figures
                cells.append(f"{figures['change']:+.4g} {_interval(figures['change_ci'], '+.4g')}" if paired else "")
            table.add_row(*map(Text, cells))
    return table


def _interval(ends: list[float], form: str) -> str:
    """'[low, high]'; nothing where one window gives no spread."""
    if any(end != end for end in ends):
        return ""
    return f"[{ends[0]:{form}}, {ends[1]:{form}}]"


def printable(name: str) -> str:
    """A name as it can be shown: no control characters, which could change the terminal."""
    return "".join(letter if letter.isprintable() else "?" for letter in name)
