"""A small mixture of experts (Qwen3-MoE), trained on a text, for measuring what leaving experts out costs.

    python reports/experts/train.py --tokenizer DIR --text train.txt.xz --out OUT [--steps 1500]

4 blocks of 8 experts, of which each token uses 2; the experts are 80 % of the weights. AdamW, cosine schedule with warm-up,
float32, one row of 128 tokens in 16 a step. Prints the loss on the way.
"""

from __future__ import annotations

import argparse
import lzma
import math
import time
from pathlib import Path

import torch
from transformers import AutoTokenizer, Qwen3MoeConfig, Qwen3MoeForCausalLM

LETTERS = 30_000_000  # of the text
LENGTH, BATCH = 128, 16
CONFIG = dict(
    vocab_size=4096, hidden_size=256, num_hidden_layers=4, num_attention_heads=8, num_key_value_heads=4, head_dim=32,
    moe_intermediate_size=256, num_experts=8, num_experts_per_tok=2, norm_topk_prob=True, max_position_embeddings=1024,
    tie_word_embeddings=True, router_aux_loss_coef=0.001, bos_token_id=0, eos_token_id=0,
)  # fmt: skip


def main() -> None:
    """Train and save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--rate", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    tokenizer = AutoTokenizer.from_pretrained(args.tokenizer)
    with lzma.open(args.text, "rt", encoding="utf-8") as file:
        text = file.read(LETTERS)
    ids = torch.tensor(tokenizer.backend_tokenizer.encode_batch_fast([text], add_special_tokens=False)[0].ids)
    model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**CONFIG)).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.rate, betas=(0.9, 0.95), weight_decay=0.1)
    chance, began = torch.Generator().manual_seed(args.seed), time.monotonic()
    for step in range(args.steps):
        warm, done = (step + 1) / max(1, args.steps // 20), step / args.steps
        for group in optimizer.param_groups:
            group["lr"] = args.rate * min(1.0, warm, 0.5 * (1 + math.cos(math.pi * done)) + 0.02)
        starts = torch.randint(0, len(ids) - LENGTH, (BATCH,), generator=chance)
        rows = torch.stack([ids[s : s + LENGTH] for s in starts.tolist()])
        loss = model(input_ids=rows, labels=rows, output_router_logits=True).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 50 == 0:
            print(step, f"{float(loss.detach()):.4f}", f"{time.monotonic() - began:.0f} s", flush=True)
    model.to(torch.bfloat16).save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)


if __name__ == "__main__":
    main()
