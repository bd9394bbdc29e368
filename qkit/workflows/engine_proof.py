"""A packed model held against what an engine computes of it: ``qkit verify OUT --engine``.

The engine gives log-probabilities of the tokens of a few texts, and so does qkit, of the same file. Both round: so the
difference is judged by the noise of the file, which is what another rounding alone changes in qkit's own arithmetic. For an
engine that computes in 16 bits that is qkit in 16 bits against qkit in float32. For one in float32 it is qkit in float32
with the last bit of the embeddings changed: rounded inputs (W8A8, FP8) make that a difference of the same size.
"""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qkit.engines.process import ENGINES, TIMEOUT, Engine, EngineAnswer, EngineJob, EngineRefusal, run_engine
from qkit.errors import BadInput, Unsupported
from qkit.evaluation.decoding import greedy_tokens
from qkit.evaluation.text import tokenize
from qkit.families.structure import predicts_next
from qkit.files.checkpoint import Checkpoint
from qkit.files.embedded import embedded_text
from qkit.files.folder import is_pipeline, read_record
from qkit.kvcache.argument import with_cache
from qkit.kvcache.policy import stored
from qkit.kvcache.read_back import ReadBackCache
from qkit.runtime.loading import load, load_tokenizer
from qkit.verification.model_engines import EngineRow

TEXTS, LENGTH, NEW = 6, 96, 24  # texts, tokens of each, greedy tokens
# An engine and qkit in 16 bits round independently of each other: twice the noise is more than both together. Single
# tokens vary more; the largest of an engine was up to 1.4 of the largest in the noise.
MEAN_MARGIN, LARGEST_MARGIN = 2.0, 4.0
# Where the noise is very small, an engine may still do its sums in another order. The mean and the largest difference of an
# unquantized model between vLLM and qkit were 0.011 and 0.062.
FLOORS = {"bfloat16": (0.01, 0.1), "float16": (0.002, 0.02), "float32": (1e-4, 1e-2)}
NewCache = Callable[[Any], Any]  # makes an empty cache for a model
_JITTER = 2.0**-23  # the last bit of float32
# Kernels that leave inputs in 16 bits whatever the scheme says, by parts of their names.
_CUT = "its cache takes the next FP8 number toward zero, and not the nearest: the error of the cache is larger than on GPUs"
_INPUTS_KEPT = ("WNA16", "W4A16", "Marlin", "Machete", "Exllama", "AllSpark", "Conch")


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
    prompts = proof_texts(load_tokenizer(out))
    job = EngineJob(model=out, prompts=prompts.tolist(), new_tokens=NEW, dtype=dtype)
    try:
        answer = run_engine(kind, python, job, timeout)
    except EngineRefusal as refusal:
        return EngineProof(engine=kind.title, dtype=dtype, refused=str(refusal), expected=_expected(kind, rows))
    cache = _fp8_cache(out, engine, answer)
    plain = load_model(out, torch.float32)
    own = log_probabilities(plain, prompts, cache)
    greedy = greedy_tokens(plain, prompts, prompts.shape[1], None if cache is None else stored(out), NEW).tolist()
    noise = Difference.of(_other_rounding(out, plain, prompts, cache, dtype), own)
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
        notes=_notes(out, answer) + ([_CUT] if cache is not None and _cuts(engine, answer) else []),
        seconds=answer.seconds,
        expected=_expected(kind, rows),
    )


def _expected(kind: Engine, rows: Sequence[EngineRow]) -> bool | None:
    """Whether the table says that this engine loads all of the file; None where it says nothing."""
    answers = [row.loads_as is not None for row in rows if row.engine.split(" ")[0] == kind.title]
    return all(answers) if answers else None


def allowed(noise: Difference, dtype: str) -> tuple[float, float]:
    """The largest mean and the largest single difference that the noise of a file explains."""
    mean, largest = FLOORS[dtype]
    return max(MEAN_MARGIN * noise.mean, mean), max(LARGEST_MARGIN * noise.largest, largest)


