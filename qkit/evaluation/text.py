"""The perplexity of texts, and the divergence from the original model on them.

Where a text comes from: ``evaluation.sources``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qkit.errors import BadInput, UsageError
from qkit.evaluation.metrics import (
    Comparison,
    bootstrap_ci,
    compare_all,
    nll_windows,
    perplexity,
    perplexity_change,
    quantile,
)
from qkit.evaluation.sources import is_dataset, read_text, text_file, text_name
from qkit.system.progress import NamedAdvance


def evaluate_text(
    model: Any,
    tokenizer: Any,
    files: Sequence[Path | str],
    window: int = 512,
    limit: int | None = 200,
    baseline_model: Any = None,
    progress: NamedAdvance | None = None,
) -> dict[str, Any]:
    """The figures of texts, {"texts": {name: figures}}; the name of a text is its file's name without the suffix.

    Each text is tokenised by ``tokenizer`` as far as it is needed, without special tokens, cut into consecutive windows of
    ``window`` tokens, of which the first ``limit`` are used, and scored at positions 2 to ``window`` with an fp32
    log-softmax. Figures: perplexity, ci (95 %, over windows), windows, tokens (scored), nonfinite (scored tokens without a
    finite likelihood); with a baseline also baseline_perplexity, baseline_ci, change_percent, change_ci (paired), kl (mean,
    ci, p99; nats per token, KL(baseline || model)) and same_top1 (fraction of tokens). Figures that are not finite come out
    as NaN or infinity, not as an error.

    Raises BadInput for a text that is unreadable or shorter than one window, UsageError for a bad specification.
    """
    return evaluate_texts([model], tokenizer, files, window, limit, baseline_model, progress)[0]


def evaluate_texts(
    models: Sequence[Any],
    tokenizer: Any,
    files: Sequence[Path | str],
    window: int = 512,
    limit: int | None = 200,
    baseline_model: Any = None,
    progress: NamedAdvance | None = None,
    paired: Callable[[Comparison], dict[str, Any]] | None = None,
) -> list[dict[str, Any]]:
    """The figures of several models on the same windows, as ``evaluate_text`` gives them; the baseline runs once for all.

    paired: gives the figures of a comparison with the baseline (None: ``paired_figures``)."""
    texts: dict[str, list[dict[str, Any]]] = {}
    for spec in files:
        name = text_name(spec)
        if name in texts:
            raise UsageError(f"two texts are called '{name}'; name one of them: --text OTHER=FILE")
        tokens = first_tokens(tokenizer, spec, None if limit is None else limit * window)
        report = None if progress is None else partial(progress, name)
        try:
            texts[name] = (
                _figures_of_all(models, tokens, window, limit, report)
                if baseline_model is None
                else [
                    (paired or paired_figures)(comparison)
                    for comparison in compare_all(baseline_model, models, tokens, window, limit, report)
                ]
            )
        except BadInput as error:
            raise BadInput(f"text '{name}': {error}") from error
    return [{"texts": {name: model_figures[i] for name, model_figures in texts.items()}} for i in range(len(models))]


def tokenize(tokenizer: Any, text: str) -> Tensor:
    """The tokens of the whole text as it stands, int64 [n], without special tokens."""
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return torch.tensor(ids, dtype=torch.int64)


def first_tokens(tokenizer: Any, spec: Path | str, needed: int | None) -> Tensor:
    """The first tokens of a text, int64 [n]: at least ``needed`` if it has so many (None: all), as ``tokenize`` gives them."""
    if is_dataset(spec):
        return tokenize(tokenizer, read_text(spec))
    ids = text_file(spec).first_tokens(lambda text: tokenize(tokenizer, text).tolist(), needed)
    return torch.tensor(ids, dtype=torch.int64)


def _figures_of_all(
    models: Sequence[Any],
    tokens: Tensor,
    window: int,
    limit: int | None,
    progress: Callable[[int, int], None] | None,
) -> list[dict[str, Any]]:
    return [
        figures_of(nll_windows(model, tokens, window, limit, _share(progress, i, len(models))))
        for i, model in enumerate(models)
    ]


def _share(progress: Callable[[int, int], None] | None, place: int, parts: int) -> Callable[[int, int], None] | None:
    """Progress of one part of several of the same length."""
    return None if progress is None else lambda done, total: progress(place * total + done, parts * total)


def paired_figures(comparison: Comparison) -> dict[str, Any]:
    """The figures of a model beside those of its baseline on a text."""
    reference = perplexity(comparison.reference)
    change = perplexity_change(comparison.reference, comparison.approx)
    kl = comparison.kl
    mean_kl = bootstrap_ci(kl.mean(1))
    return {
        **figures_of(comparison.approx),
        "baseline_perplexity": reference.mean,
        "baseline_ci": reference.ends,
        "change_percent": 100.0 * change.mean,
        "change_ci": [100.0 * end for end in change.ends],
        "kl": {"mean": mean_kl.mean, "ci": mean_kl.ends, "p99": quantile(kl, 0.99)},
        "same_top1": float(comparison.same_top1.double().mean()),
    }


def figures_of(nll: Tensor) -> dict[str, Any]:
    """The figures of one model on a text, from its negative log-likelihoods [windows, window - 1]."""
    value = perplexity(nll)
    return {
        "perplexity": value.mean,
        "ci": value.ends,
        "windows": nll.shape[0],
        "tokens": nll.numel(),
        "nonfinite": int((~nll.isfinite()).sum()),
    }
