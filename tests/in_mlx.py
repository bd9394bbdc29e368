"""What MLX makes of a folder in its layout. The tests need an environment with mlx and mlx-lm."""

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

MLX = os.environ.get("QKIT_MLX_PYTHON")
READER = Path(__file__).parents[1] / "reports" / "convert" / "mlx_reader.py"
needed = pytest.mark.skipif(MLX is None, reason="QKIT_MLX_PYTHON names no interpreter with mlx and mlx-lm")


def _read(work: Path, *words: object) -> dict[str, Tensor]:
    file = work / "mlx.safetensors"
    command = [str(MLX), str(READER), str(words[0]), str(file), *map(str, words[1:])]
    plain = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    ran = subprocess.run(command, capture_output=True, text=True, check=False, env=plain)
    assert ran.returncode == 0, ran.stderr
    return load_file(file)


def weights(out: Path, work: Path) -> dict[str, Tensor]:
    """{tensor: plain weight in float32} of every quantized matrix, by mlx.core.dequantize."""
    return _read(work, "weights", out)


def log_probabilities(out: Path, tokens: Tensor, work: Path) -> Tensor:
    """Of the model that mlx_lm loads, in float32 arithmetic."""
    (work / "tokens.json").write_text(json.dumps(tokens.tolist()))
    found = _read(work, "logits", out, work / "tokens.json", "float32")["logits"]
    return torch.log_softmax(found, -1)
