"""One measurement of a model on disk, for ``qkit eval`` and ``qkit check``: texts, tasks, size."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any

import torch

from qkit.calibration.image_text import held_out_image_text, load_processor
from qkit.calibration.options import DRAWN
from qkit.errors import UsageError
from qkit.evaluation.request import EvalRequest, dimensions_of
from qkit.evaluation.row_measure import kind_of_models, measure_rows
from qkit.evaluation.sources import read_text, text_name
from qkit.evaluation.suite import Stopwatch, evaluate_suite, text_figures
from qkit.evaluation.text import evaluate_texts, first_tokens, tokenize
from qkit.evaluation.vbench import VBenchRequest, evaluate_vbench
from qkit.families.declared import DECLARED
from qkit.families.structure import predicts_next
from qkit.files.checkpoint import Checkpoint
from qkit.files.folder import PIPELINE_INDEX, is_pipeline, read_record, weights_folder
from qkit.system.progress import NamedAdvance


def measure(
    out: Path, baseline: Path | None, request: EvalRequest, progress: NamedAdvance | None = None
) -> dict[str, Any]:
    """The figures of the model in the folder ``out`` (packed, when it is quantized), beside those of the baseline.

    Returns {"model", "baseline", "dtype", "window", "size", "texts", "rows", "caches", "retrieval", "pairs", "videos",
    "samples", "tasks", "baseline_tasks", "suite"}, of what was asked for: names of folders without their paths; size in bytes
    of the weight files; texts as in ``evaluate_text``; rows, in place of texts, of a model that does not continue a text:
    {name: what ``row_scores.figures`` gives}; caches, or with request.retrieval retrieval: for each text what
    ``evaluate_caches`` or ``evaluate_retrieval`` gives; pairs: {name: what ``evaluate_image_text`` gives}; videos: what
    ``video.sample_figures`` gives, and samples (ours, theirs), request.examples of each; tasks as in ``run_tasks``, without the
    values of single samples but with the paired change and change_ci where there is a baseline; suite: what
    ``evaluate_suite`` gives, the seconds of passes and the recorded sums of the weight files. Raises what loading,
    ``evaluate_text``, ``evaluate_image_text`` and ``run_tasks`` raise.
    """
    return measure_all([out], baseline, request, progress)[0]


def measure_all(
    outs: Sequence[Path], baseline: Path | None, request: EvalRequest, progress: NamedAdvance | None = None
) -> list[dict[str, Any]]:
    """The figures of several models: the same texts and tasks for all, and the baseline measured once.

    Raises UsageError for what is measured of one model alone (caches, pairs, videos), and for models that split a text in
    different ways.
    """
    from qkit.runtime.loading import load, load_tokenizer

    results: list[dict[str, Any]] = [
        {
            "model": out.resolve().name,
            "baseline": None if baseline is None else baseline.resolve().name,
            "dtype": request.dtype,
            "window": request.window,
            "size": sizes(out, baseline),
        }
        for out in outs
    ]
    single_only = request.alone
    if single_only and len(outs) > 1:
        raise UsageError(f"{single_only}: measures one model at a time, and there are {len(outs)}: use one OUT")
    dimensions = dimensions_of(request.tasks)
    if dimensions:
        return [results[0] | _vbench(outs[0], baseline, dimensions, request, progress)]
    if request.videos:
        return [results[0] | _videos(outs[0], baseline, request, progress)]
    if not request.texts and not request.tasks and request.image_text is None:
        return results
    for out in outs:
        if is_pipeline(out):
            raise UsageError(
                f"{out}: a diffusion pipeline makes images or videos: measure it with --videos N, or with budget lines "
                "about samples (psnr, ssim, latent_error, flickering)"
            )
    for spec in request.texts:
        text_name(spec)  # what is wrong with a file is better said before a large model is loaded
    _check_device(request.device)
    kind = kind_of_models(outs, baseline)
    if kind is not None:
        rows = measure_rows(outs, baseline, request, kind, progress)
        return [result | figures for result, figures in zip(results, rows, strict=True)]
    processor = None if request.image_text is None else _processor(outs[0], request.image_text)
    tokenizers = [load_tokenizer(out) for out in outs]
    _check_alike(outs, tokenizers, request)
    dtype = getattr(torch, request.dtype)
    # Texts are read without a cache, and --kv and the suite compare with a plain one; tasks run as the folder is meant to.
    caches_compared = request.retrieval or bool(request.caches)
    kv = "none" if caches_compared or request.suite else None
    models = [load(out, dtype=dtype, device=request.device, kv=kv) for out in outs]
    original = None if baseline is None else load(baseline, dtype=dtype, device=request.device)
    watches = [Stopwatch(model) for model in (original, *models)] if request.suite else []
    if request.texts:
        _check_language_models(outs, models)
        texts = evaluate_texts(
            models,
            tokenizers[0],
            request.texts,
            request.window,
            request.windows,
            original,
            progress,
            text_figures if request.suite else None,
        )
        results = [result | figures for result, figures in zip(results, texts, strict=True)]
    if request.suite:
        suites = evaluate_suite(models, original, tokenizers[0], request.texts, progress)
        results = [
            result | {"suite": {**figures, "weights": weight_sums(out)}}
            for out, result, figures in zip(outs, results, suites, strict=True)
        ]
    if caches_compared:
        caches = _caches(models[0], tokenizers[0], request, progress)
        results[0]["retrieval" if request.retrieval else "caches"] = caches
    if request.image_text is not None:
        results[0]["pairs"] = _image_text(models[0], original, processor, request, progress)
    if request.prompts:
        from qkit.evaluation.continuations import continuations

        for result, model in zip(results, models, strict=True):
            result["continuations"] = continuations(model, original, tokenizers[0])
    if request.tasks:
        processors = [partial(load_processor, out) if _sees(out) else None for out in outs]
        tasks = _tasks(models, original, tokenizers, request, processors)
        results = [result | figures for result, figures in zip(results, tasks, strict=True)]
    for result, watch in zip(results, watches[1:], strict=False):
        result["suite"] |= {"seconds": watch.seconds, "baseline_seconds": watches[0].seconds}
    return results


def _check_language_models(outs: Sequence[Path], models: Sequence[Any]) -> None:
    """Raises UsageError for a model that has no perplexity."""
    for out, model in zip(outs, models, strict=True):
        if not predicts_next(model):
            raise UsageError(
                f"{out}: perplexity is of models that predict the next token of a text, and a {type(model).__name__} does not: "
                "measure it with a task of its own"
            )


def _check_alike(outs: Sequence[Path], tokenizers: Sequence[Any], request: EvalRequest) -> None:
    """Raises UsageError where models would be measured on different tokens."""
    if len(outs) == 1:
        return
    for spec in request.texts:
        needed = None if request.windows is None else request.windows * request.window
        first = first_tokens(tokenizers[0], spec, needed)
        for out, tokenizer in zip(outs[1:], tokenizers[1:], strict=True):
            if not first.equal(first_tokens(tokenizer, spec, needed)):
                raise UsageError(
                    f"{outs[0]} and {out} split text '{text_name(spec)}' into different tokens: measure each model separately"
                )


def _videos(out: Path, baseline: Path | None, request: EvalRequest, progress: NamedAdvance | None) -> dict[str, Any]:
    """{"videos": figures, "samples": (ours, theirs) of request.examples of them}"""
    from qkit.evaluation.video import make_videos, sample_figures

    _check_pipelines(out, baseline, request)
    pipes = [None if f is None else _pipeline(f, request) for f in (out, baseline)]
    videos, baseline_videos = make_videos(pipes[0], out, request.videos, pipes[1], progress)
    return {
        "videos": sample_figures(videos, baseline_videos),
        "samples": (videos[: request.examples], baseline_videos[: request.examples]),
    }


def _vbench(
    out: Path, baseline: Path | None, dimensions: list[str], request: EvalRequest, progress: NamedAdvance | None
) -> dict[str, Any]:
    """{"tasks", "baseline_tasks"} as of other tasks."""
    if request.vbench_python is None:
        raise UsageError(f"--tasks {request.tasks[0]}: add --vbench-python, a Python interpreter with VBench installed")
    _check_pipelines(out, baseline, request)
    bench = VBenchRequest(
        dimensions=dimensions,
        python=request.vbench_python,
        videos=request.videos,
        limit=request.limit,
        folder=request.videos_dir,
        device=request.device,
    )
    folders = {"model": out} | ({} if baseline is None else {"baseline": baseline})
    figures, *baseline_figures = evaluate_vbench(
        [(n, f, partial(_pipeline, f, request)) for n, f in folders.items()], bench, progress
    )
    return add_changes(figures, baseline_figures[0] if baseline_figures else {})


def _check_pipelines(out: Path, baseline: Path | None, request: EvalRequest) -> None:
    for folder in (out, *([] if baseline is None else [baseline])):
        if not is_pipeline(folder):
            raise UsageError(f"{folder}: videos are made by diffusion pipelines, folders with a {PIPELINE_INDEX}")
    _check_device(request.device)


def _pipeline(folder: Path, request: EvalRequest) -> Any:
    from qkit.runtime.loading import load

    pipeline = load(folder, dtype=getattr(torch, request.dtype), device=request.device)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _caches(model: Any, tokenizer: Any, request: EvalRequest, progress: NamedAdvance | None) -> dict[str, Any]:
    from qkit.evaluation.decoding import evaluate_caches
    from qkit.evaluation.retrieval import evaluate_retrieval

    policies = {p.name: p for p in request.caches}
    window, limit = request.window, request.windows
    prompt = window // 2 if request.prompt is None else request.prompt
    by_text: dict[str, Any] = {}
    for spec in request.texts:
        text = read_text(spec)
        tokens = tokenize(tokenizer, text)
        by_text[text_name(spec)] = (
            evaluate_retrieval(model, tokenizer, text, tokens, window, limit, policies, progress=progress)
            if request.retrieval
            else evaluate_caches(model, tokens, window, limit, prompt, policies, request.step, progress)
        )
    return by_text


def _sees(out: Path) -> bool:
    """Whether a model is a vision-language model."""
    kind = _kind(out)
    return any(kind in family.model_types and family.text_types for family in DECLARED)


def _kind(out: Path) -> Any:
    return Checkpoint.open(out, quantized=True).config.get("model_type")


def _processor(out: Path, image_text: str) -> Any:
    if not _sees(out):
        raise UsageError(
            f"{out}: questions about images are for a vision-language model, and this is a {_kind(out)}: measure texts or "
            "tasks without images"
        )
    held_out_image_text(image_text, 1)
    return load_processor(out)


def _image_text(
    model: Any, original: Any, processor: Any, request: EvalRequest, progress: NamedAdvance | None
) -> dict[str, Any]:
    from qkit.evaluation.image_text import evaluate_image_text

    assert request.image_text is not None
    name = request.image_text if request.image_text == DRAWN else Path(request.image_text).resolve().stem
    report = None if progress is None else partial(progress, name)
    figures = evaluate_image_text(
        model, processor, request.image_text, request.questions, original, request.examples, progress=report
    )
    return {name: figures}


def _check_device(device: str) -> None:
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # AssertionError: a build of torch without CUDA
        reason = str(error).splitlines()[0]
        raise UsageError(f"device {device!r} cannot be used: {reason}; use cpu, or a device of this machine") from error


def weight_sums(out: Path) -> dict[str, str]:
    """The sha256 of the weight files by name, as the folder's record has them: figures belong to these. Empty without one."""
    sums: dict[str, str] = (read_record(out) or {}).get("shards", {})
    return sums


