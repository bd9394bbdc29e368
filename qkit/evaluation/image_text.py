"""What quantization cost a vision-language model: answers to questions about pictures.

A row is a question with its right answer, made by the model's processor and chat template, and one forward pass says all of
it. An answer is right when each of its tokens, the end included, is the most likely one after those before it: then, and
only then, greedy decoding says exactly this answer and stops. (Where a template does not end answers with a token that stops
generation, right means that the greedy answer begins with it.) Rows of one shape go through the model together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qkit.calibration.dataset import KINDS
from qkit.calibration.image_text import Pair, encoded, held_out, image_tokens, pair_rows
from qkit.calibration.options import QUESTIONS
from qkit.errors import UsageError
from qkit.evaluation.decoding import fresh_cache
from qkit.evaluation.metrics import BATCH_BYTES, Interval, bootstrap_ci, divergence, exp, quantile, ratio_ci, wilson_ci
from qkit.families.discover import family_of
from qkit.kvcache.argument import with_cache

PIECE = 256  # questions whose pictures are held in memory at once, at most
PIXELS = 16 << 20  # of these pictures, after which no more are taken up
BATCH = 32  # questions per forward pass, at most
MORE = 8  # tokens that a generated answer may be longer than the right one

Progress = Callable[[int, int], None]  # (questions done, questions in all)


@dataclass(frozen=True)
class Answer:
    """What a model makes of one right answer of ``a`` tokens. nll: float64 [a], in nats; greedy: int64 [a], the most likely
    token at each place; right: all of them are those of the answer; begins: how the greedy answer begins, as far as its first
    wrong token."""

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


def evaluate_pairs(
    model: Any, processor: Any, spec: str | Path, count: int = QUESTIONS, baseline: Any = None, examples: int = 0,
    progress: Progress | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Figures of at most ``count`` questions of ``spec`` (as for ``held_out``); intervals are 95 %, over questions.

    Figures: questions, tokens (of answers), nonfinite (of them); accuracy {percent, ci (Wilson)}, kinds {kind: {questions,
    accuracy}} where questions have kinds; perplexity and ci (of answer tokens). With a baseline accuracy further has
    baseline_percent, change and change_ci (points, paired), and there are baseline_perplexity, baseline_ci, change_percent,
    change_ci (paired), kl {mean, ci, p99} (nats a token, KL(baseline || model)), same_top1 (share of answer tokens) and
    errors {kind of token: {mean, ci}}: |h - h0|^2 / |h0|^2 of the hidden states that leave the last block of the language
    model, before the final norm, mean over tokens. With ``examples`` also that many of the questions, as ``_examples``.

    Questions of one picture are not quite independent, so intervals are a little too narrow. Raises UsageError for a
    baseline of another shape, BadInput and BadCheckpoint for what is wrong with pairs and processor.
    """
    asked = ask(model, processor, spec, count, baseline, progress)
    figures = _figures(asked)
    if examples:
        chosen = dict.fromkeys(_telling(asked, examples))
        shown = [(i, pair) for i, pair in enumerate(held_out(spec, count)) if i in chosen]
        figures["examples"] = _examples(model, baseline, processor, shown, _ends(model, processor))
    return figures


def ask(
    model: Any, processor: Any, spec: str | Path, count: int = QUESTIONS, baseline: Any = None,
    progress: Progress | None = None,
) -> list[ScoredQuestion]:  # fmt: skip
    """Every question by itself; arguments, and what is raised, as for ``evaluate_pairs``."""
    if baseline is not None and _shape(model) != _shape(baseline):
        raise UsageError(
            f"the two models cannot be compared token by token: the baseline is {_shape(baseline)}, the other one "
            f"{_shape(model)}; use the model that it was made from"
        )
    total = sum(1 for _ in held_out(spec, count))  # what is wrong with a picture is better said before the first answer
    ends = _ends(model, processor)
    asked = list[ScoredQuestion]()
    for piece in _pieces(held_out(spec, count)):
        asked += _ask(model, baseline, processor, piece, ends)
        if progress is not None:
            progress(len(asked), total)
    return asked


def _pieces(pairs: Iterator[Pair]) -> Iterator[list[Pair]]:
    piece, pixels = list[Pair](), 0
    for pair in pairs:
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
    known = model.generation_config.eos_token_id
    found = known if isinstance(known, list) else [known]
    return [int(i) for i in dict.fromkeys([*found, processor.tokenizer.eos_token_id]) if i is not None]


