"""Retrieval through a quantized KV cache: facts are hidden in a long context and asked for after it.

Two tasks, made from a text and its own words (the ideas: needle in a haystack, Kamradt 2023; key-value retrieval, Liu et
al., arXiv 2307.03172; what exactly is written here is our choice):

  needle   a window of the text with one sentence put into it: 'The secret word of the KEY is ANSWER.'
  recall   a list of lines 'KEY: ANSWER' that fills the context, of which some are asked for

Every context has a twin, alike in all tokens but those of the answers. The context goes through the cache under test in
pieces, then the question and each of several answers follow: how likely the true answer is after its own context, and
after the twin's, says what the cache holds of it, even of a model too small to answer right.
"""

from __future__ import annotations

import copy
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qkit.errors import BadInput
from qkit.evaluation.decoding import fresh_cache, sizes
from qkit.evaluation.metrics import bootstrap_ci, check_window, split_windows
from qkit.kvcache.argument import with_cache
from qkit.kvcache.policy import CachePolicy

DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)  # of what is asked for: 0 is the beginning of the context, 1 its end
CHOICES = 8  # answers that are compared, the true one among them
CHUNK = 128  # tokens of a context that go through the cache at a time
SHORTEST = 256  # most caches keep the newest 127 tokens at 16 bits: a shorter context would say little of them
FORMS = {"needle": ("\nThe secret word of the {} is", ".\n"), "recall": ("\n{}:", "")}
WORD = re.compile(r"\b[^\W\d_]{4,9}\b")


@dataclass(frozen=True)
class Facts:
    """Words that can be asked for and answered, all of as many tokens. words: [n]; questions: int64 [n, q], with the word as
    the key; answers: int64 [n, a], what follows any question; end: int64 [e], what follows an answer."""

    words: tuple[str, ...]
    questions: Tensor
    answers: Tensor
    end: Tensor

    @property
    def asking(self) -> int:
        """The tokens of a question with its answer."""
        return self.questions.shape[1] + self.answers.shape[1]

    def statement(self, key: int, value: int) -> Tensor:
        """The tokens of a statement, int64 [q + a + e]."""
        return torch.cat([self.questions[key], self.answers[value], self.end])


@dataclass(frozen=True)
class Question:
    """A question about a context, with several answers.

    tokens: int64 [q]; answers: int64 [CHOICES, a], the first one true of the first context, the second of its twin.
    """

    depth: float
    tokens: Tensor
    answers: Tensor


@dataclass(frozen=True)
class Trial:
    """One pair of contexts with its questions. contexts: int64 [2, n], the twins; length: their tokens, with those of a
    question and its answer."""

    task: str
    length: int
    contexts: Tensor
    questions: tuple[Question, ...]


def find_facts(tokenizer: Any, text: str, task: str) -> Facts:
    """The words of a text, in small letters, for the task 'needle' or 'recall': those of the most common number of tokens.
    Raises BadInput for a text without enough of them."""
    form, end = FORMS[task]
    words = sorted({w for w in WORD.findall(text) if w == w.lower()})
    if len(words) < 2 * CHOICES:
        raise _too_few(len(words), 2 * CHOICES)
    stem = form.format(words[0])
    before = _ids(tokenizer, [stem])[0]
    question_ids = _ids(tokenizer, [form.format(w) for w in words])
    statement_ids = _ids(tokenizer, [f"{stem} {w}" for w in words])
    rows = [
        (w, q, t[len(before) :])
        for w, q, t in zip(words, question_ids, statement_ids, strict=True)
        if t[: len(before)] == before  # an answer that runs into the question could not be asked for
    ]
    shape = Counter((len(q), len(a)) for _, q, a in rows).most_common(1)[0][0]
    usable = [row for row in rows if (len(row[1]), len(row[2])) == shape]
    full_statement = _ids(tokenizer, [f"{stem} {usable[0][0]}{end}"])[0]
    return Facts(
        tuple(w for w, _, _ in usable),
        torch.tensor([q for _, q, _ in usable]),
        torch.tensor([a for _, _, a in usable]),
        torch.tensor(full_statement[len(before) + shape[1] :], dtype=torch.int64),
    )


def _ids(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    ids: list[list[int]] = tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]
    return ids


def _too_few(count: int, needed: int) -> BadInput:
    return BadInput(
        f"the text has {count} words that can be asked for (4 to 9 lowercase letters, of as many tokens), and "
        f"retrieval needs {needed}; use more text, or a smaller --window"
    )