def engine_dtype(out: Path, engine: str) -> str:
    """The arithmetic that an engine is asked for: transformers computes in float32, where a difference shows most; others in
    16 bits as they are used. Raises Unsupported for a folder that holds no language model."""
    if is_pipeline(out):
        raise Unsupported(
            f"{out}: --engine is for models that continue a text, and this is a diffusion pipeline: leave --engine out"
        )
    config = Checkpoint.open(out, quantized=True).config
    inner = config.get("text_config")
    texts = inner if isinstance(inner, Mapping) else {}
    named = str(config.get("dtype") or config.get("torch_dtype") or texts.get("dtype") or texts.get("torch_dtype"))
    return "float32" if engine == "transformers" else "float16" if "float16" in named.split(".") else "bfloat16"


def load_model(out: Path, dtype: torch.dtype) -> Any:
    """qkit's own model of the folder, with a plain cache. Raises Unsupported for one that does not continue a text."""
    model = load(out, dtype=dtype, kv="none")
    if not predicts_next(model):
        raise Unsupported(
            f"{out}: --engine is for models that continue a text, and a {type(model).__name__} does not: leave --engine out"
        )
    return model


def proof_texts(tokenizer: Any) -> Tensor:
    """The first tokens of the first long paragraphs of the embedded text, int64 [TEXTS, LENGTH], begun as the tokenizer begins
    a text. Raises BadInput for a tokenizer that makes too few tokens."""
    paragraphs = embedded_text("evaluation").read_text(encoding="utf-8").splitlines()
    rows = []
    for paragraph in paragraphs:
        ids = tokenizer(paragraph, verbose=False)["input_ids"][:LENGTH]
        if len(ids) == LENGTH and len(tokenize(tokenizer, paragraph)) >= LENGTH:
            rows.append(ids)
        if len(rows) == TEXTS:
            return torch.tensor(rows, dtype=torch.int64)
    raise BadInput(f"the tokenizer makes {len(rows)} texts of {LENGTH} tokens, expected {TEXTS}: leave --engine out")


@torch.inference_mode()
def log_probabilities(model: Any, prompts: Tensor, cache: NewCache | None = None) -> Tensor:
    """Of all tokens of each prompt but the first, float64 [texts, tokens - 1]. cache: makes the cache of a pass, through which
    all keys and values go; None for a pass without one."""
    rows = []
    for ids in prompts:
        through = {} if cache is None else with_cache(model, cache(model))
        logits = model(input_ids=ids[None].to(model.device), **through, use_cache=cache is not None).logits
        logits = logits[0, :-1].float().cpu()
        rows.append(logits.log_softmax(-1).gather(1, ids[1:, None])[:, 0].double())
    return torch.stack(rows)


def _other_rounding(out: Path, plain: Any, prompts: Tensor, cache: NewCache | None, dtype: str) -> Tensor:
    """The log-probabilities of the same file with other roundings; ``plain`` is its model in float32."""
    if dtype == "float32":
        with _jitter(plain):
            return log_probabilities(plain, prompts, cache)
    model = load_model(out, getattr(torch, dtype))
    found = log_probabilities(model, prompts, cache)
    del model
    gc.collect()
    return found


@contextmanager
def _jitter(model: Any) -> Iterator[None]:
    """The last bit of each number in the embeddings of tokens goes up or down."""
    draw = torch.Generator().manual_seed(0)

    def change(module: Any, args: Any, output: Tensor) -> Tensor:
        signs = torch.randint(0, 2, output.shape, generator=draw) * 2 - 1
        return output * (1 + _JITTER * signs).to(output)

    hook = model.get_input_embeddings().register_forward_hook(change)
    try:
        yield
    finally:
        hook.remove()


