"""One measurement of a model on disk, for ``qkit eval`` and ``qkit check``: texts, tasks, size."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from qkit.checkpoint import Checkpoint
from qkit.errors import UsageError
from qkit.evaluation.text import Progress, evaluate_text, read_text, text_name, tokenize
from qkit.evaluation.vbench import Bench, dimensions_of, evaluate_vbench
from qkit.families.discover import DECLARED
from qkit.folder import PIPELINE_INDEX, is_pipeline, weights_folder
from qkit.kvcache.policy import Policy
from qkit.pairs import DRAWN, QUESTIONS, held_out, load_processor

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class EvalRequest:
    """What to measure. ``texts`` as for ``evaluate_text``; ``limit``: samples per task, None for all. ``caches``: KV cache
    policies, compared by decoding the texts, ``step`` tokens at a time after a ``prompt`` (None: half a window), or by
    ``retrieval`` from them, beside a plain cache. ``pairs``: questions about pictures, as for ``evaluate_pairs``, so many
    ``questions`` at most; with ``examples`` of them answered in words. ``videos``: of a diffusion pipeline, how many it is to
    make, and with ``vbench_python`` VBench's interpreter for tasks of VBench, whose videos ``videos_dir`` keeps."""

    texts: Sequence[Path | str] = ()
    window: int = 512
    windows: int | None = 200
    tasks: Sequence[str] = ()
    limit: int | None = None
    task_dir: Path | None = None
    allow_task_code: bool = False
    dtype: str = "float32"
    device: str = "cpu"
    caches: Sequence[Policy] = ()
    prompt: int | None = None
    step: int = 1
    retrieval: bool = False
    pairs: str | None = None
    questions: int = QUESTIONS
    examples: int = 0
    videos: int = 0
    vbench_python: Path | None = None
    videos_dir: Path | None = None


def measure(out: Path, baseline: Path | None, request: EvalRequest, progress: Progress | None = None) -> dict[str, Any]:
    """Loads the model in the folder ``out`` (packed, when it is quantized), and the baseline, and measures both.

    Returns {"model", "baseline", "dtype", "window", "size", "texts", "caches", "retrieval", "pairs", "videos", "samples",
    "tasks", "baseline_tasks"}, of what was asked for: names of folders without their paths; size in bytes of the weight
    files; texts as in ``evaluate_text``; caches, or with request.retrieval retrieval: for each text what
    ``evaluate_caches`` or ``evaluate_retrieval`` gives; pairs: {name: what ``evaluate_pairs`` gives}; videos: what
    ``video.figures`` gives, and samples (ours, theirs), request.examples of each; tasks as in ``run_tasks``, without the
    values of single samples but with the paired change and change_ci where there is a baseline. Raises what loading,
    ``evaluate_text``, ``evaluate_pairs`` and ``run_tasks`` raise.
    """
    from qkit.loading import load, load_tokenizer

    measured: dict[str, Any] = {
        "model": out.resolve().name,
        "baseline": None if baseline is None else baseline.resolve().name,
        "dtype": request.dtype,
        "window": request.window,
        "size": sizes(out, baseline),
    }
    dimensions = dimensions_of(request.tasks)
    if dimensions:
        return measured | _vbench(out, baseline, dimensions, request, progress)
    if request.videos:
        return measured | _videos(out, baseline, request, progress)
    if not request.texts and not request.tasks and request.pairs is None:
        return measured
    if is_pipeline(out):
        raise UsageError(
            f"{out}: a diffusion pipeline makes pictures: measure it with --videos N, or by lines of a budget about samples "
            "(psnr, ssim, latent_error, flickering)"
        )
    for spec in request.texts:
        text_name(spec)  # what is wrong with a file is better said before a large model is loaded
    _check_device(request.device)
    processor = None if request.pairs is None else _processor(out, request.pairs)
    tokenizer = load_tokenizer(out)
    dtype = DTYPES[request.dtype]
    # Texts are read without a cache and --kv compares caches with a plain one; tasks run as the folder is meant to.
    compared = request.retrieval or bool(request.caches)
    model = load(out, dtype=dtype, device=request.device, kv="none" if compared else None)
    original = None if baseline is None else load(baseline, dtype=dtype, device=request.device)
    if request.texts:
        measured |= evaluate_text(
            model, tokenizer, request.texts, request.window, request.windows, original, progress=progress
        )
    if compared:
        measured["retrieval" if request.retrieval else "caches"] = _caches(model, tokenizer, request, progress)
    if request.pairs is not None:
        measured["pairs"] = _pairs(model, original, processor, request, progress)
    if request.tasks:
        measured |= _tasks(model, original, tokenizer, request, partial(load_processor, out) if _sees(out) else None)
    return measured


def _videos(out: Path, baseline: Path | None, request: EvalRequest, progress: Progress | None) -> dict[str, Any]:
    """{"videos": figures, "samples": (ours, theirs) of request.examples of them}"""
    from qkit.evaluation.video import figures, make_videos

    _check_pipelines(out, baseline, request)
    pipes = [None if f is None else _pipeline(f, request) for f in (out, baseline)]
    ours, theirs = make_videos(pipes[0], out, request.videos, pipes[1], progress)
    return {"videos": figures(ours, theirs), "samples": (ours[: request.examples], theirs[: request.examples])}