def needle_trial(fact_words: Facts, window: Tensor, text: str, depth: float, chance: torch.Generator) -> Trial:
    """The trial with one statement in the window [length], whose text is given. The statement begins at token ``depth`` of the
    way to the last place that it can have. Question and answer make up the rest of the length."""
    words_in_window = set(WORD.findall(text))
    picks = [i for i in _shuffled(fact_words, chance) if fact_words.words[i] not in words_in_window][: CHOICES + 1]
    room = len(window) - fact_words.asking - fact_words.asking - len(fact_words.end)
    if len(picks) <= CHOICES or room < 0:
        raise _too_few(len(picks), CHOICES + 1) if room >= 0 else _too_short(len(window), len(window) - room)
    key, *values = picks
    at = round(depth * room)
    twins = [torch.cat([window[:at], fact_words.statement(key, v), window[at:room]]) for v in values[:2]]
    question = Question(depth, fact_words.questions[key], fact_words.answers[values])
    return Trial("needle", len(window), torch.stack(twins), (question,))


def recall_trial(fact_words: Facts, window: Tensor, depths: Sequence[float], chance: torch.Generator) -> Trial:
    """The trial of statements one after another, of different keys, with questions for those at the depths; wrong answers are
    those of other lines. What does not make up a whole line is text of the window [length], before the first one."""
    line = fact_words.asking + len(fact_words.end)
    room = len(window) - fact_words.asking
    lines = room // line
    if lines < len(depths) + CHOICES:
        raise _too_short(len(window), fact_words.asking + (len(depths) + CHOICES) * line)
    picks = _shuffled(fact_words, chance)
    single_use = 2 * len(depths) + CHOICES - 2  # answers of one line each
    if len(picks) < lines + single_use:
        raise _too_few(len(picks), lines + single_use)
    keys, values_left = picks[:lines], picks[lines:]
    true = values_left[: 2 * len(depths)]
    wrong_values = values_left[2 * len(depths) : single_use]
    filler_values = values_left[2 * len(depths) :]
    places = [round(d * (lines - 1)) for d in depths]
    # Lines that nobody asks for share what values are left, those of the wrong answers come first.
    free = [i for i in range(lines) if i not in places]
    order = [free[i] for i in torch.randperm(len(free), generator=chance).tolist()]
    value_of_line = {i: filler_values[n % len(filler_values)] for n, i in enumerate(order)}
    twins = []
    for side in (0, 1):
        values = value_of_line | {place: true[2 * n + side] for n, place in enumerate(places)}
        twins.append(
            torch.cat(
                [window[: room - lines * line], *(fact_words.statement(keys[i], values[i]) for i in range(lines))]
            )
        )
    questions = (
        Question(d, fact_words.questions[keys[place]], fact_words.answers[[*true[2 * n : 2 * n + 2], *wrong_values]])
        for n, (d, place) in enumerate(zip(depths, places, strict=True))
    )
    return Trial("recall", len(window), torch.stack(twins), tuple(questions))


def _shuffled(fact_words: Facts, chance: torch.Generator) -> list[int]:
    order: list[int] = torch.randperm(len(fact_words.words), generator=chance).tolist()
    return order


def _too_short(length: int, needed: int) -> BadInput:
    return BadInput(
        f"a context of {length} tokens is too short for retrieval, which needs {needed}: use a larger --window"
    )


@torch.inference_mode()
def score_trial(
    model: Any, trial: Trial, policy: CachePolicy | None
) -> tuple[list[tuple[Tensor, Tensor]], tuple[float, float]]:
    """For each question (log-likelihoods float64 [2, CHOICES], in nats of whole answers after each of the twins; whether each
    is the greedy continuation, bool [2, CHOICES]), and bytes as ``sizes`` gives them when the contexts are in the cache.

    A policy of None is a plain cache; a progressive one without budgets gets those of contexts of this length.
    """
    twins = len(trial.contexts)
    cache = fresh_cache(model, policy, trial.length)
    fill(model, trial.contexts, cache)
    scores = []
    for q in trial.questions:
        count, tokens = q.answers.shape
        rows = torch.cat([q.tokens.expand(count, -1), q.answers], dim=1).repeat(twins, 1).to(model.device)
        logits = model(
            input_ids=rows, **with_cache(model, _branched(cache, count)), use_cache=True, logits_to_keep=tokens + 1
        ).logits[:, :-1]
        targets = rows[:, -tokens:]
        log_likelihoods = (
            logits.to(torch.float32).log_softmax(-1).gather(2, targets[..., None]).to(torch.float64).sum((1, 2))
        )
        greedy = (logits.argmax(-1) == targets).all(1)
        scores.append((log_likelihoods.view(twins, count).cpu(), greedy.view(twins, count).cpu()))
    return scores, sizes(model, cache, twins)


