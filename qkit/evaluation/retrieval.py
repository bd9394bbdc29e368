"""What a quantized KV cache still knows of a long context: facts hidden in text, and asked for after it.

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
        """Tokens of a question with its answer."""
        return self.questions.shape[1] + self.answers.shape[1]

    def statement(self, key: int, value: int) -> Tensor:
        """int64 [q + a + e]"""
        return torch.cat([self.questions[key], self.answers[value], self.end])


@dataclass(frozen=True)
class Question:
    """tokens: int64 [q]; answers: int64 [CHOICES, a], the first one true of the first context, the second of its twin."""

    depth: float
    tokens: Tensor
    answers: Tensor


@dataclass(frozen=True)
class Trial:
    """Of a task; contexts: int64 [2, n], the twins; length: their tokens, with those of a question and its answer."""

    task: str
    length: int
    contexts: Tensor
    questions: tuple[Question, ...]


def facts(tokenizer: Any, text: str, task: str) -> Facts:
    """The words of a text, in small letters, for the task 'needle' or 'recall': those of the most common number of tokens.
    Raises BadInput for a text without enough of them."""
    form, end = FORMS[task]
    words = sorted({w for w in WORD.findall(text) if w == w.lower()})
    if len(words) < 2 * CHOICES:
        raise _too_few(len(words), 2 * CHOICES)
    stem = form.format(words[0])
    before = _ids(tokenizer, [stem])[0]
    asked = _ids(tokenizer, [form.format(w) for w in words])
    told = _ids(tokenizer, [f"{stem} {w}" for w in words])
    rows = [
        (w, q, t[len(before) :])
        for w, q, t in zip(words, asked, told, strict=True)
        if t[: len(before)] == before  # an answer that runs into the question could not be asked for
    ]
    shape = Counter((len(q), len(a)) for _, q, a in rows).most_common(1)[0][0]
    kept = [row for row in rows if (len(row[1]), len(row[2])) == shape]
    whole = _ids(tokenizer, [f"{stem} {kept[0][0]}{end}"])[0]
    return Facts(
        tuple(w for w, _, _ in kept),
        torch.tensor([q for _, q, _ in kept]),
        torch.tensor([a for _, _, a in kept]),
        torch.tensor(whole[len(before) + shape[1] :], dtype=torch.int64),
    )


def _ids(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    found: list[list[int]] = tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]
    return found


def _too_few(found: int, needed: int) -> BadInput:
    return BadInput(
        f"the text has {found} words that can be asked for (4 to 9 lowercase letters, of as many tokens), and retrieval needs "
        f"{needed}; use more text, or a smaller --window"
    )


def needle(known: Facts, window: Tensor, text: str, depth: float, chance: torch.Generator) -> Trial:
    """One statement in the window [length], whose text is given: it begins at token ``depth`` of the way to the last place
    that it can have. Question and answer make up the rest of the length."""
    there = set(WORD.findall(text))
    picks = [i for i in _shuffled(known, chance) if known.words[i] not in there][: CHOICES + 1]
    room = len(window) - known.asking - known.asking - len(known.end)
    if len(picks) <= CHOICES or room < 0:
        raise _too_few(len(picks), CHOICES + 1) if room >= 0 else _too_short(len(window), len(window) - room)
    key, *values = picks
    at = round(depth * room)
    twins = [torch.cat([window[:at], known.statement(key, v), window[at:room]]) for v in values[:2]]
    asked = Question(depth, known.questions[key], known.answers[values])
    return Trial("needle", len(window), torch.stack(twins), (asked,))


def recall(known: Facts, window: Tensor, depths: Sequence[float], chance: torch.Generator) -> Trial:
    """Statements one after another, of different keys, and questions for those at the depths; wrong answers are those of
    other lines. What does not make up a whole line is text of the window [length], before the first one."""
    line = known.asking + len(known.end)
    room = len(window) - known.asking
    lines = room // line
    if lines < len(depths) + CHOICES:
        raise _too_short(len(window), known.asking + (len(depths) + CHOICES) * line)
    picks = _shuffled(known, chance)
    once = 2 * len(depths) + CHOICES - 2  # answers of one line each
    if len(picks) < lines + once:
        raise _too_few(len(picks), lines + once)
    keys, rest = picks[:lines], picks[lines:]
    true, others, more = rest[: 2 * len(depths)], rest[2 * len(depths) : once], rest[2 * len(depths) :]
    places = [round(d * (lines - 1)) for d in depths]
    # Lines that nobody asks for share what values are left, those of the wrong answers come first.
    free = [i for i in range(lines) if i not in places]
    order = [free[i] for i in torch.randperm(len(free), generator=chance).tolist()]
    told = {i: more[n % len(more)] for n, i in enumerate(order)}
    twins = []
    for side in (0, 1):
        values = told | {place: true[2 * n + side] for n, place in enumerate(places)}
        twins.append(
            torch.cat([window[: room - lines * line], *(known.statement(keys[i], values[i]) for i in range(lines))])
        )
    asked = (
        Question(d, known.questions[keys[place]], known.answers[[*true[2 * n : 2 * n + 2], *others]])
        for n, (d, place) in enumerate(zip(depths, places, strict=True))
    )
    return Trial("recall", len(window), torch.stack(twins), tuple(asked))


def _shuffled(known: Facts, chance: torch.Generator) -> list[int]:
    found: list[int] = torch.randperm(len(known.words), generator=chance).tolist()
    return found


def _too_short(found: int, needed: int) -> BadInput:
    return BadInput(
        f"a context of {found} tokens is too short for retrieval, which needs {needed}: use a larger --window"
    )


@torch.inference_mode()
def ask(
    model: Any, trial: Trial, policy: CachePolicy | None
) -> tuple[list[tuple[Tensor, Tensor]], tuple[float, float]]:
    """For each question (log-likelihoods float64 [2, CHOICES], in nats of whole answers after each of the twins; whether each
    is the greedy continuation, bool [2, CHOICES]), and bytes as ``sizes`` gives them when the contexts are in the cache.

    A policy of None is a plain cache; a progressive one without budgets gets those of contexts of this length.
    """
    twins = len(trial.contexts)
    cache = fresh_cache(model, policy, trial.length)
    fill(model, trial.contexts, cache)
    found = []
    for q in trial.questions:
        count, tokens = q.answers.shape
        rows = torch.cat([q.tokens.expand(count, -1), q.answers], dim=1).repeat(twins, 1).to(model.device)
        logits = model(
            input_ids=rows, **with_cache(model, _branched(cache, count)), use_cache=True, logits_to_keep=tokens + 1
        ).logits[:, :-1]
        wanted = rows[:, -tokens:]
        likely = logits.to(torch.float32).log_softmax(-1).gather(2, wanted[..., None]).to(torch.float64).sum((1, 2))
        greedy = (logits.argmax(-1) == wanted).all(1)
        found.append((likely.view(twins, count).cpu(), greedy.view(twins, count).cpu()))
    return found, sizes(model, cache, twins)


def fill(model: Any, contexts: Tensor, cache: Any) -> None:
    """Put contexts [sequences, n] into a cache, CHUNK tokens at a time: what follows reads what was packed."""
    for piece in contexts.to(model.device).split(CHUNK, dim=1):
        model(input_ids=piece, **with_cache(model, cache), use_cache=True, logits_to_keep=1)


def _branched(cache: Any, count: int) -> Any:
    """A copy with every sequence ``count`` times; layers replace their tensors, so the cache stays what it is."""
    branch = copy.copy(cache)
    branch.layers = [copy.copy(layer) for layer in cache.layers]
    branch.batch_repeat_interleave(count)
    return branch


def trials(tokenizer: Any, text: str, windows: Tensor, lengths: Sequence[int], seed: int = 0) -> Iterator[Trial]:
    """Those of the windows [count, longest length] of a text; the same seed gives the same ones."""
    known = {task: facts(tokenizer, text, task) for task in FORMS}
    for length in lengths:
        chance = torch.Generator().manual_seed(seed)
        for window in windows[:, :length]:
            here = tokenizer.decode(window)
            for depth in DEPTHS:
                yield needle(known["needle"], window, here, depth, chance)
            yield recall(known["recall"], window, DEPTHS, chance)


def lengths_of(window: int) -> list[int]:
    """Of contexts, question and answer included: a quarter and a half of the window, where that is not too short, and all."""
    return [n for n in (window // 4, window // 2) if n >= SHORTEST] + [window]


def evaluate_retrieval(
    model: Any, tokenizer: Any, text: str, tokens: Tensor, window: int, limit: int | None, policies: Mapping[str, CachePolicy],
    seed: int = 0, progress: Callable[[str, int, int], None] | None = None,
) -> dict[str, list[dict[str, Any]]]:  # fmt: skip
    """{name: rows} of a text (and its tokens, int64 [n]) and policies by name, the plain cache first, under 'none'.

    A row: task, length and depth (of what is asked for); nll (nats a token of the true answer), gain and gain_ci (nats a token
    that it is less likely after the twin, whose answer is another; 95 %, over windows), exact (share of true answers that
    are the greedy continuation), best (share that are the likeliest of ``choices``; 1 / choices is chance), asked (how
    often), bytes and share (of the cache with one context, and of 16 bits). Raises BadInput for a text or a length without
    room for what is asked for, UsageError for a window that the model cannot take, what ``make_cache`` raises.
    """
    check_window(model, window)
    windows = split_windows(tokens, window, limit)
    lengths = lengths_of(window)
    total = len(windows) * len(lengths) * (len(DEPTHS) + 1)
    found = {}
    for name, policy in [("none", None), *policies.items()]:
        answers: dict[tuple[str, int, float], list[tuple[Tensor, Tensor]]] = {}
        held: dict[tuple[str, int], tuple[float, float]] = {}
        for done, trial in enumerate(trials(tokenizer, text, windows, lengths, seed)):
            made, held[trial.task, trial.length] = ask(model, trial, policy)
            for question, (likely, greedy) in zip(trial.questions, made, strict=True):
                key = (trial.task, trial.length, question.depth)
                answers.setdefault(key, []).append((likely / question.answers.shape[1], greedy))
            if progress is not None:
                progress(name, done + 1, total)
        found[name] = [_row(key, rows, held[key[:2]]) for key, rows in sorted(answers.items())]
    return found


def _row(
    key: tuple[str, int, float], answers: Sequence[tuple[Tensor, Tensor]], held: tuple[float, float]
) -> dict[str, Any]:
    """Of likelihoods in nats a token."""
    task, length, depth = key
    likely, greedy = (torch.stack(parts) for parts in zip(*answers, strict=True))  # [windows, 2, CHOICES]
    own, twins = [0, 1], [1, 0]  # of each of the two answers: the context that it is true of, and the other
    true, twin = (likely[:, side, own] for side in (own, twins))
    gain = bootstrap_ci((true - twin).mean(1))
    return {
        "task": task,
        "length": length,
        "depth": depth,
        "nll": -float(true.mean()),
        "gain": gain.mean,
        "gain_ci": gain.ends,
        "exact": float(greedy[:, own, own].double().mean()),
        "best": float((likely.argmax(2) == torch.tensor(own)).double().mean()),
        "choices": likely.shape[2],
        "asked": true.numel(),
        "bytes": held[0],
        "share": held[0] / held[1],
    }
