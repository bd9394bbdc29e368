"""How far mlx_lm's log-probabilities are from those of qkit.load, in float32 and in bfloat16.

    python reports/convert/mlx_models.py PYTHON TEXT TOKENS OUT.json NAME=FOLDER ..
PYTHON: of an environment with mlx and mlx-lm, which mlx_reader.py runs in; TEXT: a file; TOKENS: how many of its first tokens.
Figures are of absolute differences. OUT.json keeps the rows of other names. A plain model needs the older keys of its rotary
embedding in config.json, which mlx_lm reads: that qkit writes them is why its results need nothing.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

import qkit
from qkit.runtime.loading import load_tokenizer

READER = Path(__file__).with_name("mlx_reader.py")


def of_mlx(python: str, folder: str, rows: list[list[int]], dtype: str) -> Tensor:
    """Log-probabilities of the model that mlx_lm loads, cast to ``dtype``."""
    plain = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    cast = [dtype] if dtype == "float32" else []  # biases in float32 stay so where the file has them
    with tempfile.TemporaryDirectory() as work:
        file, tokens = Path(work) / "logits.safetensors", Path(work) / "tokens.json"
        tokens.write_text(json.dumps(rows))
        command = [python, READER, "logits", file, folder, tokens, *cast]
        subprocess.run(command, check=True, env=plain, stdout=subprocess.DEVNULL)
        return torch.log_softmax(load_file(file)["logits"], -1)


def of_qkit(folder: str, rows: list[list[int]], dtype: str) -> Tensor:
    """The same of qkit.load."""
    model = qkit.load(folder, dtype=getattr(torch, dtype))
    with torch.no_grad():
        return torch.log_softmax(model(torch.tensor(rows)).logits.float(), -1)


def main() -> None:
    """A row for each folder."""
    python, text, count, out, *named = sys.argv[1:]
    file = Path(out)
    found = json.loads(file.read_text()) if file.exists() else {}
    for name, _, folder in (x.partition("=") for x in named):
        rows = [load_tokenizer(Path(folder))(Path(text).read_text()[:20_000])["input_ids"][: int(count)]]
        mlx = {dtype: of_mlx(python, folder, rows, dtype) for dtype in ("float32", "bfloat16")}
        own = {dtype: of_qkit(folder, rows, dtype) for dtype in mlx}
        pairs = {d: (mlx[d], own[d]) for d in mlx} | {"mlx": (mlx["bfloat16"], mlx["float32"])}
        apart = {key: (a - b).abs() for key, (a, b) in pairs.items()}
        row = {key: {"mean": float(x.mean()), "largest": float(x.max())} for key, x in apart.items()}
        found[name] = {"tokens": len(rows[0]), **row}
        file.write_text(json.dumps(found, indent=1) + "\n")
        print(name, found[name], flush=True)


if __name__ == "__main__":
    main()