def fill(model: Any, contexts: Tensor, cache: Any) -> None:
    """Puts contexts [sequences, n] into a cache, CHUNK tokens at a time: what follows reads what was packed."""
    for piece in contexts.to(model.device).split(CHUNK, dim=1):
        model(input_ids=piece, **with_cache(model, cache), use_cache=True, logits_to_keep=1)


def _branched(cache: Any, count: int) -> Any:
    """A copy with every sequence ``count`` times; layers replace their tensors, so the cache stays what it is."""
    branch = copy.copy(cache)
    branch.layers = [copy.copy(layer) for layer in cache.layers]
    branch.batch_repeat_interleave(count)
    return branch


def trials(tokenizer: Any, text: str, windows: Tensor, lengths: Sequence[int], seed: int = 0) -> Iterator[Trial]:
    """The trials of the windows [count, longest length] of a text; the same seed gives the same ones."""
    facts_by_task = {task: find_facts(tokenizer, text, task) for task in FORMS}
    for length in lengths:
        chance = torch.Generator().manual_seed(seed)
        for window in windows[:, :length]:
            window_text = tokenizer.decode(window)
            for depth in DEPTHS:
                yield needle_trial(facts_by_task["needle"], window, window_text, depth, chance)
            yield recall_trial(facts_by_task["recall"], window, DEPTHS, chance)


def lengths_of(window: int) -> list[int]:
    """The lengths of contexts, question and answer included: a quarter and a half of the window, where that is not too
    short, and all."""
    return [n for n in (window // 4, window // 2) if n >= SHORTEST] + [window]


def evaluate_retrieval(
    model: Any, tokenizer: Any, text: str, tokens: Tensor, window: int, limit: int | None, policies: Mapping[str, CachePolicy],
    seed: int = 0, progress: Callable[[str, int, int], None] | None = None,
) -> dict[str, list[dict[str, Any]]]:  # fmt: skip
    """The rows of figures of a text (and its tokens, int64 [n]) for each policy, {name: rows}; the plain cache comes first,
    under 'none'.

    A row: task, length and depth (of what is asked for); nll (nats a token of the true answer), gain and gain_ci (nats a
    token that it is less likely after the twin, whose answer is another; 95 %, over windows), exact (share of true answers
    that are the greedy continuation), best (share that are the likeliest of ``choices``; 1 / choices is chance), asked (how
    often), bytes and share (of the cache with one context, and of 16 bits). Raises BadInput for a text or a length without
    room for what is asked for, UsageError for a window that the model cannot take, what ``make_cache`` raises.
    """
    check_window(model, window)
    windows = split_windows(tokens, window, limit)
    lengths = lengths_of(window)
    total = len(windows) * len(lengths) * (len(DEPTHS) + 1)
    rows_by_policy = {}
    for name, policy in [("none", None), *policies.items()]:
        answers: dict[tuple[str, int, float], list[tuple[Tensor, Tensor]]] = {}
        cache_sizes: dict[tuple[str, int], tuple[float, float]] = {}
        for done, trial in enumerate(trials(tokenizer, text, windows, lengths, seed)):
            scores, cache_sizes[trial.task, trial.length] = score_trial(model, trial, policy)
            for question, (likely, greedy) in zip(trial.questions, scores, strict=True):
                key = (trial.task, trial.length, question.depth)
                answers.setdefault(key, []).append((likely / question.answers.shape[1], greedy))
            if progress is not None:
                progress(name, done + 1, total)
        rows_by_policy[name] = [_row(key, rows, cache_sizes[key[:2]]) for key, rows in sorted(answers.items())]
    return rows_by_policy


def _row(
    key: tuple[str, int, float], answers: Sequence[tuple[Tensor, Tensor]], cache_size: tuple[float, float]
) -> dict[str, Any]:
    """Of likelihoods in nats a token."""
    task, length, depth = key
    log_likelihoods, greedy = (torch.stack(parts) for parts in zip(*answers, strict=True))  # [windows, 2, CHOICES]
    sides, twins = [0, 1], [1, 0]  # of each of the two answers: the context that it is true of, and the other
    true, twin = (log_likelihoods[:, side, sides] for side in (sides, twins))
    gain = bootstrap_ci((true - twin).mean(1))
    return {
        "task": task,
        "length": length,
        "depth": depth,
        "nll": -float(true.mean()),
        "gain": gain.mean,
        "gain_ci": gain.ends,
        "exact": float(greedy[:, sides, sides].double().mean()),
        "best": float((log_likelihoods.argmax(2) == torch.tensor(sides)).double().mean()),
        "choices": log_likelihoods.shape[2],
        "asked": true.numel(),
        "bytes": cache_size[0],
        "share": cache_size[0] / cache_size[1],
    }
