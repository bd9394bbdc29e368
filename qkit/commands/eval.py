"""qkit eval: what quantization cost, measured on the packed model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.text import Text

from qkit.calibration.options import QUESTIONS
from qkit.commands.common import OutFile, announce
from qkit.commands.measured import (
    grids,
    json_bytes,
    printable,
    progress_bar,
    refuse_unmeasured,
    refuse_unsound,
    show,
    show_all,
)
from qkit.commands.verb import Verb
from qkit.errors import UsageError
from qkit.evaluation.request import DTYPES, EvalRequest, dimensions_of
from qkit.evaluation.sources import text_name
from qkit.files.embedded import embedded_text
from qkit.files.locate import find_model
from qkit.files.rejected import described, read_mark
from qkit.files.safefile import write_atomic
from qkit.kvcache.policy import CachePolicy, parse, stored
from qkit.system.extras import require

EXAMPLES = 12  # pictures of a report


@click.command("eval", cls=Verb)
@click.argument("outs", metavar="OUT...", nargs=-1, required=True)
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
    help="Write a page of what was measured to this file (HTML).",
)
@click.option("--dtype", default="float32", show_default=True, type=click.Choice(list(DTYPES)), help="Of arithmetic.")
@click.option("--device", default="cpu", show_default=True, help="cpu, cuda, cuda:1, ...")
@click.option("--task-dir", type=click.Path(path_type=Path), help="A folder of further lm-eval task files.")
@click.option("--allow-task-code", is_flag=True, help="Let the task files of --task-dir run code.")
@click.option("--json", "json_file", type=OutFile(), help="Write the figures to this file.")
def eval_command(
    outs: tuple[str, ...],
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

    Several folders are measured on the same texts and tasks and shown in one table; --baseline runs once for all of them.
    Folders that qkit wrote are verified first.
    Exit code 4 if one is not sound, or a figure is not a finite number.

    Without --text, --tasks and --pairs the evaluation text that comes with qkit is used. A quantized folder is loaded packed;
    every text is tokenised whole and cut into windows, and intervals are 95 %, over windows.

    \b
    Example:
      qkit eval out/tiny-llama-w4a16 --baseline tiny-llama --text wiki.txt --json eval.json
      qkit eval out/w4a16 out/w8a16 --baseline tiny-llama --report eval.html
    """
    names = split_names(tasks)
    bench = dimensions_of(names)
    if (videos or bench) and (texts or pairs or kv or retrieval or len(names) > len(bench)):
        raise UsageError("--videos is about diffusion pipelines, and the other measurements are not; leave one out")
    if not bench and (vbench_python or videos_dir):
        raise UsageError(
            "--vbench-python and --videos-dir are about --tasks vbench:..., and there is none; leave them out"
        )
    if not texts and not videos and (kv or retrieval or not (names or pairs)):
        texts = (str(embedded_text("evaluation")),)
    if allow_task_code and task_dir is None:
        raise UsageError("--allow-task-code is about the files of --task-dir, and there is none; leave it out")
    caches = [_cache(name, outs[0]) for policies in kv for name in split_names(policies) if name != "none"]
    if not caches and kv_step != 1 and not retrieval:
        raise UsageError("--kv-step is about the caches of --kv, and there is none; leave it out")
    if prompt is not None and not caches:
        raise UsageError("--prompt is about the caches of --kv, and there is none; leave it out")
    if retrieval and (prompt is not None or kv_step != 1):
        raise UsageError("--prompt and --kv-step are about decoding, and --retrieval takes its place; leave them out")
    if pairs is None and questions is not None:
        raise UsageError("--questions is about --pairs, and there are none; add --pairs drawn, or leave it out")
    if report_file is not None and (bench or caches or retrieval):
        raise UsageError(
            "--report is about texts, tasks, pairs and videos: leave it out beside --kv, --retrieval and vbench"
        )
    if report_file is not None:
        require("--report", "report", "jinja2", *(["matplotlib"] if pairs or videos else []))
    for spec in texts:
        text_name(spec)
    request = EvalRequest(
        texts=texts,
        window=window,
        windows=windows,
        tasks=names,
        limit=limit,
        task_dir=task_dir,
        allow_task_code=allow_task_code,
        dtype=dtype,
        device=device,
        caches=caches,
        prompt=prompt,
        step=kv_step,
        retrieval=retrieval,
        pairs=pairs,
        questions=QUESTIONS if questions is None else questions,
        examples=0 if report_file is None else EXAMPLES,
        videos=videos or 0,
        vbench_python=vbench_python,
        videos_dir=videos_dir,
        prompts=report_file is not None and pairs is None and not videos,
    )
    if request.alone and len(outs) > 1:
        raise UsageError(f"{request.alone} is measured of one model at a time, and there are {len(outs)}: give one OUT")
    console = Console()
    announce(console, f"reading {' '.join(outs)}")
    folders = [find_model(out) for out in outs]
    for folder in folders:
        refuse_unsound(folder)
    original = None if baseline is None else find_model(baseline)
    for out, folder in zip(outs, folders, strict=True):
        mark = read_mark(folder)
        if mark is not None:
            console.print(Text(f"{printable(out)}: {described(mark)}"), soft_wrap=True)

    from qkit.evaluation.measure import measure_all

    with progress_bar(Console(stderr=True), max(1, len(texts))) as progress:
        found = measure_all(folders, original, request, progress)
    samples = found[0].pop("samples", None)
    if json_file is not None:
        write_atomic(json_file, json_bytes(found[0] if len(found) == 1 else {"models": found}))
    if report_file is not None:
        write_atomic(report_file, _page(found, folders, request, samples).encode())
    if len(found) == 1:
        show(found[0], console)
    else:
        show_all(found, console)
    refuse_unmeasured(outs, found)


def _page(found: Sequence[Mapping[str, Any]], folders: Sequence[Path], request: EvalRequest, samples: Any) -> str:
    """The page of --report."""
    if samples is not None:
        from qkit.report.videos import strips, videos_page

        return videos_page(found[0], strips(*samples))
    if request.pairs is not None:
        from qkit.report.image_text import pairs_page

        (name,) = found[0]["pairs"]
        return pairs_page(found[0], name, request.pairs, request.questions)
    from qkit.report.text import text_page

    tables = [{"title": g.title, "columns": g.columns, "rows": g.plain()} for g in grids(found)]
    return text_page(found, folders, tables)


def split_names(tasks: str | None) -> list[str]:
    """'a, b' -> ['a', 'b'], each once."""
    return list(dict.fromkeys(name.strip() for name in (tasks or "").split(",") if name.strip()))


def _cache(name: str, out: str) -> CachePolicy:
    """The policy of that name, or the checkpoint's own. Raises UsageError where widths would have to be chosen first."""
    if name == "stored":
        folder = find_model(out)
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
