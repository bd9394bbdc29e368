"""What each method repairs of a model with strong outliers: perplexity of packed checkpoints, reloaded from disk.

    python reports/outliers/make_model.py --model DIR --out MADE
    python reports/outliers/run.py --model MADE --calib FILE --text FILE --name tiny-llama-outliers

Every row is the command that a user types (128 x 256 calibration tokens); the text in its first 200 windows of 512,
float32 arithmetic on the packed weights. Writes reports/outliers/NAME.json after every row; a row that failed is
recorded with its error. Rows that the file holds are skipped, failed ones tried again: a stopped run goes on.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from qkit.calibration.dataset import read_text
from qkit.runtime.loading import load, load_tokenizer
from qkit.evaluation.metrics import nll_windows

METHODS = ("rtn", "smoothquant", "awq", "rotate", "gptq")
ROWS = tuple(
    (scheme, method)
    for scheme in ("w8a8", "w4a16", "w3a16", "w4a8")
    for method in (*METHODS, *(("requant+rtn", "requant+gptq") if scheme.endswith("a16") else ()))
)
QKIT = [sys.executable, "-c", "from qkit.commands import main; main()"]


def show(result: dict) -> None:
    """The table, a scheme per line."""
    rows = {(r["scheme"], r["method"]): r for r in result["rows"]}
    methods = list(dict.fromkeys(m for _, m in ROWS if any(m == k[1] for k in rows)))
    print(f"full precision {result['reference']:.2f}")
    print(f"{'':<8}" + "".join(f"{m:>14}" for m in methods))
    for scheme in dict.fromkeys(s for s, _ in rows):
        cells = [rows.get((scheme, m), {}) for m in methods]
        figures = [f"{c['perplexity']:.2f}" if "perplexity" in c else "-" for c in cells]
        print(f"{scheme:<8}" + "".join(f"{x:>14}" for x in figures))


def main() -> None:
    """Quantize, reload and measure every row that is not there yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--calib", required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--windows", type=int, default=200)
    parser.add_argument("--name", required=True)
    parser.add_argument("--methods", help="only the rows of these: rtn,awq")
    args = parser.parse_args()
    tokenizer = load_tokenizer(args.model)
    tokens = torch.tensor(tokenizer(read_text(args.text), add_special_tokens=False, verbose=False)["input_ids"])
    path = Path(__file__).parent / f"{args.name}.json"

    def perplexity(folder: object) -> float:
        with torch.inference_mode():
            return float(nll_windows(load(str(folder), dtype=torch.float32), tokens, 512, args.windows).mean().exp())

    result = json.loads(path.read_text()) if path.exists() else None
    if result is None:
        result = {"model": args.name, "text": args.text.name, "windows": args.windows, "rows": []}
        result["reference"] = perplexity(args.model)
    if result["windows"] != args.windows:
        raise SystemExit(f"{path}: measured in {result['windows']} windows: give --windows {result['windows']}")
    result["rows"] = [r for r in result["rows"] if "error" not in r]
    present = {(r["scheme"], r["method"]) for r in result["rows"]}
    for scheme, method in ROWS:
        if (scheme, method) in present or (args.methods and method not in args.methods.split(",")):
            continue
        row = {"scheme": scheme, "method": method}
        with tempfile.TemporaryDirectory() as work:
            out, began = Path(work) / "out", time.monotonic()
            command = [*QKIT, "quantize", "--model", args.model, "--scheme", scheme, "--method", method]
            done = subprocess.run([*command, "--calib", args.calib, "--out", out], capture_output=True, text=True)
            row["seconds"] = round(time.monotonic() - began, 1)
            if done.returncode:
                row["error"] = " ".join(done.stderr.split())
            else:
                row["bytes"] = sum(f.stat().st_size for f in out.glob("*.safetensors"))
                row["perplexity"] = perplexity(out)
                row["delta"] = row["perplexity"] - result["reference"]
        result["rows"].append(row)
        path.write_text(json.dumps(result, indent=1) + "\n")
        print(json.dumps(row), flush=True)
    show(result)


if __name__ == "__main__":
    main()
