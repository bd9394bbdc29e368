"""The evaluation of ``qkit eval --suite default``: a quantized model beside its original, on texts and on chat answers.

Texts: every position of every window is scored with the text before it. Chat: the original answers prompts that travel with
qkit, greedily and through its own chat template, and every token of these answers is scored with all that comes before it. So
one pass over an answer says how far the file's own greedy answer is the same: up to the first token that it would have chosen
otherwise. Long context: one long window that goes through a KV cache in pieces, as in a long chat.

Flips are changes between right and wrong in either direction ("Accuracy is not all you need", arXiv 2407.09141). On a text a
model is right where it puts the next token of the text first. A mean hides them: as much can be lost as is gained.

Weights alone are measured: the KV cache is a plain one, also where the folder asks for another (``qkit eval --kv stored``).
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qkit.calibration.chats import Chats
from qkit.evaluation.continuations import greedy_continuations
from qkit.evaluation.decoding import fresh_cache
from qkit.evaluation.metrics import (
    Comparison,
    bootstrap_ci,
    compare_logits,
    exp,
    joined,
    longest_window,
    quantile,
    ratio_ci,
)
from qkit.evaluation.text import first_tokens, paired_figures
from qkit.files.embedded import embedded_prompts
from qkit.kvcache.argument import with_cache
from qkit.system.progress import Advance, NamedAdvance

NEW_TOKENS = 128  # of an answer at most
LONGEST = 4096  # tokens of the long window, or what the model can take: the work grows with its square
PIECE = 512  # tokens of it that go through a model at once
EXAMPLES = 6  # answers of every model that are kept in words, each to a prompt of another kind
BUCKETS = 8  # of the positions in it


class Stopwatch:
    """Adds up the seconds that a model spends in its passes."""

    def __init__(self, model: Any) -> None:
        self.seconds, self._begun = 0.0, 0.0
        model.register_forward_pre_hook(self._start)
        model.register_forward_hook(self._stop)

    def _start(self, *_: Any) -> None:
        self._begun = time.perf_counter()

    def _stop(self, *_: Any) -> None:
        self.seconds += time.perf_counter() - self._begun


def text_figures(comparison: Comparison) -> dict[str, Any]:
    """What ``paired_figures`` gives, and more: kl.p999, same_top1_ci, recovery (the baseline's perplexity over the model's, in
    %, with a paired ci) and flips (in % of the tokens, with ci, and its two parts lost and gained)."""
    figures = paired_figures(comparison)
    difference = bootstrap_ci(comparison.approx.mean(1) - comparison.reference.mean(1))
    recovery = [100.0 * exp(-value) for value in (difference.mean, difference.high, difference.low)]
    lost = comparison.reference_right & ~comparison.approx_right
    gained = comparison.approx_right & ~comparison.reference_right
    flips = bootstrap_ci(100.0 * (lost | gained).double().mean(1))
    figures["kl"]["p999"] = quantile(comparison.kl, 0.999)
    return {
        **figures,
        "same_top1_ci": bootstrap_ci(comparison.same_top1.double().mean(1)).ends,
        "recovery": {"percent": recovery[0], "ci": recovery[1:]},
        "flips": {
            "percent": flips.mean,
            "ci": flips.ends,
            "lost": 100.0 * float(lost.double().mean()),
            "gained": 100.0 * float(gained.double().mean()),
        },
    }


@torch.inference_mode()
def evaluate_suite(
    models: Sequence[Any],
    original: Any,
    tokenizer: Any,
    texts: Sequence[Path | str],
    progress: NamedAdvance | None = None,
) -> list[dict[str, Any]]:
    """Of each model {"chat": figures, "examples": answers, "long_context": figures}.

    chat: prompts, template (whether the model has one), tokens (of all answers), kl (mean, ci over answers, p99, p999),
    same_top1, same_top1_ci, agreement (tokens: mean number before the first difference, ci, of: mean length of the baseline's
    answers, percent: of these tokens, whole: number of answers that are the same to their end); examples: the answers to the
    first prompts {"kind", "prompt", "said", "baseline_said", "same": tokens, "same_letters"}; long_context: as
    ``long_context``, None for a text that is too short.
    """
    prompts = read_prompts(embedded_prompts())
    chats = Chats(tokenizer)
    questions = [torch.tensor(ids, dtype=torch.int64) for ids in chats.prompts([p["prompt"] for p in prompts])]
    report = _advance(progress, "chat")
    longest = min(_limits([original, *models]), default=None)
    rooms = [NEW_TOKENS if longest is None else min(NEW_TOKENS, longest - len(q)) for q in questions]
    answers = greedy_continuations(original, questions, rooms)
    comparisons: list[list[Comparison]] = [[] for _ in models]
    for i, question in enumerate(questions):
        answers[i], of_models = _answer(original, models, question, answers[i])
        for found, comparison in zip(comparisons, of_models, strict=True):
            found.append(comparison)
        report(i + 1, len(questions))
    long = long_context(models, original, tokenizer, texts, progress)
    return [
        {
            "chat": {"prompts": len(prompts), "template": chats.template is not None, **_chat_figures(found)},
            "examples": _examples(model, tokenizer, prompts, questions, answers, found),
            "long_context": None if long is None else long[place],
        }
        for place, (model, found) in enumerate(zip(models, comparisons, strict=True))
    ]


def _advance(progress: NamedAdvance | None, name: str) -> Advance:
    """The progress of one part, which may be nobody's."""

    def silent(done: int, total: int) -> None: ...

    return silent if progress is None else partial(progress, name)