def _fp8_cache(out: Path, engine: str, answer: EngineAnswer) -> NewCache | None:
    """The FP8 cache of the file as this engine fills it; None where its cache is a plain one."""
    policy = stored(out)
    used = any("fp8" in str(cache["dtype"]) for cache in answer.caches.values())
    if policy is None or policy.kind != "fp" or not used:
        return None
    return partial(ReadBackCache, cut=_cuts(engine, answer))


def _cuts(engine: str, answer: EngineAnswer) -> bool:
    """Whether the engine's cache takes the next FP8 number toward zero. vLLM 0.32 on CPUs does: with that its log-probabilities
    are those of qkit but for 0.021 on average, and with rounding to nearest they are 0.071 away (tiny-llama in W4A16)."""
    return engine == "vllm" and answer.device == "cpu"


def _same(theirs: Sequence[int], own: Sequence[int]) -> int:
    """Tokens before the first that differs."""
    return next((i for i, (a, b) in enumerate(zip(theirs, own, strict=False)) if a != b), min(len(theirs), len(own)))


# ---- layers -----------------------------------------------------------------------------------------------------


def packed_names(out: Path) -> list[str]:
    """The layers that the record lists as packed; none for a folder that qkit did not write."""
    record = read_record(out)
    return [] if record is None else list(record.get("linears") or {})


def kernels_of(answer: EngineAnswer) -> dict[str, int]:
    """What runs the layers, and how many of them, most first."""
    names = Counter(
        f"{used['scheme']}: {used['kernel']}"
        if {"scheme", "kernel"} <= used.keys()
        else used.get("scheme") or _plain(used)
        for used in answer.layers.values()
    )
    return dict(names.most_common())


def _plain(used: Mapping[str, str]) -> str:
    return used.get("method") or used["class"]


def unquantized(answer: EngineAnswer, packed: Sequence[str]) -> list[str]:
    """Layers that are packed in the file and that the engine runs as plain ones."""
    joined = {part: whole for whole, parts in answer.joined.items() for part in parts}
    found = []
    for name in packed:
        used = _layer(name, answer.layers, joined)
        if used is not None and "scheme" not in used and "Unquantized" in used.get("method", "Unquantized"):
            found.append(name)
    return found


def _layer(name: str, layers: Mapping[str, Mapping[str, str]], joined: Mapping[str, str]) -> Mapping[str, str] | None:
    """What runs a layer of the file: under its own name, that of the layer that it is a part of, or that of the experts that
    hold it; names may begin in another way in the engine."""
    parent, _, leaf = name.rpartition(".")
    names = [name, f"{parent}.{joined.get(leaf, leaf)}"]
    while parent:
        names.append(parent)
        parent = parent.rpartition(".")[0]
    for wanted in names:
        if wanted in layers:
            return layers[wanted]
        first = next((i for i, part in enumerate(wanted.split(".")) if part.isdigit()), None)
        end = None if first is None else "." + ".".join(wanted.split(".")[first:])
        fitting = [] if end is None else [layer for layer in layers if layer.endswith(end)]
        if len(fitting) == 1:
            return layers[fitting[0]]
    return None


def _notes(out: Path, answer: EngineAnswer) -> list[str]:
    """What else one should know of how the engine ran the file."""
    notes = []
    record = read_record(out) or {}
    rounded = any(linear.get("activations") for linear in (record.get("linears") or {}).values())
    kernels = {used["kernel"] for used in answer.layers.values() if "kernel" in used and "A16" not in used["scheme"]}
    kept = sorted(k for k in kernels if any(part in k for part in _INPUTS_KEPT))
    if rounded and kept:
        notes.append(f"{', '.join(kept)} leaves the inputs of layers in 16 bits, and the file says to round them")
    if answer.unused:
        more = f" (and {len(answer.unused) - 1} more)" if len(answer.unused) > 1 else ""
        notes.append(f"it does not use {answer.unused[0]}{more}")
    return notes
