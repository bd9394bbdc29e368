"""A packed model measured in an engine, for ``qkit eval OUT --engine``: the windows and the tokens are those of qkit's own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from qkit.engines.process import ENGINES, TIMEOUT, EngineAnswer, EngineJob, run_engine
from qkit.errors import BadInput, UsageError
from qkit.evaluation.measure import add_changes, sizes
from qkit.evaluation.metrics import split_windows
from qkit.evaluation.request import EvalRequest
from qkit.evaluation.sources import text_name
from qkit.evaluation.text import figures_of, first_tokens
from qkit.files.checkpoint import Checkpoint
from qkit.files.folder import load_json
from qkit.files.gguf import read_gguf
from qkit.workflows.engine_layers import kernels_of
from qkit.workflows.own_arithmetic import engine_dtype, load_texts_tokenizer, result_of

POSITIONS = 2048  # of a model that does not say how many it has, as in lm-eval
_LENGTHS = ("n_positions", "max_position_embeddings", "n_ctx")


@dataclass
class EngineRuns:
    """An engine with a file: what it answered so far, and the longest text that it had to see."""

    out: Path
    engine: str
    python: Path
    dtype: str
    timeout: float
    answers: list[EngineAnswer] = field(default_factory=list)
    context: int = 0

    def ask(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        scored: Sequence[int] | None = None,
        new_tokens: int | Sequence[int] = 0,
        stops: Sequence[Sequence[int]] = (),
    ) -> EngineAnswer:
        """One run; arguments as in ``EngineJob``."""
        job = EngineJob(
            model=self.out, prompts=prompts, new_tokens=new_tokens, dtype=self.dtype, scored=scored, stops=stops
        )
        self.context = max(self.context, job.max_length)
        self.answers.append(run_engine(ENGINES[self.engine], self.python, job, self.timeout))
        return self.answers[-1]

    def about(self) -> dict[str, Any]:
        """The engine and what it ran the layers with; seconds are of all runs together."""
        last = self.answers[-1]
        return {
            "name": ENGINES[self.engine].title,
            "version": last.version,
            "python": str(self.python),
            "device": last.device,
            "dtype": last.dtype,
            "cache": self._cache(last),
            "context": self.context,
            "kernels": kernels_of(last),
            "seconds": {name: sum(a.seconds[name] for a in self.answers) for name in last.seconds},
        }

    def _cache(self, answer: EngineAnswer) -> str:
        """The dtype of the KV cache: what the engine says of its layers, else its default."""
        named = {answer.dtype if cache["dtype"] == "auto" else str(cache["dtype"]) for cache in answer.caches.values()}
        return ", ".join(sorted(named)) or ("float16" if self.engine == "llama.cpp" else answer.dtype)


def evaluate_in_engine(
    out: Path, engine: str, python: Path, request: EvalRequest, timeout: float = TIMEOUT
) -> dict[str, Any]:
    """The figures of texts and tasks of ``out``, as ``evaluation.measure`` gives them without a baseline, and under "engine"
    what ``EngineRuns.about`` says: every likelihood and every text is the engine's. timeout: of each run of the engine.

    Raises UsageError for two texts of one name, EngineRefusal where the engine does not run the model, and what reading texts
    and ``run_tasks`` raise.
    """
    runs = EngineRuns(out, engine, python, engine_dtype(out, engine), timeout)
    tokenizer = load_texts_tokenizer(out)
    figures: dict[str, Any] = {"texts": _texts(runs, tokenizer, request)} if request.texts else {}
    if request.tasks:
        from qkit.evaluation.harness import run_tasks_in_engine

        tasks = run_tasks_in_engine(
            runs.ask,
            tokenizer,
            positions_of(out),
            end_tokens(out),
            request.tasks,
            request.limit,
            request.allow_task_code,
            request.task_dir,
        )
        figures |= add_changes(tasks, {})
    return {
        "model": (result_of(out) or out).resolve().name,
        "baseline": None,
        "dtype": runs.answers[-1].dtype,
        "window": request.window,
        "size": {"bytes": out.stat().st_size} if out.is_file() else sizes(out, None),
        "engine": runs.about(),
        **figures,
    }


def _texts(runs: EngineRuns, tokenizer: Any, request: EvalRequest) -> dict[str, Any]:
    names = [text_name(spec) for spec in request.texts]
    twice = next((name for i, name in enumerate(names) if name in names[:i]), None)
    if twice is not None:
        raise UsageError(f"two texts are called '{twice}'; name one of them: --text OTHER=FILE")
    longest = positions_of(runs.out)
    if request.window > longest:
        raise UsageError(
            f"--window {request.window}: the model in {runs.out} has {longest} positions: use at most so many"
        )
    needed = None if request.windows is None else request.windows * request.window
    rows = []
    for name, spec in zip(names, request.texts, strict=True):
        try:
            rows.append(split_windows(first_tokens(tokenizer, spec, needed), request.window, request.windows))
        except BadInput as error:
            raise BadInput(f"text '{name}': {error}") from error
    answer = runs.ask(torch.cat(rows).tolist())
    parts = (-torch.tensor(answer.logprobs, dtype=torch.float64)).split([len(row) for row in rows])
    return {name: figures_of(part) for name, part in zip(names, parts, strict=True)}


def positions_of(out: Path) -> int:
    """The tokens that a model can see at once."""
    if out.is_file():
        values = read_gguf(out).values
        found = values.get(f"{values.get('general.architecture')}.context_length")
        return int(found) if isinstance(found, int) else POSITIONS
    config = Checkpoint.open(out, quantized=True).config
    inner = config.get("text_config")
    parts = [part for part in (inner, config) if isinstance(part, Mapping)]
    return next((int(part[name]) for part in parts for name in _LENGTHS if isinstance(part.get(name), int)), POSITIONS)


def end_tokens(out: Path) -> set[int]:
    """The tokens that end a text by the settings of a folder; none for a GGUF file that lies by itself."""
    file = (result_of(out) or out) / "generation_config.json"
    found = load_json(file, "generation config").get("eos_token_id") if file.is_file() else None
    ends = found if isinstance(found, list) else [found]
    return {end for end in ends if isinstance(end, int)}
