"""The perplexity of a packed model in an engine, for ``qkit eval OUT --engine``: the windows are those of qkit's own."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from qkit.engines.process import ENGINES, TIMEOUT, EngineJob, run_engine
from qkit.errors import UsageError
from qkit.evaluation.measure import sizes
from qkit.evaluation.metrics import split_windows
from qkit.evaluation.sources import text_name
from qkit.evaluation.text import figures_of, first_tokens
from qkit.workflows.engine_layers import kernels_of
from qkit.workflows.own_arithmetic import engine_dtype, load_texts_tokenizer


def evaluate_in_engine(
    out: Path, engine: str, python: Path, texts: Sequence[str], window: int, windows: int, timeout: float = TIMEOUT
) -> dict[str, Any]:
    """The figures of ``out``, as ``evaluation.measure`` gives them without a baseline, and {"engine": {"name", "version",
    "device", "dtype", "kernels", "seconds"}}: every likelihood is the engine's.

    Raises UsageError for two texts of one name, EngineRefusal where the engine does not run the model, and what reading texts
    raises.
    """
    names = [text_name(spec) for spec in texts]
    twice = next((name for i, name in enumerate(names) if name in names[:i]), None)
    if twice is not None:
        raise UsageError(f"two texts are called '{twice}'; name one of them: --text OTHER=FILE")
    dtype = engine_dtype(out, engine)
    tokenizer = load_texts_tokenizer(out)
    rows = [split_windows(first_tokens(tokenizer, spec, windows * window), window, windows) for spec in texts]
    job = EngineJob(model=out, prompts=torch.cat(rows).tolist(), new_tokens=0, dtype=dtype)
    answer = run_engine(ENGINES[engine], python, job, timeout)
    nll = -torch.tensor(answer.logprobs, dtype=torch.float64)
    parts = nll.split([len(row) for row in rows])
    return {
        "model": out.resolve().name,
        "baseline": None,
        "dtype": answer.dtype,
        "window": window,
        "size": {"bytes": out.stat().st_size} if out.is_file() else sizes(out, None),
        "engine": {
            "name": ENGINES[engine].title,
            "version": answer.version,
            "device": answer.device,
            "dtype": answer.dtype,
            "kernels": kernels_of(answer),
            "seconds": answer.seconds,
        },
        "texts": {name: figures_of(part) for name, part in zip(names, parts, strict=True)},
    }
