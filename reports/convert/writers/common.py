"""What the writers of the corpus share: the model, some rows of a text, and which files are made.

Each ``with_TOOL.py`` beside this file runs in the environment of its tool, without qkit:
    PYTHON with_TOOL.py MODEL TEXT OUT [NAME ..]
and writes OUT/NAME for all of its names, or for those that are given. What is there already stays.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

ROWS, TOKENS = 8, 128
Write = Callable[[Path, Path, Path], None]  # (model, text, folder of the result)


def tokenizer(model: Path):
    return AutoTokenizer.from_pretrained(model)


def plain(model: Path):
    """The model in the dtype of its file."""
    return AutoModelForCausalLM.from_pretrained(model, dtype="auto").eval()


def rows(model: Path, text: Path) -> torch.Tensor:
    """The first tokens of the text, int64 [ROWS, TOKENS]."""
    found = tokenizer(model)(text.read_text()[: 16 * ROWS * TOKENS], add_special_tokens=False)["input_ids"]
    return torch.tensor(found[: ROWS * TOKENS]).reshape(ROWS, TOKENS)


def run(files: dict[str, Write]) -> None:
    """Make the files that the command line names. Ends with 1 where the tool did not write one of them."""
    torch.manual_seed(0)
    model, text, out = (Path(a).resolve() for a in sys.argv[1:4])
    os.chdir(tempfile.mkdtemp())  # tools write their logs into the working folder
    failed = False
    for name in sys.argv[4:] or files:
        if (out / name).is_dir():
            continue
        partial = out / f".{name}"
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        try:
            files[name](model, text, partial)
        except Exception as error:  # of the tool: the other files are made all the same
            print(f"{name}: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
            failed = True
            continue
        if not (partial / "tokenizer_config.json").is_file():
            tokenizer(model).save_pretrained(partial)
        partial.rename(out / name)
        print(name, flush=True)
    sys.exit(failed)
