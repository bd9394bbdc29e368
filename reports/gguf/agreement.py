"""Whether llama.cpp computes what qkit computes of qkit's GGUF files: likelihoods of the same tokens, type by type.

    python reports/gguf/agreement.py --model DIR --name NAME --text FILE --llama PYTHON --work DIR [--types q4_0,q5_1,..] \\
        [--windows 40]

PYTHON: of an environment with xllamacpp. Each type is made by rounding to nearest, and runs in llama.cpp, in qkit in float32,
and in qkit with inputs rounded as llama.cpp rounds them. reports/gguf/agreement-NAME.json has, for each type, by how many per
cent llama.cpp's perplexity is above that of qkit, with a 95 % interval over windows of 512 tokens (paired). Types that are
there with as many windows are left out.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qkit.calibration.dataset import read_text, token_ids
from qkit.evaluation.metrics import split_windows
from qkit.files.folder import GGUF_MODEL
from qkit.runtime.loading import load_tokenizer
from qkit.tensor.formats import GGUF_FORMATS
from qkit.workflows.own_arithmetic import input_blocks, load_model, rounded_inputs

HERE = Path(__file__).resolve().parent
SCORES = HERE.parents[1] / "tools" / "llama_logits.py"
WINDOW = 512


def main() -> None:
    """Make and run what is not there yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for flag in ("--model", "--name", "--llama"):
        parser.add_argument(flag, required=True)
    for flag in ("--text", "--work"):
        parser.add_argument(flag, type=Path, required=True)
    parser.add_argument("--types", default=",".join(GGUF_FORMATS))
    parser.add_argument("--windows", type=int, default=40)
    args = parser.parse_args()
    args.work.mkdir(exist_ok=True)
    target = HERE / f"agreement-{args.name}.json"
    found: dict[str, Any] = json.loads(target.read_text()) if target.exists() else {}
    ids = torch.tensor(token_ids(load_tokenizer(args.model), read_text(args.text)))
    windows = split_windows(ids, WINDOW, args.windows)
    tokens = args.work / "tokens.json"
    tokens.write_text(json.dumps(windows.tolist()))
    for kind in args.types.split(","):
        if found.get(kind, {}).get("windows", 0) < len(windows):
            found[kind] = {"windows": len(windows), **differences(args, kind, windows, tokens)}
            print(kind, found[kind], flush=True)
            target.write_text(json.dumps(found, indent=1) + "\n")


def differences(args: argparse.Namespace, kind: str, windows: Tensor, tokens: Path) -> dict[str, list[float]]:
    """llama.cpp's perplexity over qkit's, in per cent, with the interval: of the file in float32, and with inputs rounded."""
    out = args.work / kind
    if not (out / GGUF_MODEL).exists():
        line = [sys.executable, "-W", "ignore", "-m", "qkit", "quantize", "--model", args.model, "--scheme", kind]
        subprocess.run([*line, "--method", "rtn", "--out", str(out)], check=True, capture_output=True)
    file = out / GGUF_MODEL
    answer = subprocess.run([args.llama, SCORES, file, tokens], check=True, capture_output=True, text=True).stdout
    theirs = np.array(json.loads(answer[answer.index("{") :])["nll"]).mean(1)
    model = load_model(file, torch.float32)
    result = {"float32": over(theirs, losses(model, windows))}
    with rounded_inputs(model, input_blocks(file, model)):
        return {**result, "inputs rounded": over(theirs, losses(model, windows))}


@torch.inference_mode()
def losses(model: Any, windows: Tensor) -> np.ndarray:
    """The mean loss of each window, in nats a token."""
    means = []
    for ids in windows:
        logits = model(input_ids=ids[None], use_cache=False).logits[0, :-1].float()
        means.append(-float(logits.log_softmax(-1).gather(1, ids[1:, None]).double().mean()))
    return np.array(means)


def over(theirs: np.ndarray, ours: np.ndarray) -> list[float]:
    """[mean, lower end, upper end] in per cent."""
    gap = theirs - ours
    error = 1.96 * gap.std(ddof=1) / len(gap) ** 0.5
    return [round(100 * float(np.expm1(x)), 3) for x in (gap.mean(), gap.mean() - error, gap.mean() + error)]


if __name__ == "__main__":
    main()
