"""The cost of quantizing a vision-language model, measured by answers to questions about images.

A row is a question with its right answer, made by the model's processor and chat template, and one forward pass says all of
it. An answer is right when each of its tokens, the end included, is the most likely one after those before it: then, and
only then, greedy decoding says exactly this answer and stops. (Where a template does not end answers with a token that
stops generation, right means that the greedy answer begins with it.) Rows of one shape go through the model together.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qkit.calibration.dataset import KINDS
from qkit.calibration.image_text import ImageText, encode, held_out_image_text, image_text_rows, image_tokens
from qkit.calibration.options import QUESTIONS
from qkit.errors import UsageError
from qkit.evaluation.decoding import fresh_cache
from qkit.evaluation.metrics import BATCH_BYTES, Interval, bootstrap_ci, divergence, exp, quantile, ratio_ci, wilson_ci
from qkit.families.discover import family_of
from qkit.kvcache.argument import with_cache
from qkit.system.progress import Advance

PIECE = 256  # questions whose images are held in memory at once, at most
PIXELS = 16 << 20  # of these images, after which a new piece begins
BATCH = 32  # questions per forward pass, at most
MORE = 8  # tokens that a generated answer may be longer than the right one


@dataclass(frozen=True)
class Answer:
    """A model's likelihoods of one right answer of ``a`` tokens. nll: float64 [a], in nats; greedy: int64 [a], the most likely
    token at each place; right: all of them are those of the answer; begins: how the greedy answer begins, as far as its
    first wrong token."""

    nll: Tensor
    greedy: Tensor
    right: bool
    begins: tuple[int, ...]


@dataclass(frozen=True)
class ScoredQuestion:
    """One question. ours, theirs (of the original, where there is one); kl: float64 [a], KL(original || model) at the answer's
    tokens, in nats; errors: by kind of token the relative squared error of hidden states, mean over the question's tokens."""

    kind: str
    ours: Answer
    theirs: Answer | None = None
    kl: Tensor | None = None
    errors: dict[str, float] | None = None


def evaluate_image_text(
    model: Any, processor: Any, spec: str | Path, count: int = QUESTIONS, baseline: Any = None, examples: int = 0,
    progress: Advance | None = None,
) -> dict[str, Any]:  # fmt: skip
    """The figures of at most ``count`` questions of ``spec`` (as for ``held_out_image_text``), with 95 % intervals.

    Figures: questions, tokens (of answers), nonfinite (of them); accuracy {percent, ci (Wilson)}, kinds {kind: {questions,
    accuracy}} where questions have kinds; perplexity and ci (of answer tokens). With a baseline accuracy further has
    baseline_percent, change and change_ci (points, paired), and there are baseline_perplexity, baseline_ci, change_percent,
    change_ci (paired), kl {mean, ci, p99} (nats a token, KL(baseline || model)), same_top1 (share of answer tokens) and
    errors {kind of token: {mean, ci}}: |h - h0|^2 / |h0|^2 of the hidden states that leave the last block of the language
    model, before the final norm, mean over tokens. With ``examples`` also that many of the questions, as ``_examples``.

    Questions of one image are not quite independent, so intervals are a little too narrow. Raises UsageError for a
    baseline of another shape, BadInput and BadCheckpoint for what is wrong with pairs and processor.
    """
    questions = score_questions(model, processor, spec, count, baseline, progress)
    figures = _figures(questions)
    if examples:
        chosen = dict.fromkeys(_choose_examples(questions, examples))
        shown_examples = [(i, pair) for i, pair in enumerate(held_out_image_text(spec, count)) if i in chosen]
        figures["examples"] = _examples(model, baseline, processor, shown_examples, _ends(model, processor))
    return figures