def _vbench(
    out: Path, baseline: Path | None, dimensions: list[str], request: EvalRequest, progress: Progress | None
) -> dict[str, Any]:
    """{"tasks", "baseline_tasks"} as of other tasks."""
    if request.vbench_python is None:
        raise UsageError(
            f"--tasks {request.tasks[0]}: give --vbench-python, an interpreter that VBench is installed for"
        )
    _check_pipelines(out, baseline, request)
    bench = Bench(dimensions, request.vbench_python, request.videos, request.limit, request.videos_dir, request.device)
    folders = {"model": out} | ({} if baseline is None else {"baseline": baseline})
    ours, *theirs = evaluate_vbench(
        [(n, f, partial(_pipeline, f, request)) for n, f in folders.items()], bench, progress
    )
    return _compared(ours, theirs[0] if theirs else {})


def _check_pipelines(out: Path, baseline: Path | None, request: EvalRequest) -> None:
    for folder in (out, *([] if baseline is None else [baseline])):
        if not is_pipeline(folder):
            raise UsageError(f"{folder}: videos are made by diffusion pipelines, folders with a {PIPELINE_INDEX}")
    _check_device(request.device)


def _pipeline(folder: Path, request: EvalRequest) -> Any:
    from qkit.loading import load

    pipeline = load(folder, dtype=DTYPES[request.dtype], device=request.device)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _caches(model: Any, tokenizer: Any, request: EvalRequest, progress: Progress | None) -> dict[str, Any]:
    from qkit.evaluation.decoding import evaluate_caches
    from qkit.evaluation.retrieval import evaluate_retrieval

    policies = {p.name: p for p in request.caches}
    window, limit = request.window, request.windows
    prompt = window // 2 if request.prompt is None else request.prompt
    found: dict[str, Any] = {}
    for spec in request.texts:
        text = read_text(spec)
        tokens = tokenize(tokenizer, text)
        found[text_name(spec)] = (
            evaluate_retrieval(model, tokenizer, text, tokens, window, limit, policies, progress=progress)
            if request.retrieval
            else evaluate_caches(model, tokens, window, limit, prompt, policies, request.step, progress)
        )
    return found


def _sees(out: Path) -> bool:
    """Whether a model is a vision-language model."""
    kind = _kind(out)
    return any(kind in family.model_types and family.text_types for family in DECLARED)


def _kind(out: Path) -> Any:
    return Checkpoint.open(out, quantized=True).config.get("model_type")


def _processor(out: Path, pairs: str) -> Any:
    if not _sees(out):
        raise UsageError(
            f"{out}: questions about pictures are for a vision-language model, and this is a {_kind(out)}: measure texts or "
            "tasks without pictures"
        )
    held_out(pairs, 1)
    return load_processor(out)


def _pairs(
    model: Any, original: Any, processor: Any, request: EvalRequest, progress: Progress | None
) -> dict[str, Any]:
    from qkit.evaluation.pictures import evaluate_pairs

    assert request.pairs is not None
    name = request.pairs if request.pairs == DRAWN else Path(request.pairs).resolve().stem
    report = None if progress is None else partial(progress, name)
    figures = evaluate_pairs(
        model, processor, request.pairs, request.questions, original, request.examples, progress=report
    )
    return {name: figures}


def _check_device(device: str) -> None:
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # AssertionError: a build of torch without CUDA
        reason = str(error).splitlines()[0]
        raise UsageError(
            f"device {device!r} cannot be used: {reason}; give cpu, or a device of this machine"
        ) from error


def sizes(out: Path, baseline: Path | None) -> dict[str, int]:
    """Bytes of the weight files of both folders, headers included: what --size of ``qkit quantize`` limits. Of a pipeline
    those of its transformer."""

    def files(folder: Path) -> int:
        shards = {info.file for info in Checkpoint.open(weights_folder(folder), quantized=True).tensors.values()}
        return sum(shard.stat().st_size for shard in shards)

    return {"bytes": files(out)} | ({} if baseline is None else {"baseline_bytes": files(baseline)})


def _tasks(
    model: Any, original: Any, tokenizer: Any, request: EvalRequest, processor: Callable[[], Any] | None
) -> dict[str, Any]:
    from qkit.evaluation.harness import run_tasks

    arguments = (tokenizer, request.tasks, request.limit, request.allow_task_code, request.task_dir, processor)
    return _compared(run_tasks(model, *arguments), {} if original is None else run_tasks(original, *arguments))


def _compared(ours: dict[str, Any], theirs: dict[str, Any]) -> dict[str, Any]:
    """{"tasks", "baseline_tasks"} with paired changes in the place of the values of samples."""
    from qkit.evaluation.harness import paired_change

    for task, entry in ours.items():
        for name, figures in entry["metrics"].items():
            before = theirs.get(task, {}).get("metrics", {}).get(name)
            if before is not None:
                figures.update(paired_change(figures, before) or {})
    for entry in (*ours.values(), *theirs.values()):
        for figures in entry["metrics"].values():
            del figures["values"]
    return {"tasks": ours, "baseline_tasks": theirs} if theirs else {"tasks": ours}


def jsonable(value: Any) -> Any:
    """The same with None in place of NaN and infinity, which JSON cannot say."""
    if isinstance(value, dict):
        return {key: jsonable(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [jsonable(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