def _limits(models: Sequence[Any]) -> list[int]:
    """The positions of the models that name a limit."""
    return [limit for model in models if (limit := longest_window(model)) is not None]


def read_prompts(file: Path) -> list[dict[str, str]]:
    """The prompts of a file in JSON lines, each with ``kind`` and ``prompt``."""
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def _answer(original: Any, models: Sequence[Any], question: Tensor, answer: Tensor) -> tuple[Tensor, list[Comparison]]:
    """The answer [n] up to where this pass of the original confirms it, and the comparisons of every model on it.

    The answer was written with others, and a tie between two tokens can be decided otherwise there.
    """
    ids, targets = torch.cat([question, answer])[None], answer[None]
    of_answer = slice(len(question) - 1, -1)

    def logits(model: Any) -> Tensor:
        every: Tensor = model(input_ids=ids.to(model.device), use_cache=False).logits
        return every[:, of_answer]

    reference = logits(original)
    found = [compare_logits(reference, logits(model), targets) for model in models]
    confirmed = max(1, int(found[0].reference_right[0].long().cumprod(0).sum()))
    return answer[:confirmed], [c.part(slice(confirmed)) for c in found]


def _chat_figures(comparisons: Sequence[Comparison]) -> dict[str, Any]:
    """An answer is the unit of the intervals."""
    every = joined(comparisons, 1)
    counts = torch.tensor([c.kl.numel() for c in comparisons], dtype=torch.float64)
    kl = ratio_ci(torch.stack([c.kl.sum() for c in comparisons]), counts)
    same = ratio_ci(torch.stack([c.same_top1.sum() for c in comparisons]), counts)
    equal = torch.tensor([_equal_tokens(c) for c in comparisons], dtype=torch.float64)
    agreement = bootstrap_ci(equal)
    return {
        "tokens": every.kl.numel(),
        "kl": {"mean": kl.mean, "ci": kl.ends, "p99": quantile(every.kl, 0.99), "p999": quantile(every.kl, 0.999)},
        "same_top1": same.mean,
        "same_top1_ci": same.ends,
        "agreement": {
            "tokens": agreement.mean,
            "ci": agreement.ends,
            "of": float(counts.mean()),
            "percent": 100.0 * float(equal.sum() / counts.sum()),
            "whole": int((equal == counts).sum()),
        },
    }