def score_questions(
    model: Any, processor: Any, spec: str | Path, count: int = QUESTIONS, baseline: Any = None,
    progress: Advance | None = None,
) -> list[ScoredQuestion]:  # fmt: skip
    """The score of every question; arguments, and what is raised, as for ``evaluate_image_text``."""
    if baseline is not None and _shape(model) != _shape(baseline):
        raise UsageError(
            f"the two models cannot be compared token by token: the baseline is {_shape(baseline)}, the other one "
            f"{_shape(model)}; use the model that it was made from"
        )
    # what is wrong with an image is better said before the first answer
    total = sum(1 for _ in held_out_image_text(spec, count))
    ends = _ends(model, processor)
    questions = list[ScoredQuestion]()
    for piece in _pieces(held_out_image_text(spec, count)):
        questions += _score(model, baseline, processor, piece, ends)
        if progress is not None:
            progress(len(questions), total)
    return questions


def _pieces(image_text: Iterator[ImageText]) -> Iterator[list[ImageText]]:
    piece, pixels = list[ImageText](), 0
    for pair in image_text:
        piece.append(pair)
        pixels += sum(image.width * image.height for image in pair.images)
        if len(piece) == PIECE or pixels >= PIXELS:
            yield piece
            piece, pixels = [], 0
    if piece:
        yield piece


def _shape(model: Any) -> str:
    text = model.config.get_text_config()
    return f"a {model.config.model_type} with a vocabulary of {text.vocab_size} and {text.hidden_size} hidden values"


def _ends(model: Any, processor: Any) -> list[int]:
    """Tokens that stop generation."""
    eos = model.generation_config.eos_token_id
    eos_tokens = eos if isinstance(eos, list) else [eos]
    return [int(i) for i in dict.fromkeys([*eos_tokens, processor.tokenizer.eos_token_id]) if i is not None]


@torch.inference_mode()
def _score(
    model: Any, baseline: Any, processor: Any, questions_asked: list[ImageText], ends: list[int]
) -> list[ScoredQuestion]:
    rows = image_text_rows(questions_asked, processor, image_tokens(model.config), "pairs")
    assert rows.inputs is not None and rows.kinds is not None
    questions: dict[int, ScoredQuestion] = {}
    vocabulary = model.config.get_text_config().vocab_size
    for batch in _batches(rows.inputs, vocabulary):
        batch_inputs = {k: torch.cat([rows.inputs[i][k] for i in batch]) for k in rows.inputs[batch[0]]}
        kinds = rows.kinds[batch, : batch_inputs["input_ids"].shape[1]]
        places = [_answer(ids, kind, ends) for ids, kind in zip(batch_inputs["input_ids"], kinds, strict=True)]
        log_probs, hidden = likelihoods(model, batch_inputs, places)
        baseline_log_probs, baseline_hidden = (
            (None, None) if baseline is None else likelihoods(baseline, batch_inputs, places)
        )
        for n, i in enumerate(batch):
            ids, kind = batch_inputs["input_ids"][n, places[n]], questions_asked[i].kind
            answer = _answer_of(log_probs[n], ids)
            if baseline_log_probs is None or baseline_hidden is None:
                questions[i] = ScoredQuestion(kind, answer)
                continue
            errors = _errors(hidden[n], baseline_hidden[n], kinds[n])
            questions[i] = ScoredQuestion(
                kind,
                answer,
                _answer_of(baseline_log_probs[n], ids),
                divergence(baseline_log_probs[n], log_probs[n]),
                errors,
            )
    return [questions[i] for i in range(len(questions_asked))]


