"""Measures models that do not continue a text (``row_scores``), for ``qkit eval``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from qkit.errors import QkitError, UsageError
from qkit.evaluation.model_kinds import CLASSES, EMBEDDINGS, TEXT, TOKENS, ModelKind, model_kind
from qkit.evaluation.request import EvalRequest
from qkit.evaluation.row_inputs import RowReader
from qkit.evaluation.row_scores import figures, score
from qkit.files.checkpoint import Checkpoint
from qkit.files.folder import is_pipeline, load_json
from qkit.files.safefile import shown
from qkit.system.progress import NamedAdvance

_POOLINGS = {
    "mean_tokens": "mean", "mean_sqrt_len_tokens": "mean", "cls_token": "cls", "lasttoken": "last", "max_tokens": "max",
}  # fmt: skip
_LARGEST = 1 << 20  # bytes of a file that says how embeddings are pooled


def kind_of_models(outs: Sequence[Path], baseline: Path | None) -> ModelKind | None:
    """The kind of models that do not continue a text; None: they do. Raises UsageError for models of several kinds."""
    if any(map(is_pipeline, outs)):
        return None
    folders = [*outs, *([] if baseline is None else [baseline])]
    kinds = [model_kind(Checkpoint.open(folder, quantized=True).config, str(folder)) for folder in folders]
    if all(k.kind == TEXT for k in kinds):
        return None
    for folder, kind in zip(folders[1:], kinds[1:], strict=True):
        if kind != kinds[0]:
            raise UsageError(
                f"{folders[0]} is a {kinds[0].class_name} and {folder} a {kind.class_name}: they give other things: compare "
                "models of one class"
            )
    return kinds[0]


def measure_rows(
    outs: Sequence[Path], baseline: Path | None, request: EvalRequest, kind: ModelKind, progress: NamedAdvance | None
) -> list[dict[str, Any]]:
    """{"rows": {name: figures}} of every model, on the same rows; the baseline runs once.

    Raises UsageError for what such models have not (tasks, KV caches, images, videos), and where nothing can be measured.
    """
    from qkit.runtime.loading import load, load_tokenizer

    _refuse_others(request, outs[0], kind)
    if baseline is None and kind.kind in (EMBEDDINGS, TOKENS):
        raise UsageError(
            f"{outs[0]}: what a {kind.class_name} gives is compared with the original model's: add --baseline"
        )
    dtype = getattr(torch, request.dtype)
    models = [load(out, dtype=dtype, device=request.device) for out in outs]
    original = None if baseline is None else load(baseline, dtype=dtype, device=request.device)
    tokenizer = None if kind.hears and kind.kind in (EMBEDDINGS, TOKENS, CLASSES) else load_tokenizer(outs[0])
    reader = RowReader(outs[0], models[0], kind, tokenizer, request.window)
    pooling = pooling_of(outs[0]) if kind.kind == EMBEDDINGS else ""
    several = getattr(models[0].config, "problem_type", None) == "multi_label_classification"
    results: list[dict[str, Any]] = [{"rows": {}} for _ in outs]
    for spec in request.texts:
        name, rows = reader.read(spec, request.windows)
        if name in results[0]["rows"]:
            raise UsageError(f"two texts are called '{name}'; name one of them: --text OTHER=FILE")
        report = None if progress is None else partial(progress, name)
        found, reference = score(models, original, kind, rows, pooling, report)
        for result, scores in zip(results, found, strict=True):
            measured = figures(kind, rows, scores, reference, several) | ({"pooling": pooling} if pooling else {})
            _refuse_empty(measured, outs[0], kind)
            result["rows"][name] = measured
    return results


def _refuse_others(request: EvalRequest, out: Path, kind: ModelKind) -> None:
    asked = {
        "--tasks": request.tasks, "--kv": request.caches, "--retrieval": request.retrieval,
        "--videos": request.videos,
        "--image-text": request.image_text is not None,
    }  # fmt: skip
    for option, is_given in asked.items():
        if is_given:
            raise UsageError(
                f"{option}: {out} is a {kind.class_name}, which generates no text: leave it out (in a budget, the lines "
                "that need it), and give --text"
            )


def _refuse_empty(measured: Mapping[str, Any], out: Path, kind: ModelKind) -> None:
    if measured.keys() <= {"kind", "rows", "cut", "labels"}:
        told = "'chosen' and 'rejected'" if measured["kind"] == "scores" else "'label'"
        raise UsageError(
            f"{out}: the rows say nothing of what a {kind.class_name} should give: add --baseline, to compare with the "
            f"original model, or rows with {told}"
        )


def pooling_of(folder: Path) -> str:
    """How one embedding is made of hidden states: as the files of sentence-transformers in the folder say, else their mean."""
    try:
        modules = load_json(folder / "modules.json", "list of modules", _LARGEST)
        paths = [str(m["path"]) for m in modules if str(m.get("type", "")).endswith(".Pooling")]
        config = load_json(folder / paths[0] / "config.json", "pooling", _LARGEST)
    except (QkitError, OSError, KeyError, IndexError, TypeError, AttributeError):
        return "mean"
    if not isinstance(config, dict):
        return "mean"
    named = config.get("pooling_mode")
    asked = [p for key, p in _POOLINGS.items() if config.get(f"pooling_mode_{key}") or named in (key, p)]
    if len(asked) != 1:
        raise UsageError(
            f"{folder / paths[0] / 'config.json'}: {shown(named or asked, 60)}: qkit pools by one of mean, cls, last and max"
        )
    return asked[0]
