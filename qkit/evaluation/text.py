"""Perplexity of texts, and the divergence from the original model on them.

A text is given as a path, as ``NAME=path`` to choose the name it goes by, or as ``dataset:NAME[:config][:split]
[:column]`` for a data set of the ``datasets`` package (a hub id or a local folder; its rows are joined by blank lines).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qkit.errors import BadInput, Unsupported, UsageError
from qkit.quality import bootstrap_ci, compare_windows, nll_windows, perplexity, perplexity_change, quantile
from qkit.textfile import TextFile

Progress = Callable[[str, int, int], None]  # (text, windows done, windows in all)


def evaluate_text(
    model: Any,
    tokenizer: Any,
    files: Sequence[Path | str],
    window: int = 512,
    limit: int | None = 200,
    baseline_model: Any = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """{"texts": {name: figures}}; the name of a text is its file's name without the suffix.

    Each text is tokenised by ``tokenizer`` as far as it is needed, without special tokens, cut into consecutive windows of
    ``window`` tokens, of which the first ``limit`` are used, and scored at positions 2 to ``window`` with an fp32 log-softmax.
    Figures: perplexity, ci (95 %, over windows), windows, tokens (scored), nonfinite (scored tokens without a finite
    likelihood); with a baseline also baseline_perplexity, baseline_ci, change_percent, change_ci (paired), kl (mean,
    ci, p99; nats per token, KL(baseline || model)) and same_top1 (fraction of tokens). Figures that are not finite
    come out as NaN or infinity, not as an error.

    Raises BadInput for a text that is unreadable or shorter than one window, UsageError for a bad specification.
    """
    texts: dict[str, dict[str, Any]] = {}
    for spec in files:
        name = text_name(spec)
        if name in texts:
            raise UsageError(f"two texts are called '{name}'; name one of them: --text OTHER=FILE")
        tokens = first_tokens(tokenizer, spec, None if limit is None else limit * window)
        report = None if progress is None else partial(progress, name)
        try:
            texts[name] = _figures(model, baseline_model, tokens, window, limit, report)
        except BadInput as error:
            raise BadInput(f"text '{name}': {error}") from error
    return {"texts": texts}


def tokenize(tokenizer: Any, text: str) -> Tensor:
    """int64 [n]: the whole text as it stands, no special tokens."""
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return torch.tensor(ids, dtype=torch.int64)


def first_tokens(tokenizer: Any, spec: Path | str, needed: int | None) -> Tensor:
    """int64 [n]: at least ``needed`` tokens of a text if it has so many (None: all), as ``tokenize`` gives them."""
    if _is_dataset(spec):
        return tokenize(tokenizer, read_text(spec))
    ids = _text_file(spec).first_tokens(lambda text: tokenize(tokenizer, text).tolist(), needed)
    return torch.tensor(ids, dtype=torch.int64)


def _text_file(spec: Path | str) -> TextFile:
    return TextFile(_named_file(spec)[1], "text")


def _figures(
    model: Any,
    baseline: Any,
    tokens: Tensor,
    window: int,
    limit: int | None,
    progress: Callable[[int, int], None] | None,
) -> dict[str, Any]:
    if baseline is None:
        nll = nll_windows(model, tokens, window, limit, progress)
        return _own(nll)
    both = compare_windows(baseline, model, tokens, window, limit, progress)
    reference, change, kl = perplexity(both.reference), perplexity_change(both.reference, both.approx), both.kl
    mean_kl = bootstrap_ci(kl.mean(1))
    return {
        **_own(both.approx),
        "baseline_perplexity": reference.mean,
        "baseline_ci": reference.ends,
        "change_percent": 100.0 * change.mean,
        "change_ci": [100.0 * end for end in change.ends],
        "kl": {"mean": mean_kl.mean, "ci": mean_kl.ends, "p99": quantile(kl, 0.99)},
        "same_top1": float(both.same_top1.double().mean()),
    }


def _own(nll: Tensor) -> dict[str, Any]:
    value = perplexity(nll)
    return {
        "perplexity": value.mean,
        "ci": value.ends,
        "windows": nll.shape[0],
        "tokens": nll.numel(),
        "nonfinite": int((~nll.isfinite()).sum()),
    }


def text_name(spec: Path | str) -> str:
    """The name a text goes by. Raises BadInput for a file that is not there, UsageError for a bad data set."""
    if _is_dataset(spec):
        name, config, _, _ = _dataset_parts(str(spec))
        return Path(name).name if config is None else f"{Path(name).name}-{config}"
    return _named_file(spec)[0]


def read_text(spec: Path | str) -> str:
    """The content of a text. Raises BadInput when it cannot be read, Unsupported without the datasets package."""
    if _is_dataset(spec):
        return _read_dataset(str(spec))
    return _text_file(spec).text()[0]


def _named_file(spec: Path | str) -> tuple[str, Path]:
    path = Path(spec)
    name = path.stem
    if isinstance(spec, str) and "=" in spec and not path.exists():
        name, _, rest = spec.partition("=")
        path = Path(rest)
    if not path.is_file():
        raise BadInput(f"text {path}: there is no such file; give the path of a text file")
    return name, path


def _is_dataset(spec: Path | str) -> bool:
    return isinstance(spec, str) and spec.startswith("dataset:")


def _dataset_parts(spec: str) -> tuple[str, str | None, str, str]:
    """(name, config, split, column)"""
    parts = spec.split(":")[1:]
    if not parts[0] or len(parts) > 4:
        raise UsageError(f"{spec!r} is not a data set; write dataset:NAME[:config][:split][:column]")
    name, config, split, column = [*parts, "", "", ""][:4]
    return name, config or None, split or "test", column or "text"


def _read_dataset(spec: str) -> str:
    name, config, split, column = _dataset_parts(spec)
    try:
        import datasets
    except ImportError as error:
        raise Unsupported(f"{spec} needs the datasets package: pip install qkit[eval]") from error
    try:
        rows = datasets.load_dataset(name, config, split=split)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise BadInput(
            f"data set {name!r} (config {config}, split {split}) cannot be loaded: {first_line(error)}; "
            "check its name and the network, or give a text file"
        ) from error
    if column not in rows.column_names:
        raise BadInput(f"data set {name!r} has no column {column!r}; it has {', '.join(rows.column_names)}")
    return "\n\n".join(str(row) for row in rows[column])


def first_line(error: Exception) -> str:
    """What another library had to say, as a part of a sentence."""
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__