def _equal_tokens(comparison: Comparison) -> int:
    """The tokens of an answer before the first that the model would not have chosen."""
    return int(comparison.approx_right[0].long().cumprod(0).sum())


def _examples(
    model: Any, tokenizer: Any, prompts: Sequence[dict[str, str]], questions: Sequence[Tensor], answers: Sequence[Tensor],
    comparisons: Sequence[Comparison],
) -> list[dict[str, Any]]:  # fmt: skip
    """The greedy answers of both models to the first prompts, and where they part. The model's begins with what is the same."""
    equal = [_equal_tokens(c) for c in comparisons[:EXAMPLES]]
    same = [answer[:count] for answer, count in zip(answers, equal, strict=False)]
    parting = [i for i, count in enumerate(equal) if count < len(answers[i])]
    starts = [torch.cat([questions[i], same[i]]) for i in parting]
    rests = greedy_continuations(model, starts, [len(answers[i]) - equal[i] for i in parting])
    said = [*same]
    for i, rest in zip(parting, rests, strict=True):
        said[i] = torch.cat([same[i], rest])
    decode = partial(tokenizer.decode, skip_special_tokens=True)
    return [
        {**prompt, **_parted(decode(ours), decode(theirs), decode(common)), "same": len(common)}
        for prompt, ours, theirs, common in zip(prompts, said, answers, same, strict=False)
    ]


def _parted(said: str, baseline_said: str, common: str) -> dict[str, Any]:
    letters = len(said) if said == baseline_said else len(common)
    while not said.startswith(baseline_said[:letters]):  # a token may hold a part of a letter
        letters -= 1
    return {"said": said, "baseline_said": baseline_said, "same_letters": letters}


def long_context(
    models: Sequence[Any],
    original: Any,
    tokenizer: Any,
    texts: Sequence[Path | str],
    progress: NamedAdvance | None = None,
) -> list[dict[str, Any]] | None:
    """Of each model {"tokens", "buckets": [{"from", "to", "kl", "same_top1"}]}: means over ranges of positions in one window of
    the first text that is long enough, as long as the models allow, LONGEST at most. None where no text is longer than a piece.
    """
    longest = min([LONGEST, *_limits([original, *models])])
    candidates = (first_tokens(tokenizer, spec, longest)[:longest] for spec in texts)
    tokens = max(candidates, key=len)  # the first of the longest
    if len(tokens) <= 2 * BUCKETS:
        return None
    ids = tokens[None]
    caches = [fresh_cache(m, None, len(tokens)) for m in (original, *models)]
    parts: list[list[Comparison]] = [[] for _ in models]
    report = _advance(progress, "long context")
    for start in range(0, len(tokens) - 1, PIECE):
        piece, targets = ids[:, start : start + PIECE], ids[:, start + 1 : start + PIECE + 1]
        reference, *others = (
            model(input_ids=piece.to(model.device), **with_cache(model, cache), use_cache=True).logits
            for model, cache in zip((original, *models), caches, strict=True)
        )
        for found, logits in zip(parts, others, strict=True):
            found.append(compare_logits(reference[:, : targets.shape[1]], logits[:, : targets.shape[1]], targets))
        report(min(start + PIECE, len(tokens)), len(tokens))
    return [{"tokens": len(tokens), "buckets": _buckets(joined(found, 1))} for found in parts]


def _buckets(comparison: Comparison) -> list[dict[str, Any]]:
    count = comparison.kl.shape[1]
    ends = [round(i * count / BUCKETS) for i in range(BUCKETS + 1)]
    return [
        {
            "from": start + 1,
            "to": stop,
            "kl": float(comparison.kl[0, start:stop].mean()),
            "same_top1": float(comparison.same_top1[0, start:stop].double().mean()),
        }
        for start, stop in pairwise(ends)
    ]
