"""Tiny random models of many architectures in GGUF: what llama.cpp computes against qkit's own numbers of the same file.

    python reports/gguf/architectures.py --llama VENV/bin/python --work WORK [--types q8_0,q4_0] [--only NAME,..]

Each model has random weights, norms and biases in all places, and the embedded tokenizer. It is quantized by rounding, loaded
back by qkit in float32, and run in llama.cpp by tools/llama_logits.py. ``mean`` and ``largest`` are of the absolute difference
of log-probabilities of 94 tokens; ``relative`` is its norm against how far the log-probabilities spread, which an order of rows
or a norm in the wrong place makes about one. A class that is refused has the sentence that says why.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[2]
sys.path += [str(ROOT / "tools"), str(ROOT / "tests")]
import sweep_changes  # noqa: E402
import tiny_models  # noqa: E402
from conftest import Quiet  # noqa: E402
from sweep_configs import save  # noqa: E402

import qkit  # noqa: E402
from qkit.errors import QkitError  # noqa: E402
from qkit.verification.verify import verify  # noqa: E402
from qkit.workflows.quantize import Request, quantize  # noqa: E402

TARGET = Path(__file__).with_suffix(".json")
NAMES = (
    "llama mistral qwen2 qwen3 smollm3 gemma gemma2 gemma3_text phi phi3 olmo olmo2 granite starcoder2 gpt2 gpt_neox falcon stablelm "
    "cohere cohere2 glm4 exaone4 nemotron qwen2_moe qwen3_moe mixtral olmoe granitemoe phimoe llama4_text gpt_oss deepseek_v2 "
    "deepseek_v3 mamba mamba2 lfm2 opt"
).split()


def main() -> None:
    """See the top of the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--llama", required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--types", default="q8_0,q4_0")
    parser.add_argument("--only", default=",".join(NAMES))
    args = parser.parse_args()
    results = json.loads(TARGET.read_text()) if TARGET.is_file() else {}
    for name in args.only.split(","):
        source = args.work / name
        if not source.is_dir():
            save("causal", name, source)
        for kind in args.types.split(","):
            row = measured(source, args.work / "out", kind, args.llama)
            results.setdefault(name, {})[kind] = row
            print(name, kind, row, flush=True)
            TARGET.write_text(json.dumps(results, indent=1) + "\n")


def measured(source: Path, out: Path, kind: str, llama: str) -> dict[str, Any]:
    """One model in one type."""
    shutil.rmtree(out, ignore_errors=True)
    try:
        quantize(Request(model=str(source), scheme=kind), out, Quiet())
        report = verify(out)
        tokens = tiny_models.tokens(2, 48)
        model = qkit.load(out, dtype=torch.float32)
        logits = torch.log_softmax(tiny_models.logits(model, tokens), -1)
    except QkitError as e:
        return {"refused": str(e).replace(f"{source}: ", "").replace(str(source), "MODEL")}
    wanted = -logits[:, :-1].gather(-1, tokens[:, 1:, None])[..., 0]
    windows = out.with_suffix(".json")
    windows.write_text(json.dumps(tokens.tolist()))
    command = [llama, str(ROOT / "tools" / "llama_logits.py"), str(out / "model.gguf"), str(windows)]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    if ran.returncode:
        return {"llama.cpp": ran.stderr.strip().splitlines()[-1][:200] if ran.stderr.strip() else f"exit {ran.returncode}"}
    gap = torch.tensor(json.loads(ran.stdout)["nll"]) - wanted
    return {
        "sound": not report.problems,
        "mean": round(float(gap.abs().mean()), 4),
        "largest": round(float(gap.abs().max()), 4),
        "relative": round(float(gap.norm() / (wanted - wanted.mean()).norm()), 4),
    }


if __name__ == "__main__":
    assert sweep_changes.CHANGES
    main()
