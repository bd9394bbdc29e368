"""Make a randomly initialised Llama checkpoint in bf16, for measuring time and memory at a chosen size.

The same arguments and versions give the same weights. The tokenizer is copied from another checkpoint.
"""

import argparse
import json
import shutil
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--mlp", type=int, default=2816)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--kv-heads", type=int, help="default: as many as --heads")
    parser.add_argument("--vocab", type=int, default=4096)
    parser.add_argument("--tokenizer", type=Path, required=True, help="folder whose tokenizer files are copied")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--shard-size", default="500MB", help="largest weight file, as save_pretrained takes it")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    source = json.loads((args.tokenizer / "config.json").read_text(encoding="utf-8"))
    if args.vocab < source["vocab_size"]:
        parser.error(f"--vocab {args.vocab} is below the tokenizer's model's {source['vocab_size']}")
    config = LlamaConfig(
        hidden_size=args.hidden,
        intermediate_size=args.mlp,
        num_hidden_layers=args.layers,
        num_attention_heads=args.heads,
        num_key_value_heads=args.kv_heads or args.heads,
        vocab_size=args.vocab,
        bos_token_id=source["bos_token_id"],
        eos_token_id=source["eos_token_id"],
        tie_word_embeddings=False,
    )
    torch.manual_seed(args.seed)
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(args.out, max_shard_size=args.shard_size)
    for name in TOKENIZER_FILES:
        shutil.copyfile(args.tokenizer / name, args.out / name)
    size = sum(file.stat().st_size for file in args.out.glob("*.safetensors"))
    print(f"{args.out}: {model.num_parameters():,} parameters, {size:,} bytes of weights")


if __name__ == "__main__":
    main()