def sizes(out: Path, baseline: Path | None) -> dict[str, int]:
    """Bytes of the weight files of both folders, headers included: what --size of ``qkit quantize`` limits. Of a pipeline:
    those of its transformer."""

    def files(folder: Path) -> int:
        shards = {info.file for info in Checkpoint.open(weights_folder(folder), quantized=True).tensors.values()}
        return sum(shard.stat().st_size for shard in shards)

    return {"bytes": files(out)} | ({} if baseline is None else {"baseline_bytes": files(baseline)})


def _tasks(
    models: Sequence[Any],
    original: Any,
    tokenizers: Sequence[Any],
    request: EvalRequest,
    processors: Sequence[Callable[[], Any] | None],
) -> list[dict[str, Any]]:
    from qkit.evaluation.harness import run_tasks

    def run(model: Any, tokenizer: Any, processor: Callable[[], Any] | None) -> dict[str, Any]:
        return run_tasks(
            model, tokenizer, request.tasks, request.limit, request.allow_task_code, request.task_dir, processor
        )

    figures = [run(*model_parts) for model_parts in zip(models, tokenizers, processors, strict=True)]
    baseline_figures = {} if original is None else run(original, tokenizers[0], processors[0])
    return [add_changes(model_figures, deepcopy(baseline_figures)) for model_figures in figures]


def add_changes(figures_by_task: dict[str, Any], baseline_by_task: dict[str, Any]) -> dict[str, Any]:
    """{"tasks", "baseline_tasks"} with paired changes in the place of the values of samples."""
    from qkit.evaluation.harness import paired_change

    for task, entry in figures_by_task.items():
        for name, figures in entry["metrics"].items():
            before = baseline_by_task.get(task, {}).get("metrics", {}).get(name)
            if before is not None:
                figures.update(paired_change(figures, before) or {})
    for entry in (*figures_by_task.values(), *baseline_by_task.values()):
        for figures in entry["metrics"].values():
            del figures["values"]
    return (
        {"tasks": figures_by_task, "baseline_tasks": baseline_by_task}
        if baseline_by_task
        else {"tasks": figures_by_task}
    )
