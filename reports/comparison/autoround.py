"""Quantize a model with AutoRound, for the comparison of ``run.py``: its defaults, on given rows.

    PYTHON autoround.py --model DIR --calib FILE --scheme W3A16 [--group-size 64] --out DIR

PYTHON is an interpreter that has auto-round. Rows are the first ``--samples`` consecutive ones of ``--seqlen`` tokens, as
qkit takes them. OUT gets the dequantized weights, in float32, so that what is measured is rounding and nothing else.
"""

import argparse
import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
from auto_round import AutoRound
from transformers import AutoModelForCausalLM, AutoTokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--calib", type=Path, required=True)
    parser.add_argument("--scheme", required=True)
    parser.add_argument("--group-size", type=int)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--seqlen", type=int, default=256)
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--out", required=True)
    args = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    tokens = tokenizer(args.calib.read_text(encoding="utf-8"), add_special_tokens=False, verbose=False)["input_ids"]
    rows = torch.tensor(tokens[: args.samples * args.seqlen]).view(args.samples, args.seqlen)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    changed = {} if args.group_size is None else {"group_size": args.group_size}
    rounder = AutoRound(
        model,
        tokenizer,
        scheme=args.scheme,
        dataset=list(rows.split(8)),
        seqlen=args.seqlen,
        nsamples=args.samples,
        seed=args.seed,
        device_map="cpu",
        **changed,
    )
    rounder.quantize_and_save(args.out, format="fake")


if __name__ == "__main__":
    main()
