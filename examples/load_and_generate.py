"""Load a packed model and generate text. Weights stay packed in memory."""

import sys
from pathlib import Path

import torch
from transformers import AutoTokenizer

import qkit


def main(folder: Path) -> None:
    out = folder / "tiny-llama-w4a16"
    qkit.quantize("tiny-llama", scheme="w4a16", method="rtn", out=out)  # returns at once where the result is there

    model = qkit.load(out, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(out)
    inputs = tokenizer("The river", return_tensors="pt", return_token_type_ids=False)
    tokens = model.generate(**inputs, max_new_tokens=24, do_sample=False)
    print(tokenizer.decode(tokens[0], skip_special_tokens=True))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
