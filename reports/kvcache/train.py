"""A small Llama for long contexts: tiny-llama, trained further on rows of 2,048 tokens.

    python reports/kvcache/train.py --model DIR --text train.txt.xz --out OUT [--steps 200]

Decoding 1,024 tokens after a prompt of 1,024 says something about a cache only where the model looks that far back; tiny-llama
was trained on shorter rows. AdamW, cosine schedule with warm-up, float32, compiled. Prints the loss on the way, and in the
end, on rows of the text that training did not see, the loss by position.
"""

from __future__ import annotations

import argparse
import lzma
import math
import time
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer

HELD = 16  # rows at the end of the text that are not trained on


def tokens_of(text: Path, tokenizer: object) -> Tensor:
    """int32 [n]."""
    whole = lzma.open(text, "rt", encoding="utf-8").read() if text.suffix == ".xz" else text.read_text(encoding="utf-8")
    backend = tokenizer.backend_tokenizer  # type: ignore[attr-defined]
    return torch.tensor(backend.encode_batch_fast([whole], add_special_tokens=False)[0].ids, dtype=torch.int32)


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
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    ids = tokens_of(args.text, tokenizer)
    held = ids[-HELD * args.length :].long().view(HELD, args.length)
    ids = ids[: -HELD * args.length]
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    model.config.max_position_embeddings = args.length
    model.config.use_cache = False
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.rate, betas=(0.9, 0.95), weight_decay=0.1)
    step_ = torch.compile(lambda rows: loss_of(model, rows).mean())
    chance = torch.Generator().manual_seed(args.seed)
    began = time.monotonic()
    print("before", by_position(model, held), flush=True)
    for step in range(args.steps):
        warm, left = (step + 1) / max(1, args.steps // 20), step / args.steps
        for group in optimizer.param_groups:
            group["lr"] = args.rate * min(1.0, warm, 0.5 * (1 + math.cos(math.pi * left)) + 0.02)
        starts = torch.randint(0, len(ids) - args.length, (args.batch,), generator=chance)
        loss = step_(torch.stack([ids[s : s + args.length].long() for s in starts.tolist()]))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 10 == 0:
            print(step, f"{float(loss):.4f}", f"{time.monotonic() - began:.0f} s", flush=True)
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
