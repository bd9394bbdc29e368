"""Train a model for a few hundred steps on a text, so that its weights leave the grid that they were stored on.

    python reports/comparison/finetune.py --model DIR --text train.txt.xz --out DIR [--steps 400] [--rows 8] [--length 256]

SmolLM2-135M-Instruct comes from a package that holds 4-bit weights (Q4_1): asymmetric groups of 32 fit it exactly, and a 4-bit
comparison on it says little. AdamW, bfloat16 autocast, a cosine schedule with warm-up; documents are drawn at random by the
seed. OUT.state keeps what is needed to go on after a stop; the same command goes on.
"""

from __future__ import annotations

import argparse
import lzma
import math
import os
import random
import shutil
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

WARM_UP, KEPT = 40, 50  # steps; the state is written every KEPT


def main() -> None:
    """Train, and write the model in the dtype of its source."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--rate", type=float, default=1e-4)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    stored = AutoModelForCausalLM.from_pretrained(args.model, dtype="auto").dtype
    documents = lzma.open(args.text, "rt", encoding="utf-8").read().split("<|doc|>")
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.rate, betas=(0.9, 0.95), weight_decay=0.01)
    state, first = args.out.with_name(args.out.name + ".state"), 0
    if state.exists():
        saved = torch.load(state, weights_only=True)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        first = saved["step"]
    model.train()
    began = time.monotonic()
    for step in range(first, args.steps):
        rate = args.rate * min(1, (step + 1) / WARM_UP) * (0.5 + 0.5 * math.cos(math.pi * step / args.steps))
        for group in optimizer.param_groups:
            group["lr"] = rate
        ids = _batch(documents, tokenizer, args, step)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits = model(input_ids=ids).logits
        loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if (step + 1) % 10 == 0:
            print(f"step {step + 1}: loss {loss.item():.3f}, {time.monotonic() - began:.0f} s", flush=True)
        if (step + 1) % KEPT == 0 or step + 1 == args.steps:
            new = state.with_suffix(".new")
            torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step + 1}, new)
            os.replace(new, state)
    model.eval().to(stored).save_pretrained(args.out)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        if (args.model / name).exists():
            shutil.copy(args.model / name, args.out / name)
    state.unlink()


def _batch(documents: list[str], tokenizer: Any, args: argparse.Namespace, step: int) -> torch.Tensor:
    """int64 [rows, length]: documents drawn by seed and step, one behind the other."""
    draw = random.Random(f"{args.seed} {step}")
    ids = list[int]()
    while len(ids) < args.rows * args.length:
        text = documents[draw.randrange(len(documents))]
        start = draw.randrange(max(1, len(text) - 6 * args.length))
        ids += tokenizer(text[start : start + 8000], add_special_tokens=False)["input_ids"][: 2 * args.length]
    return torch.tensor(ids[: args.rows * args.length]).view(args.rows, args.length)


if __name__ == "__main__":
    main()