@torch.inference_mode()
def _ask(model: Any, baseline: Any, processor: Any, pairs: list[Pair], ends: list[int]) -> list[ScoredQuestion]:
    rows = pair_rows(pairs, processor, image_tokens(model.config), "pairs")
    assert rows.inputs is not None and rows.kinds is not None
    found: dict[int, ScoredQuestion] = {}
    vocabulary = model.config.get_text_config().vocab_size
    for batch in _batches(rows.inputs, vocabulary):
        given = {k: torch.cat([rows.inputs[i][k] for i in batch]) for k in rows.inputs[batch[0]]}
        kinds = rows.kinds[batch, : given["input_ids"].shape[1]]
        places = [_answer(ids, kind, ends) for ids, kind in zip(given["input_ids"], kinds, strict=True)]
        ours, hidden = likelihoods(model, given, places)
        theirs, wanted = (None, None) if baseline is None else likelihoods(baseline, given, places)
        for n, i in enumerate(batch):
            ids, kind = given["input_ids"][n, places[n]], pairs[i].kind
            mine = _scored(ours[n], ids)
            if theirs is None or wanted is None:
                found[i] = ScoredQuestion(kind, mine)
                continue
            errors = _errors(hidden[n], wanted[n], kinds[n])
            found[i] = ScoredQuestion(kind, mine, _scored(theirs[n], ids), divergence(theirs[n], ours[n]), errors)
    return [found[i] for i in range(len(pairs))]