def _batches(inputs: Sequence[dict[str, Tensor]], vocabulary: int) -> Iterator[list[int]]:
    """Rows that can be one batch: what they are called with has the same shapes."""
    by_shape: dict[Any, list[int]] = {}
    for i, row in enumerate(inputs):
        by_shape.setdefault(tuple((k, v.shape) for k, v in sorted(row.items())), []).append(i)
    for rows in by_shape.values():
        batch_size = max(1, min(BATCH, BATCH_BYTES // (4 * inputs[rows[0]]["input_ids"].shape[1] * vocabulary)))
        for start in range(0, len(rows), batch_size):
            yield rows[start : start + batch_size]


def _answer(ids: Tensor, kinds: Tensor, ends: list[int]) -> slice:
    """Where the answer of a row [n] is: as far as its first end; templates may write more after it."""
    start = int((kinds == KINDS.index("answer")).nonzero()[0])
    stops = torch.isin(ids[start:], torch.tensor(ends)).nonzero()
    return slice(start, start + int(stops[0]) + 1 if len(stops) else len(ids))


def likelihoods(model: Any, batch_inputs: dict[str, Tensor], places: Sequence[slice]) -> tuple[list[Tensor], Tensor]:
    """The log probabilities of each row's tokens at its place, float32 [a, vocabulary], and the hidden states that leave the
    last block, [rows, tokens, hidden]. Both on the CPU."""
    hidden: list[Tensor] = []
    norm = model.get_submodule(family_of(model, model.config.model_type).final_norm)
    handle = norm.register_forward_pre_hook(lambda module, args: hidden.append(args[0]))
    try:
        first = min(p.start for p in places) - 1  # a token's likelihood stands at the one before it
        keep = batch_inputs["input_ids"].shape[1] - first
        logits = model(**_to_model(batch_inputs, model), use_cache=False, logits_to_keep=keep).logits
    finally:
        handle.remove()
    log_probs = [
        row[p.start - 1 - first : p.stop - 1 - first].float().log_softmax(-1).cpu()
        for row, p in zip(logits, places, strict=True)
    ]
    return log_probs, hidden[0].float().cpu()


def _to_model(batch_inputs: dict[str, Tensor], model: Any) -> dict[str, Tensor]:
    return {k: v.to(model.device, model.dtype if v.is_floating_point() else None) for k, v in batch_inputs.items()}


def _answer_of(log_probs: Tensor, ids: Tensor) -> Answer:
    nll = -log_probs.gather(1, ids[:, None])[:, 0].double()
    greedy = log_probs.argmax(1)
    correct = greedy == ids
    begins = tuple(greedy[: int(correct.long().cumprod(0).sum()) + 1].tolist())
    return Answer(nll, greedy, bool(correct.all() & nll.isfinite().all()), begins)


def _errors(hidden: Tensor, reference: Tensor, kinds: Tensor) -> dict[str, float]:
    """By kind of token, of one row: hidden, wanted [n, hidden]; kinds [n]."""
    token_errors = (hidden - reference).square().sum(1).double() / reference.square().sum(1).double()
    return {KINDS[k]: float(token_errors[kinds == k].mean()) for k in kinds.unique().tolist()}


def _figures(questions: list[ScoredQuestion]) -> dict[str, Any]:
    kinds = sorted({a.kind for a in questions} - {""})
    figures: dict[str, Any] = {
        "questions": len(questions),
        "tokens": sum(a.ours.nll.numel() for a in questions),
        "nonfinite": sum(int((~a.ours.nll.isfinite()).sum()) for a in questions),
        "accuracy": _accuracy(questions),
        "kinds": {},
    }
    for kind in kinds:
        of_kind = [a for a in questions if a.kind == kind]
        figures["kinds"][kind] = {"questions": len(of_kind), "accuracy": _accuracy(of_kind)}
    nlls = [a.ours.nll for a in questions]
    value = _per_token(nlls).map(exp)
    figures |= {"perplexity": value.mean, "ci": value.ends}
    baseline_nlls = [a.theirs.nll for a in questions if a.theirs is not None]
    kls = [a.kl for a in questions if a.kl is not None]
    if not baseline_nlls:
        return figures
    baseline_value = _per_token(baseline_nlls).map(exp)
    change = _per_token([x - y for x, y in zip(nlls, baseline_nlls, strict=True)]).map(lambda d: 100 * (exp(d) - 1))
    kl = _per_token(kls)
    same_greedy = [
        (a.ours.greedy == a.theirs.greedy) & ~a.kl.isnan() for a in questions if a.theirs and a.kl is not None
    ]
    return figures | {
        "baseline_perplexity": baseline_value.mean,
        "baseline_ci": baseline_value.ends,
        "change_percent": change.mean,
        "change_ci": change.ends,
        "kl": {"mean": kl.mean, "ci": kl.ends, "p99": quantile(torch.cat(kls), 0.99)},
        "same_top1": float(torch.cat(same_greedy).double().mean()),
        "errors": {kind: _error(questions, kind) for kind in KINDS if any(kind in (a.errors or {}) for a in questions)},
    }


def _per_token(values: Sequence[Tensor]) -> Interval:
    """Mean over all tokens of values [a] of each question."""
    return ratio_ci(torch.stack([v.sum() for v in values]), torch.tensor([v.numel() for v in values]))


def _accuracy(questions: Sequence[ScoredQuestion]) -> dict[str, Any]:
    correct = torch.tensor([a.ours.right for a in questions])
    value = wilson_ci(correct).map(lambda share: 100 * share)
    figures = {"percent": value.mean, "ci": value.ends}
    baseline_correct = torch.tensor([a.theirs.right for a in questions if a.theirs is not None])
    if not len(baseline_correct):
        return figures
    change = bootstrap_ci(100 * (correct.double() - baseline_correct.double()))
    return figures | {
        "baseline_percent": 100 * float(baseline_correct.double().mean()), "change": change.mean, "change_ci": change.ends
    }  # fmt: skip


def _error(questions: Sequence[ScoredQuestion], kind: str) -> dict[str, Any]:
    values = [a.errors[kind] for a in questions if a.errors and kind in a.errors]
    value = bootstrap_ci(torch.tensor(values, dtype=torch.float64))
    return {"mean": value.mean, "ci": value.ends}


def _choose_examples(questions: Sequence[ScoredQuestion], count: int) -> list[int]:
    """The questions to show: first those that the two models answer differently for certain, then wrong answers, then right
    ones; evenly out of each."""

    def rank(a: ScoredQuestion) -> int:
        if a.theirs is not None and a.theirs.begins != a.ours.begins:
            return 0
        return 2 if a.ours.right else 1

    indices: list[int] = []
    for r in range(3):
        candidates = [i for i, a in enumerate(questions) if rank(a) == r]
        count_of_rank = min(count - len(indices), len(candidates))
        indices += [candidates[k * len(candidates) // count_of_rank] for k in range(count_of_rank)]
    return indices


@torch.inference_mode()
def _examples(
    model: Any, baseline: Any, processor: Any, shown_examples: Sequence[tuple[int, ImageText]], ends: list[int]
) -> list[dict[str, Any]]:
    """{index (of the question), kind, question, answer, said (what the model really generates, greedily, with a plain cache),
    baseline_said (None without a baseline)}; questions that are answered differently first."""
    examples = []
    for index, pair in shown_examples:
        answers = [None if m is None else _generate(m, processor, pair, ends) for m in (model, baseline)]
        examples.append(
            {
                "index": index, "kind": pair.kind, "question": pair.question, "answer": pair.answer, "said": answers[0],
                "baseline_said": answers[1],
            }
        )  # fmt: skip
    compared_key = "answer" if baseline is None else "baseline_said"
    return sorted(examples, key=lambda e: (e["said"] == e[compared_key], e["index"]))


def _generate(model: Any, processor: Any, pair: ImageText, ends: list[int]) -> str:
    inputs = encode(pair, processor, False)
    length = inputs["input_ids"].shape[1]
    room = len(processor.tokenizer(pair.answer)["input_ids"]) + MORE
    generated = model.generate(
        **_to_model(inputs, model), **with_cache(model, fresh_cache(model, None, length + room)), max_new_tokens=room,
        do_sample=False, eos_token_id=ends, pad_token_id=ends[0] if ends else None,
    )  # fmt: skip
    text: str = processor.tokenizer.decode(generated[0, length:], skip_special_tokens=True)
    return text.strip()
