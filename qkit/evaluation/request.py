"""The request of ``qkit eval`` and ``qkit check``; it is read before torch is imported."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from qkit.calibration.options import QUESTIONS
from qkit.errors import UsageError
from qkit.kvcache.policy import CachePolicy

DTYPES = ("float32", "bfloat16")  # of arithmetic
PREFIX = "vbench:"
SUITE_TASKS, SUITE_SAMPLES = (
    ("qkit_cloze",),
    60,
)  # half of its questions: with four choices each they are the longest part


@dataclass(frozen=True, kw_only=True)
class EvalRequest:
    """The request of ``qkit eval`` and ``qkit check``. ``texts`` as for ``evaluate_text``; ``limit``: samples per task, None
    for all. ``caches``: KV cache policies, compared by decoding the texts, ``step`` tokens at a time after a ``prompt``
    (None: half a window), or by ``retrieval`` from them, beside a plain cache. ``image_text``: questions about images, as for
    ``evaluate_image_text``, so many ``questions`` at most; with ``examples`` of them answered in words. ``videos``: of a
    diffusion pipeline, how many it is to make, and with ``vbench_python`` VBench's interpreter for tasks of VBench, whose
    videos ``videos_dir`` keeps. ``prompts``: whether the model, and the baseline, continue a few prompts
    (``evaluation.continuations``). ``suite``: whether all figures of ``evaluation.suite`` are measured, which need a
    baseline."""

    texts: Sequence[Path | str] = ()
    window: int = 512
    windows: int | None = 200
    tasks: Sequence[str] = ()
    limit: int | None = None
    task_dir: Path | None = None
    allow_task_code: bool = False
    dtype: str = "float32"
    device: str = "cpu"
    caches: Sequence[CachePolicy] = ()
    prompt: int | None = None
    step: int = 1
    retrieval: bool = False
    image_text: str | None = None
    questions: int = QUESTIONS
    examples: int = 0
    videos: int = 0
    vbench_python: Path | None = None
    videos_dir: Path | None = None
    prompts: bool = False
    suite: bool = False

    @property
    def alone(self) -> str | None:
        """The option for a measurement of one model at a time, where one is asked for."""
        options = {
            "--kv": self.caches,
            "--retrieval": self.retrieval,
            "--image-text": self.image_text is not None,
            "--videos": self.videos,
            "--tasks vbench:": dimensions_of(self.tasks),
        }
        return next((option for option, is_given in options.items() if is_given), None)


def dimensions_of(tasks: Sequence[str]) -> list[str]:
    """The VBench dimensions of 'vbench:a,b' among --tasks; none where there is no vbench. Raises UsageError for other tasks
    beside them."""
    if not any(t.startswith(PREFIX) for t in tasks):
        return []
    if not tasks[0].startswith(PREFIX):
        raise UsageError(
            f"--tasks {tasks[0]}: tasks of VBench and other tasks cannot be measured together: leave one of the two out"
        )
    return [t.removeprefix(PREFIX) for t in tasks]


def suite_tasks() -> list[str]:
    """The tasks of the suite, unless others are named: those that need no network, where lm-eval is installed."""
    return list(SUITE_TASKS) if find_spec("lm_eval") and find_spec("qkit_data") else []


def jsonable(value: Any) -> Any:
    """The value with None in place of NaN and infinity, which JSON cannot say."""
    if isinstance(value, dict):
        return {key: jsonable(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [jsonable(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
