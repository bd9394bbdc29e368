"""The continuations of a few fixed prompts by a model and by its original, to show a difference to a person.

Perplexity is a mean, and a model can keep it and still say something else in a few places; this shows the first tokens of
the same short prompts side by side. It is no defence against weights that were made to change when they are rounded
(arXiv 2606.29239): whoever knows the prompts can spare them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from qkit.evaluation.metrics import BATCH

PROMPTS = (
    "The capital of France is",
    "Once upon a time, there was a little girl who",
    "In one sentence: water boils because",
    "2 + 2 =",
    "def add(a, b):\n    return",
    "The opposite of hot is",
    "To be safe on the internet, you should never",
    "When she came home in the evening,",
)
NEW_TOKENS = 24


@torch.no_grad()
def continuations(model: Any, baseline: Any, tokenizer: Any) -> list[dict[str, Any]]:
    """The greedy continuation of each prompt, {"prompt", "said"}, and with a baseline also {"baseline_said", "same"};
    NEW_TOKENS tokens. same: how many tokens agree before the first that differs."""
    entries = []
    for prompt in PROMPTS:
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
        tokens = greedy_continuation(model, ids, NEW_TOKENS)
        entry: dict[str, Any] = {"prompt": prompt, "said": tokenizer.decode(tokens)}
        if baseline is not None:
            baseline_tokens = greedy_continuation(baseline, ids, NEW_TOKENS)
            tokens_of_both = zip(tokens.tolist(), baseline_tokens.tolist(), strict=False)
            equal_count = next(
                (i for i, (a, b) in enumerate(tokens_of_both) if a != b), min(len(tokens), len(baseline_tokens))
            )
            entry |= {"baseline_said": tokenizer.decode(baseline_tokens), "same": equal_count}
        entries.append(entry)
    return entries


def greedy_continuation(model: Any, ids: torch.Tensor, new_tokens: int) -> torch.Tensor:
    """The most likely tokens that follow ids, int64 [1, n] -> [at most new_tokens], up to and with the end of the text."""
    return greedy_continuations(model, [ids[0]], [new_tokens])[0]


def greedy_continuations(model: Any, rows: Sequence[torch.Tensor], new_tokens: Sequence[int]) -> list[torch.Tensor]:
    """What ``greedy_continuation`` gives of every row, int64 [n], some rows at a time. Shorter rows get padding before them,
    which the model is told to leave out; where two tokens are all but equally likely, it can decide between them."""
    ends = model.generation_config.eos_token_id
    ends = [] if ends is None else ends if isinstance(ends, list) else [ends]
    found: list[torch.Tensor] = []
    for at in range(0, len(rows), BATCH):
        batch, counts = rows[at : at + BATCH], new_tokens[at : at + BATCH]
        longest = max(map(len, batch))
        ids = torch.full((len(batch), longest), ends[0] if ends else 0, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for i, row in enumerate(batch):
            ids[i, longest - len(row) :], mask[i, longest - len(row) :] = row, 1
        out = model.generate(
            ids.to(model.device),
            attention_mask=mask.to(model.device),
            max_new_tokens=max(counts),
            do_sample=False,
            num_beams=1,
            repetition_penalty=1.0,
            pad_token_id=ends[0] if ends else 0,
        )
        for said, count in zip(out[:, longest:].cpu(), counts, strict=True):
            is_end = torch.isin(said, torch.tensor(ends, dtype=torch.int64)).long()
            found.append(said[:count][(is_end.cumsum(0) - is_end)[:count] == 0])
    return found
