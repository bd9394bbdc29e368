"""What llama.cpp makes of a GGUF file, beside what qkit computes from it. The tests need an environment with xllamacpp."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_models
import torch
from torch import Tensor

import qkit
from qkit.files.gguf_container import MODEL

LLAMA = os.environ.get("QKIT_LLAMA_PYTHON")
TOOLS = Path(__file__).parents[1] / "tools"
WORKER = TOOLS / "llama_logits.py"
sys.path.append(str(TOOLS))  # gguf_floats is there
needed = pytest.mark.skipif(LLAMA is None, reason="QKIT_LLAMA_PYTHON names no interpreter with xllamacpp")


def likelihoods(out: Path, tokens: Tensor, work: Path, file: Path | None = None) -> tuple[Tensor, Tensor]:
    """Negative log-likelihoods [rows, tokens - 1] of the file of a result (or of another file) in llama.cpp, and of the result
    in qkit."""
    (work / "tokens.json").write_text(json.dumps(tokens.tolist()))
    command = [str(LLAMA), str(WORKER), str(file or out / MODEL), str(work / "tokens.json")]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    logits = torch.log_softmax(tiny_models.logits(qkit.load(out, dtype=torch.float32), tokens), -1)
    return torch.tensor(json.loads(ran.stdout)["nll"]), -logits[:, :-1].gather(-1, tokens[:, 1:, None])[..., 0]


def error(found: Tensor, wanted: Tensor) -> float:
    """Of likelihoods, relative to how far they lie apart: rows in another order make it about 1."""
    return float((found - wanted).norm() / (wanted - wanted.mean()).norm())
