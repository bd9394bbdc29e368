"""qkit eval: the quality of the packed model, compared with the original."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource
from rich.console import Console
from rich.text import Text

from qkit.calibration.options import QUESTIONS
from qkit.commands.card_figures import write_figures
from qkit.commands.common import OutFile, announce
from qkit.commands.engine_tables import gguf_file, require_python, show_engine
from qkit.commands.grid import printable
from qkit.commands.measured import json_bytes, notes, page_tables, progress_bar, refuse_unmeasured, show, show_all
from qkit.commands.verb import OptionGroup, RenamedOption, Verb, in_group
from qkit.engines.process import ENGINES, TIMEOUT, require_engine
from qkit.errors import UsageError
from qkit.evaluation.request import DTYPES, SUITE_SAMPLES, EvalRequest, dimensions_of, suite_tasks
from qkit.evaluation.sources import text_name
from qkit.files.card import check_rewritable
from qkit.files.embedded import embedded_text
from qkit.files.locate import find_model
from qkit.files.rejected import describe_mark, read_mark
from qkit.files.safefile import write_atomic
from qkit.kvcache.policy import CachePolicy, parse, stored
from qkit.system.extras import require

_TASK_CODE = "--allow-task-code needs --task-dir: add it, or leave --allow-task-code out"
_WITH_ENGINE = {
    *("outs", "engine", "python", "engine_timeout", "json_file"),
    *("texts", "window", "windows", "tasks", "limit", "task_dir", "allow_task_code"),
}
EXAMPLES = 12  # images of a report
_MOST_USED, _TEXTS, _IMAGE_TEXT = (
    in_group(OptionGroup.MOST_USED),
    in_group(OptionGroup.TEXTS),
    in_group(OptionGroup.IMAGE_TEXT),
)
_KV_CACHE, _DIFFUSION, _ENGINE, _DEVICE = (
    in_group(OptionGroup.KV_CACHE),
    in_group(OptionGroup.DIFFUSION),
    in_group(OptionGroup.ENGINE),
    in_group(OptionGroup.DEVICE),
)


@click.command("eval", cls=Verb)
@click.argument("outs", metavar="OUT...", nargs=-1, required=True)
@_MOST_USED(
    "--baseline", help="Original model, to compare with: perplexity, KL divergence, top-1 tokens, embeddings, classes."
)
@_MOST_USED(
    "--text",
    "texts",
    multiple=True,
    help="Text to measure, repeatable: FILE, NAME=FILE or dataset:NAME[:config][:split][:column]; for an encoder or a "
    "classifier also rows in JSON lines.",
)
@_MOST_USED(
    "--suite",
    type=click.Choice(["default"]),
    help="All figures that show what quantization changed, on texts and on chat answers (needs --baseline).",
)
@_MOST_USED("--tasks", help="Tasks of lm-eval or qkit, separated by commas, or vbench:DIMENSION,...")
@_MOST_USED(
    "--image-text",
    help="Image-text data with questions: drawn (qkit's own scenes), a .jsonl file, or a folder as for --calib.",
)
@click.option("--pairs", cls=RenamedOption, now="--image-text")
@_MOST_USED("--report", "report_file", type=OutFile(), help="HTML file for a report of the results.")
@_MOST_USED("--json", "json_file", type=OutFile(), help="JSON file for the results.")
@_MOST_USED("--card", "in_card", is_flag=True, help="Put the figures into the card (README.md) of every OUT.")
@_TEXTS("--window", default=512, show_default=True, type=click.IntRange(2), help="Tokens per window.")
@_TEXTS("--windows", default=200, show_default=True, type=click.IntRange(1), help="Maximum number of windows per text.")
@_TEXTS("--limit", type=click.IntRange(1), help="Maximum number of samples per task.")
@_TEXTS("--task-dir", type=click.Path(path_type=Path), help="Folder of additional lm-eval task files.")
@_TEXTS("--allow-task-code", is_flag=True, help="Allow the task files of --task-dir to run code.")
@_IMAGE_TEXT("--questions", type=click.IntRange(1), help="Maximum number of questions of --image-text (default: 500).")
@_KV_CACHE(
    "--kv",
    "kv",
    multiple=True,
    metavar="POLICY",
    help="KV cache policy to compare by decoding, repeatable: kivi2, int8, pm-kvq:2 and others, or stored for that of OUT.",
)
@_KV_CACHE("--prompt", type=click.IntRange(1), help="Tokens of a window before decoding starts (default: half of it).")
@_KV_CACHE("--kv-step", default=1, show_default=True, type=click.IntRange(1), help="Tokens decoded per step.")
@_KV_CACHE("--retrieval", is_flag=True, help="Compare the KV caches by retrieval instead of decoding.")
@_DIFFUSION("--videos", type=click.IntRange(1), help="Number of prompts and seeds to sample videos for.")
@_DIFFUSION("--vbench-python", type=click.Path(path_type=Path), help="Python interpreter with VBench installed.")
@_DIFFUSION("--videos-dir", type=click.Path(path_type=Path), help="Folder in which the videos for VBench are kept.")
@_ENGINE("--engine", type=click.Choice(list(ENGINES)), help="Measure texts and tasks in this engine, not in qkit.")
@_ENGINE("--python", type=click.Path(path_type=Path), help="Python interpreter that has the engine of --engine.")
@_ENGINE(
    "--engine-timeout",
    type=click.FloatRange(1),
    default=TIMEOUT,
    show_default=True,
    help="Seconds that the engine may take.",
)
@_DEVICE(
    "--dtype",
    default="float32",
    show_default=True,
    type=click.Choice(list(DTYPES)),
    help="Number format of arithmetic.",
)
@_DEVICE("--device", default="cpu", show_default=True, help="Device: cpu, cuda, cuda:1, ...")
def eval_command(
    outs: tuple[str, ...],
    baseline: str | None,
    texts: tuple[str, ...],
    window: int,
    windows: int,
    suite: str | None,
    tasks: str | None,
    limit: int | None,
    kv: tuple[str, ...],
    prompt: int | None,
    kv_step: int,
    retrieval: bool,
    image_text: str | None,
    questions: int | None,
    videos: int | None,
    vbench_python: Path | None,
    videos_dir: Path | None,
    report_file: Path | None,
    in_card: bool,
    engine: str | None,
    python: Path | None,
    engine_timeout: float,
    dtype: str,
    device: str,
    task_dir: Path | None,
    allow_task_code: bool,
    json_file: Path | None,
) -> None:
    """Measure the models in the folders OUT: perplexity, tasks, answers about images, embeddings, classes, videos.

    Several models are measured on the same texts and tasks and compared in one table. The baseline runs once for all of them.
    Folders that qkit wrote are verified first. The exit code is 4 if a folder is not sound or a figure is not finite.

    Without --text, --tasks and --image-text, the embedded evaluation text is used. Quantized models are loaded packed. Every
    text is tokenized as a whole and cut into windows. Confidence intervals are 95 % over windows. Encoders, classifiers and
    models that read one text and write another are measured by what they give, on windows or on rows in JSON lines.

    With --engine every figure comes from that engine, which runs the model in its own Python environment. It measures one
    model on texts and on tasks without images.

    \b
    Example:
      qkit eval out/w4a16 --baseline tiny-llama --text wiki.txt --json eval.json
      qkit eval out/w4a16 out/w8a16 --baseline tiny-llama --report eval.html
      qkit eval out/embedder --baseline MODEL --text texts.jsonl
      qkit eval out/w4a16 --engine vllm --python VENV/bin/python --tasks NAME
    """
    chosen = require_python(engine, python)
    if chosen is not None:
        wanted = EvalRequest(
            texts=texts if texts or tasks else (str(embedded_text("evaluation")),),
            window=window,
            windows=windows,
            tasks=split_names(tasks),
            limit=limit,
            task_dir=task_dir,
            allow_task_code=allow_task_code,
        )
        _in_engine(outs, *chosen, wanted, engine_timeout, json_file)
        return
    names = split_names(tasks)
    bench = dimensions_of(names)
    if suite is not None:
        _check_suite(baseline, kv or retrieval or image_text or videos or bench)
        texts = (*texts, str(embedded_text("evaluation")))
        if not names:
            names, limit = suite_tasks(), limit or SUITE_SAMPLES
    if (videos or bench) and (texts or image_text or kv or retrieval or len(names) > len(bench)):
        raise UsageError(
            "--videos is for diffusion pipelines, and the other measurements are not: leave one of them out"
        )
    if not bench and (vbench_python or videos_dir):
        raise UsageError("--vbench-python and --videos-dir need --tasks vbench:DIMENSION: add it, or leave them out")
    if not texts and not videos and (kv or retrieval or not (names or image_text)):
        texts = (str(embedded_text("evaluation")),)
    if allow_task_code and task_dir is None:
        raise UsageError(_TASK_CODE)
    caches = [_cache(name, outs[0]) for policies in kv for name in split_names(policies) if name != "none"]
    if not caches and kv_step != 1 and not retrieval:
        raise UsageError("--kv-step needs --kv: add it, or leave --kv-step out")
    if prompt is not None and not caches:
        raise UsageError("--prompt needs --kv: add it, or leave --prompt out")
    if retrieval and (prompt is not None or kv_step != 1):
        raise UsageError("--prompt and --kv-step are for decoding, which --retrieval replaces: leave them out")
    if image_text is None and questions is not None:
        raise UsageError("--questions needs image-text data: add --image-text drawn, or leave --questions out")
    if report_file is not None and (bench or caches or retrieval):
        raise UsageError(
            "--report is for texts, tasks, image-text data and videos: leave it out with --kv, --retrieval and vbench"
        )
    if report_file is not None:
        require("--report", "report", "jinja2", *(["matplotlib"] if image_text or videos or suite else []))
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
        image_text=image_text,
        questions=QUESTIONS if questions is None else questions,
        examples=0 if report_file is None else EXAMPLES,
        videos=videos or 0,
        vbench_python=vbench_python,
        videos_dir=videos_dir,
        prompts=report_file is not None and image_text is None and not videos and suite is None,
        suite=suite is not None,
    )
    from qkit.workflows.check import require_sound  # here: the help does not wait for YAML and budgets

    if request.alone and len(outs) > 1:
        raise UsageError(f"{request.alone} measures one model at a time, and there are {len(outs)}: use one OUT")
    console = Console()
    announce(console, f"reading {' '.join(outs)}")
    folders = [find_model(out) for out in outs]
    for folder in folders:
        require_sound(folder)
        _ = check_rewritable(folder) if in_card else None
    original = None if baseline is None else find_model(baseline)
    for out, folder in zip(outs, folders, strict=True):
        mark = read_mark(folder)
        if mark is not None:
            console.print(Text(f"{printable(out)}: {describe_mark(mark)}"), soft_wrap=True)

    from qkit.evaluation.measure import measure_all

    with progress_bar(Console(stderr=True), max(1, len(texts))) as progress:
        measured = measure_all(folders, original, request, progress)
    samples = measured[0].pop("samples", None)
    if json_file is not None:
        write_atomic(json_file, json_bytes(measured[0] if len(measured) == 1 else {"models": measured}))
    if report_file is not None:
        write_atomic(report_file, _page(measured, folders, request, samples).encode())
    if in_card:
        write_figures(folders, measured)
    if len(measured) == 1:
        show(measured[0], console)
    else:
        show_all(measured, console)
    refuse_unmeasured(outs, measured)


def _in_engine(
    outs: Sequence[str], engine: str, python: Path, request: EvalRequest, timeout: float, json_file: Path | None
) -> None:
    """The command with --engine."""
    context = click.get_current_context()
    given = [p for p in context.params if context.get_parameter_source(p) is ParameterSource.COMMANDLINE]
    other = next((p for p in context.command.params if p.name in given and p.name not in _WITH_ENGINE), None)
    if other is not None:
        raise UsageError(f"{other.opts[0]} does not go with --engine: leave one of the two out")
    if len(outs) > 1:
        raise UsageError(f"--engine measures one model at a time, and there are {len(outs)}: use one OUT")
    if dimensions_of(request.tasks):
        raise UsageError("--tasks vbench: does not go with --engine: leave one of the two out")
    if request.allow_task_code and request.task_dir is None:
        raise UsageError(_TASK_CODE)
    from qkit.workflows.check import require_sound

    file = gguf_file(Path(outs[0]), engine)
    require_engine(ENGINES[engine], python)
    folder = find_model(outs[0]) if file is None else file.parent
    require_sound(folder)
    console = Console()
    announce(console, f"measuring {file or folder} in {ENGINES[engine].title}, with {python}")

    from qkit.workflows.engine_eval import evaluate_in_engine

    measured = evaluate_in_engine(file or folder, engine, python, request, timeout)
    if json_file is not None:
        write_atomic(json_file, json_bytes(measured))
    show(measured, console)
    show_engine(measured["engine"], console)
    refuse_unmeasured(outs, [measured])


def _page(measured: Sequence[Mapping[str, Any]], folders: Sequence[Path], request: EvalRequest, samples: Any) -> str:
    """The page of --report."""
    if samples is not None:
        from qkit.report.videos import strips, videos_page

        return videos_page(measured[0], strips(*samples))
    if request.image_text is not None:
        from qkit.report.image_text import image_text_page

        (name,) = measured[0]["pairs"]
        return image_text_page(measured[0], name, request.image_text, request.questions)
    tables = page_tables(measured)
    if request.suite:
        from qkit.report.result import result_facts
        from qkit.report.result_page import result_page

        return result_page([*map(result_facts, folders)], measured, tables, notes(measured))
    from qkit.report.text import text_page

    return text_page(measured, folders, tables)


def _check_suite(baseline: str | None, other: Any) -> None:
    """Raises UsageError for a suite without a baseline, and beside measurements of other things."""
    if baseline is None:
        raise UsageError("--suite compares with the original model: add --baseline MODEL, or leave --suite out")
    if other:
        raise UsageError(
            "--suite is for texts, chat answers and tasks of a language model: leave it out with --kv, --retrieval, "
            "--image-text, --videos and vbench"
        )


def split_names(tasks: str | None) -> list[str]:
    """'a, b' -> ['a', 'b'], each once."""
    return list(dict.fromkeys(name.strip() for name in (tasks or "").split(",") if name.strip()))


def _cache(name: str, out: str) -> CachePolicy:
    """The policy of that name, or the one stored in the checkpoint. Raises UsageError for a policy without chosen widths."""
    if name == "stored":
        folder = find_model(out)
        policy = stored(folder)
        if policy is None:
            raise UsageError(f"--kv stored: {folder} was quantized without --kv: use a policy, for instance kivi2")
        return policy
    policy = parse(name)
    if len(policy.widths) > 1:
        raise UsageError(
            f"--kv {name}: the widths of the layers are chosen by 'qkit quantize --kv {name} --kv-memory ..': use "
            "'stored' for its result, or one width, as in pm-kvq:2"
        )
    return policy
