"""A small Llama for long contexts: tiny-llama, trained further on rows of 2,048 tokens.

    python reports/kvcache/train.py --model DIR --text train.txt.xz --out OUT [--steps 200]
    python reports/kvcache/train.py --model LONG --text train.txt.xz --out OUT --length 128 --retrieval 0.75 --rate 1e-3

Decoding 1,024 tokens after a prompt of 1,024 says something about a cache only where the model looks that far back; tiny-llama
was trained on shorter rows. AdamW, cosine schedule with warm-up, float32, compiled. Prints the loss on the way, and in the
end, on rows of the text that training did not see, the loss by position.

--retrieval mixes rows in that are made from the text for copying, and scored where copying tells the token: shuffled
tokens told again and again, and facts (those of ``qkit.evaluation.retrieval``, in lists and hidden in text) told a second
time in another order.
"""

from __future__ import annotations

import argparse
import lzma
import math
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer

from qkit.evaluation.retrieval import FORMS, Facts, find_facts

WORDS = 2_000_000  # letters of the text whose words make facts
HELD = 16  # rows at the end of the text that are not trained on


def letters_of(text: Path) -> str:
    """The text, unpacked."""
    if text.suffix == ".xz":
        with lzma.open(text, "rt", encoding="utf-8") as file:
            return file.read()
    return text.read_text(encoding="utf-8")


def tokens_of(whole: str, tokenizer: object) -> Tensor:
    """int32 [n]."""
    backend = tokenizer.backend_tokenizer  # type: ignore[attr-defined]
    return torch.tensor(backend.encode_batch_fast([whole], add_special_tokens=False)[0].ids, dtype=torch.int32)


class Lookups:
    """Rows for copying, with the places that copying tells."""

    def __init__(self, ids: Tensor, text: str, tokenizer: object, length: int, chance: torch.Generator) -> None:
        self.ids, self.length, self.chance = ids, length, chance
        self.known = [find_facts(tokenizer, text[:WORDS], task) for task in FORMS]

    def row(self) -> tuple[Tensor, Tensor]:
        """int64 [length] and bool [length]: tokens that what came before tells."""
        kind = self._below(1, 4)
        parts = self._facts(self.known[kind - 1], kind == 1) if kind < 3 else self._repeats()
        row, told = (torch.cat(column)[: self.length] for column in zip(*parts, strict=True))
        return row, told

    def _repeats(self) -> Iterator[tuple[Tensor, Tensor]]:
        """A few shuffled tokens of the text, until the row is full."""
        count = self._below(8, self.length // 2)
        span = self._text(count)[self._order(count)]
        for n in range(-(-self.length // len(span))):
            yield span, torch.full((len(span),), n > 0)

    def _facts(self, known: Facts, hidden: bool) -> Iterator[tuple[Tensor, Tensor]]:
        """Facts, with some text between them if they are hidden, and again in another order until the row is full."""
        gap = self._below(0, self.length // 8) if hidden else 0
        line = known.asking + len(known.end)
        count = self._below(2, max(self.length * 2 // 3 // (line + gap), 3))
        keys = torch.randint(len(known.words), (2, count), generator=self.chance)
        told = torch.arange(line) >= known.questions.shape[1]
        told &= torch.arange(line) < known.asking
        for key, value in keys.T.tolist():
            yield self._text(gap), torch.zeros(gap, dtype=torch.bool)
            yield known.statement(key, value), torch.zeros_like(told)
        for _ in range(self.length // (count * line) + 1):
            for i in self._order(count).tolist():
                yield known.statement(*keys[:, i].tolist()), told

    def _text(self, count: int) -> Tensor:
        start = self._below(0, len(self.ids) - count)
        return self.ids[start : start + count].long()

    def _order(self, count: int) -> Tensor:
        return torch.randperm(count, generator=self.chance)

    def _below(self, low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=self.chance))


def main() -> None:
    """Train and save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--rate", type=float, default=5e-4)
    parser.add_argument("--retrieval", type=float, default=0.0, metavar="SHARE", help="of rows for copying")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    text = letters_of(args.text)
    ids = tokens_of(text, tokenizer)
    held = ids[-HELD * args.length :].long().view(HELD, args.length)
    ids = ids[: -HELD * args.length]
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    model.config.max_position_embeddings = max(args.length, model.config.max_position_embeddings)
    model.config.use_cache = False
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.rate, betas=(0.9, 0.95), weight_decay=0.1)
    step_ = torch.compile(lambda rows, weights: (loss_of(model, rows) * weights).sum() / weights.sum())
    chance = torch.Generator().manual_seed(args.seed)
    lookups = Lookups(ids, text, tokenizer, args.length, chance) if args.retrieval else None
    began = time.monotonic()
    print("before", by_position(model, held), flush=True)
    for step in range(args.steps):
        warm, left = (step + 1) / max(1, args.steps // 20), step / args.steps
        for group in optimizer.param_groups:
            group["lr"] = args.rate * min(1.0, warm, 0.5 * (1 + math.cos(math.pi * left)) + 0.02)
        starts = torch.randint(0, len(ids) - args.length, (args.batch,), generator=chance)
        rows = torch.stack([ids[s : s + args.length].long() for s in starts.tolist()])
        weights = torch.ones(args.batch, args.length - 1)
        for i in range(round(args.batch * args.retrieval) if lookups is not None else 0):
            rows[i], told = lookups.row()
            weights[i] = told[1:]
        loss = step_(rows, weights)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 10 == 0:
            if lookups is not None:
                with torch.no_grad():
                    copied = [loss_of(model, r[None])[0][t[1:]] for r, t in (lookups.row() for _ in range(4))]
                print("copying", " ".join(f"{float(c.mean()):.3f}" for c in copied), end=" ")
            print(step, f"{float(loss.detach()):.4f}", f"{time.monotonic() - began:.0f} s", flush=True)
    print("after", by_position(model, held), flush=True)
    model.config.use_cache = True
    model.to(torch.bfloat16).save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)


def loss_of(model: torch.nn.Module, rows: Tensor) -> Tensor:
    """float32 [rows, length - 1], in nats."""
    logits = model(input_ids=rows).logits[:, :-1]
    return functional.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten(), reduction="none").view(len(rows), -1)


@torch.no_grad()
def by_position(model: torch.nn.Module, rows: Tensor) -> str:
    """Mean loss of each quarter of the rows."""
    losses = torch.cat([loss_of(model, r) for r in rows.split(2)])
    return " ".join(f"{float(part.mean()):.4f}" for part in losses.chunk(4, dim=1))


if __name__ == "__main__":
    main()
