"""A packed model held against what an engine computes of it: ``qkit verify OUT --engine``.

The engine gives log-probabilities of the tokens of a few texts, and so does qkit, of the same file. Both round: so the
difference is judged by the noise of the file, which is what another rounding alone changes in qkit's own arithmetic. For an
engine that computes in 16 bits that is qkit in 16 bits against qkit in float32. For one in float32 it is qkit in float32
with the last bit of the embeddings changed: rounded inputs (W8A8, FP8) make that a difference of the same size.

Where the kernel of a layer leaves inputs in 16 bits that the file says to round, qkit leaves them too: the kernel is held
against what it is there to compute, and a note names it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qkit.engines.process import ENGINES, TIMEOUT, Engine, EngineJob, EngineRefusal, run_engine
from qkit.evaluation.decoding import greedy_tokens
from qkit.kvcache.policy import stored
from qkit.verification.engine_types import RUN
from qkit.verification.model_engines import EngineRow
from qkit.verification.vllm_fit import NEEDS_AMX
from qkit.verification.vllm_table import CPU
from qkit.workflows.engine_layers import kernels_of, notes_of, packed_names, unquantized, with_inputs_kept
from qkit.workflows.own_arithmetic import (
    Q8,
    TEXTS,
    cuts_toward_zero,
    engine_cache,
    engine_dtype,
    keep_inputs,
    load_model,
    load_texts_tokenizer,
    log_probabilities,
    other_rounding,
    proof_texts,
    rounding_layers,
)

NEW = 24  # greedy tokens after each text
# An engine and qkit in 16 bits round independently of each other: twice the noise is more than both together. Single
# tokens vary more; the largest of an engine was up to 1.4 of the largest in the noise.
MEAN_MARGIN, LARGEST_MARGIN = 2.0, 4.0
# Where the noise is very small, an engine may still do its sums in another order. The mean and the largest difference of an
# unquantized model between vLLM and qkit were 0.011 and 0.062.
FLOORS = {"bfloat16": (0.01, 0.1), "float16": (0.002, 0.02), "float32": (1e-4, 1e-2), Q8: (0.01, 0.1)}
_CUT = "its cache takes the next FP8 number toward zero, and not the nearest: the error of the cache is larger than on GPUs"


@dataclass(frozen=True)
class Difference:
    """Of two sets of log-probabilities, in nats: mean and largest absolute difference, and the mean with its sign."""

    mean: float
    largest: float
    bias: float

    @staticmethod
    def of(a: Tensor, b: Tensor) -> Difference:
        """The difference a - b; one that is not a number counts as infinite."""
        difference = (a.double() - b.double()).nan_to_num(nan=torch.inf)
        return Difference(float(difference.abs().mean()), float(difference.abs().max()), float(difference.mean()))


@dataclass(frozen=True, kw_only=True)
class EngineProof:
    """What an engine made of a packed model, and whether that is what qkit makes of it.

    difference: between engine and qkit; noise: of the file; limits: the allowed mean and largest difference
    kernels: what runs layers, by "scheme: kernel" or the class of the layer, and how many; unquantized: layers that are
    packed in the file and run as plain ones; same_tokens: for each text, how many greedy tokens are the same before the
    first other one, of new_tokens (not judged); cache: the dtype of a KV cache that is no plain one; refused: what the engine
    said where it did not run the file, and else empty; expected: whether the table of engines said that it loads the file,
    None where there is no answer
    """

    engine: str
    version: str = ""
    device: str = ""
    dtype: str = ""
    texts: int = TEXTS
    tokens: int = 0
    difference: Difference | None = None
    noise: Difference | None = None
    limits: tuple[float, float] = (0.0, 0.0)
    new_tokens: int = NEW
    same_tokens: list[int] = field(default_factory=list)
    kernels: dict[str, int] = field(default_factory=dict)
    unquantized: list[str] = field(default_factory=list)
    cache: str = ""
    notes: list[str] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    refused: str = ""
    expected: bool | None = None

    @property
    def ok(self) -> bool:
        """Whether the engine ran the file and the difference is within its limits."""
        d = self.difference
        return d is not None and d.mean <= self.limits[0] and d.largest <= self.limits[1]

    @property
    def verdict(self) -> str:
        """The result in one sentence."""
        if self.difference is None:
            foreseen = {
                True: "; qkit's table of engines says that it loads, and is wrong",
                False: ", as qkit's table says",
            }
            return self.refused + ("" if self.expected is None else foreseen[self.expected])
        d, (mean, largest) = self.difference, self.limits
        said = "agrees with qkit" if self.ok else "does NOT compute what qkit computes of this file"
        figures = f"mean difference {d.mean:.4g} (allowed {mean:.4g}), largest {d.largest:.4g} (allowed {largest:.4g})"
        return f"{self.engine} {self.version} {said}: {figures} of {self.tokens} log-probabilities"

    def to_json(self) -> dict[str, Any]:
        """All fields as a JSON-able dictionary, with ``ok`` and the verdict."""
        return {"ok": self.ok, "verdict": self.verdict, **asdict(self)}


def prove(
    out: Path, engine: str, python: Path, timeout: float = TIMEOUT, rows: Sequence[EngineRow] = ()
) -> EngineProof:
    """The proof of the model in the folder ``out`` by one of ENGINES, in the interpreter ``python``.

    rows: the table of engines, as ``verify`` gives it

    Raises UsageError for an interpreter without the engine, Unsupported for a model that does not continue a text, and what
    loading raises. What the engine refuses is part of the proof.
    """
    kind = ENGINES[engine]
    dtype = engine_dtype(out, engine)
    prompts = proof_texts(load_texts_tokenizer(out))
    job = EngineJob(model=out, prompts=prompts.tolist(), new_tokens=NEW, dtype=dtype)
    try:
        answer = run_engine(kind, python, job, timeout)
    except EngineRefusal as refusal:
        return EngineProof(
            engine=kind.title, dtype=dtype, refused=str(refusal), expected=_expected(kind, rows, refusal.device)
        )
    cache = engine_cache(out, engine, answer)
    plain = load_model(out, torch.float32)
    kept = with_inputs_kept(answer, rounding_layers(plain))
    keep_inputs(plain, kept)
    own = log_probabilities(plain, prompts, cache)
    greedy = greedy_tokens(plain, prompts, prompts.shape[1], None if cache is None else stored(out), NEW).tolist()
    noise = Difference.of(other_rounding(out, plain, prompts, cache, dtype, kept), own)
    theirs = torch.tensor(answer.logprobs, dtype=torch.float64)
    return EngineProof(
        engine=kind.title,
        version=answer.version,
        device=answer.device,
        dtype=answer.dtype,
        tokens=own.numel(),
        difference=Difference.of(theirs, own),
        noise=noise,
        limits=allowed(noise, dtype),
        same_tokens=[_same(a, b) for a, b in zip(answer.tokens, greedy, strict=True)],
        kernels=kernels_of(answer),
        unquantized=unquantized(answer, packed_names(out)),
        cache=", ".join(sorted({str(c["dtype"]) for c in answer.caches.values()} - {"auto"})),
        notes=notes_of(answer, kept) + ([_CUT] if cache is not None and cuts_toward_zero(engine, answer) else []),
        seconds=answer.seconds,
        expected=_expected(kind, rows, answer.device),
    )


def _expected(kind: Engine, rows: Sequence[EngineRow], device: str) -> bool | None:
    """Whether the table says that this engine loads all of the file, on that device; None where it says nothing."""
    own = [row for row in rows if row.engine.split(" ")[0] == kind.title]

    def loads(row: EngineRow) -> bool:
        on_cpu = CPU in (row.platforms or (CPU,)) and (NEEDS_AMX not in row.limits or has_amx())
        return row.loads_as is not None and (device != CPU or on_cpu)

    return all(map(loads, own)) if own else None


def has_amx() -> bool:
    """Whether the CPU multiplies matrices in tiles, as the system tells it."""
    try:
        return "amx_tile" in Path("/proc/cpuinfo").read_text(encoding="utf-8").split()
    except OSError:
        return False


def proved_rows(rows: Sequence[EngineRow], proof: EngineProof) -> list[EngineRow]:
    """The table of engines with what a run of the file showed in place of what was expected."""

    def proved(row: EngineRow) -> EngineRow:
        if row.engine.split(" ")[0] != proof.engine:
            return row
        if proof.difference is None:
            return replace(row, loads_as=None, limits=(proof.refused,), known=RUN)
        return replace(row, known=RUN)

    return [proved(row) for row in rows]


def allowed(noise: Difference, dtype: str) -> tuple[float, float]:
    """The largest mean and the largest single difference that the noise of a file explains."""
    mean, largest = FLOORS[dtype]
    return max(MEAN_MARGIN * noise.mean, mean), max(LARGEST_MARGIN * noise.largest, largest)


def _same(theirs: Sequence[int], own: Sequence[int]) -> int:
    """Tokens before the first that differs."""
    return next((i for i, (a, b) in enumerate(zip(theirs, own, strict=False)) if a != b), min(len(theirs), len(own)))