def _batches(inputs: Sequence[dict[str, Tensor]], vocabulary: int) -> Iterator[list[int]]:
    """Rows that can be one batch: what they are called with has the same shapes."""
    same: dict[Any, list[int]] = {}
    for i, row in enumerate(inputs):
        same.setdefault(tuple((k, v.shape) for k, v in sorted(row.items())), []).append(i)
    for rows in same.values():
        most = max(1, min(BATCH, BATCH_BYTES // (4 * inputs[rows[0]]["input_ids"].shape[1] * vocabulary)))
        for start in range(0, len(rows), most):
            yield rows[start : start + most]


def _answer(ids: Tensor, kinds: Tensor, ends: list[int]) -> slice:
    """Where the answer of a row [n] is: as far as its first end; templates may write more after it."""
    start = int((kinds == KINDS.index("answer")).nonzero()[0])
    stops = torch.isin(ids[start:], torch.tensor(ends)).nonzero()
    return slice(start, start + int(stops[0]) + 1 if len(stops) else len(ids))


def likelihoods(model: Any, given: dict[str, Tensor], places: Sequence[slice]) -> tuple[list[Tensor], Tensor]:
    """For each row log probabilities float32 [a, vocabulary] of the tokens at its place; and the hidden states that leave the
    last block, [rows, tokens, hidden]. Both on the CPU."""
    seen: list[Tensor] = []
    norm = model.get_submodule(family_of(model, model.config.model_type).final_norm)
    handle = norm.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    try:
        first = min(p.start for p in places) - 1  # a token's likelihood stands at the one before it
        keep = given["input_ids"].shape[1] - first
        logits = model(**_placed(given, model), use_cache=False, logits_to_keep=keep).logits
    finally:
        handle.remove()
    found = [
        row[p.start - 1 - first : p.stop - 1 - first].float().log_softmax(-1).cpu()
        for row, p in zip(logits, places, strict=True)
    ]
    return found, seen[0].float().cpu()


def _placed(given: dict[str, Tensor], model: Any) -> dict[str, Tensor]:
    return {k: v.to(model.device, model.dtype if v.is_floating_point() else None) for k, v in given.items()}


def _scored(likely: Tensor, ids: Tensor) -> Answer:
    nll = -likely.gather(1, ids[:, None])[:, 0].double()
    greedy = likely.argmax(1)
    same = greedy == ids
    begins = tuple(greedy[: int(same.long().cumprod(0).sum()) + 1].tolist())
    return Answer(nll, greedy, bool(same.all() & nll.isfinite().all()), begins)


def _errors(hidden: Tensor, wanted: Tensor, kinds: Tensor) -> dict[str, float]:
    """By kind of token, of one row: hidden, wanted [n, hidden]; kinds [n]."""
    each = (hidden - wanted).square().sum(1).double() / wanted.square().sum(1).double()
    return {KINDS[k]: float(each[kinds == k].mean()) for k in kinds.unique().tolist()}


def _figures(asked: list[ScoredQuestion]) -> dict[str, Any]:
    kinds = sorted({a.kind for a in asked} - {""})
    found: dict[str, Any] = {
        "questions": len(asked),
        "tokens": sum(a.ours.nll.numel() for a in asked),
        "nonfinite": sum(int((~a.ours.nll.isfinite()).sum()) for a in asked),
        "accuracy": _accuracy(asked),
        "kinds": {},
    }
    for kind in kinds:
        own = [a for a in asked if a.kind == kind]
        found["kinds"][kind] = {"questions": len(own), "accuracy": _accuracy(own)}
    ours = [a.ours.nll for a in asked]
    value = _per_token(ours).map(exp)
    found |= {"perplexity": value.mean, "ci": value.ends}
    theirs = [a.theirs.nll for a in asked if a.theirs is not None]
    kls = [a.kl for a in asked if a.kl is not None]
    if not theirs:
        return found
    before = _per_token(theirs).map(exp)
    change = _per_token([x - y for x, y in zip(ours, theirs, strict=True)]).map(lambda d: 100 * (exp(d) - 1))
    kl = _per_token(kls)
    same = [(a.ours.greedy == a.theirs.greedy) & ~a.kl.isnan() for a in asked if a.theirs and a.kl is not None]
    return found | {
        "baseline_perplexity": before.mean,
        "baseline_ci": before.ends,
        "change_percent": change.mean,
        "change_ci": change.ends,
        "kl": {"mean": kl.mean, "ci": kl.ends, "p99": quantile(torch.cat(kls), 0.99)},
        "same_top1": float(torch.cat(same).double().mean()),
        "errors": {kind: _error(asked, kind) for kind in KINDS if any(kind in (a.errors or {}) for a in asked)},
    }


def _per_token(values: Sequence[Tensor]) -> Interval:
    """Mean over all tokens of values [a] of each question."""
    return ratio_ci(torch.stack([v.sum() for v in values]), torch.tensor([v.numel() for v in values]))


def _accuracy(asked: Sequence[ScoredQuestion]) -> dict[str, Any]:
    ours = torch.tensor([a.ours.right for a in asked])
    value = wilson_ci(ours).map(lambda share: 100 * share)
    found = {"percent": value.mean, "ci": value.ends}
    theirs = torch.tensor([a.theirs.right for a in asked if a.theirs is not None])
    if not len(theirs):
        return found
    change = bootstrap_ci(100 * (ours.double() - theirs.double()))
    return found | {
        "baseline_percent": 100 * float(theirs.double().mean()), "change": change.mean, "change_ci": change.ends
    }  # fmt: skip


def _error(asked: Sequence[ScoredQuestion], kind: str) -> dict[str, Any]:
    values = [a.errors[kind] for a in asked if a.errors and kind in a.errors]
    value = bootstrap_ci(torch.tensor(values, dtype=torch.float64))
    return {"mean": value.mean, "ci": value.ends}


def _telling(asked: Sequence[ScoredQuestion], count: int) -> list[int]:
    """The questions to show: first those that the two models answer differently for certain, then wrong answers, then right
    ones; evenly out of each."""

    def rank(a: ScoredQuestion) -> int:
        if a.theirs is not None and a.theirs.begins != a.ours.begins:
            return 0
        return 2 if a.ours.right else 1

    found: list[int] = []
    for r in range(3):
        own = [i for i, a in enumerate(asked) if rank(a) == r]
        left = min(count - len(found), len(own))
        found += [own[k * len(own) // left] for k in range(left)]
    return found


@torch.inference_mode()
def _examples(
    model: Any, baseline: Any, processor: Any, shown: Sequence[tuple[int, Pair]], ends: list[int]
) -> list[dict[str, Any]]:
    """{index (of the question), kind, question, answer, said (what the model really generates, greedily, with a plain cache),
    baseline_said (None without a baseline)}; questions that are answered differently first."""
    found = []
    for index, pair in shown:
        said = [None if m is None else _said(m, processor, pair, ends) for m in (model, baseline)]
        found.append(
            {
                "index": index, "kind": pair.kind, "question": pair.question, "answer": pair.answer, "said": said[0],
                "baseline_said": said[1],
            }
        )  # fmt: skip
    other = "answer" if baseline is None else "baseline_said"
    return sorted(found, key=lambda e: (e["said"] == e[other], e["index"]))


def _said(model: Any, processor: Any, pair: Pair, ends: list[int]) -> str:
    given = encoded(pair, processor, False)
    length = given["input_ids"].shape[1]
    room = len(processor.tokenizer(pair.answer)["input_ids"]) + MORE
    made = model.generate(
        **_placed(given, model), **with_cache(model, fresh_cache(model, None, length + room)), max_new_tokens=room,
        do_sample=False, eos_token_id=ends, pad_token_id=ends[0] if ends else None,
    )  # fmt: skip
    text: str = processor.tokenizer.decode(made[0, length:], skip_special_tokens=True)
    return text.strip()
