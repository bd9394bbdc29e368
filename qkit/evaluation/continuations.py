"""The continuations of a few fixed prompts by a model and by its original, to show a difference to a person.

Perplexity is a mean, and a model can keep it and still say something else in a few places; this shows the first tokens of
the same short prompts side by side. It is no defence against weights that were made to change when they are rounded
(arXiv 2606.29239): whoever knows the prompts can spare them.
"""

from __future__ import annotations

from typing import Any

import torch

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
    ids = ids.to(model.device)
    ends = model.config.get_text_config().eos_token_id
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=new_tokens,
        do_sample=False,
        num_beams=1,
        repetition_penalty=1.0,
        pad_token_id=ends[0] if isinstance(ends, list) else ends,
    )
    tokens: torch.Tensor = out[0, ids.shape[1] :].cpu()
    return tokens
