"""Perplexity of packed checkpoints, reloaded from disk, of every row of the quality table.

    python reports/quality/run.py --model DIR --calib FILE --text FILE --name tiny-llama

128 x 256 calibration tokens; the text in its first 200 windows of 512, float32 arithmetic on the packed weights.
Writes reports/quality/NAME.json. The figures of llm-compressor 0.14 were measured on the same model, rows and metric.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from pathlib import Path

import torch

from qkit.calibration.dataset import read_text
from qkit.runtime.loading import load, load_tokenizer
from qkit.workflows.quantize import Request, quantize
from qkit.evaluation.metrics import nll_windows

ROWS = (  # scheme, method, group size, llm-compressor 0.14
    ("w4a16", "rtn", None, 38.93),
    ("w4a16", "gptq", None, 38.62),
    ("w3a16", "rtn", None, 41.59),
    ("w3a16", "gptq", None, 40.14),
    ("w2a16", "gptq", 64, 52.47),
    ("w8a8", "smoothquant+gptq", None, 38.29),
    ("w4a8", "gptq", None, 38.64),
    ("nvfp4a16", "rtn", None, 38.68),
    ("nvfp4a16", "gptq", None, 38.53),
    ("nvfp4", "gptq", None, 39.39),
    ("mxfp4a16", "rtn", None, 39.01),
    ("fp8_dynamic", "rtn", None, 38.39),
)


class Silent:
    """No progress output."""

    def start(self, what: str, total: int) -> None:
        """A new phase."""

    def step(self, amount: int = 1) -> None:
        """Part of a phase."""


def main() -> None:
    """Quantize, reload and measure every row."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--calib", type=Path, help="default: the embedded text")
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--name", required=True)
    args = parser.parse_args()
    tokenizer = load_tokenizer(args.model)
    tokens = torch.tensor(tokenizer(read_text(args.text), add_special_tokens=False, verbose=False)["input_ids"])

    def perplexity(folder: object) -> float:
        with torch.inference_mode():
            return float(nll_windows(load(str(folder), dtype=torch.float32), tokens, 512, 200).mean().exp())

    table: list[dict[str, object]] = []
    reference = perplexity(args.model)
    for scheme, method, group, rival in ROWS:
        work = Path(tempfile.mkdtemp())
        report = quantize(
            Request(model=args.model, scheme=scheme, method=method, group_size=group, calib=args.calib),
            work / "out",
            Silent(),
        )
        row = {"scheme": scheme, "method": method, "group": group, "perplexity": perplexity(work / "out")}
        table.append({**row, "llm-compressor": rival, "bytes": report.bytes})
        shutil.rmtree(work)
        print(json.dumps(table[-1]), flush=True)
    result = {"model": args.name, "text": args.text.name, "reference": reference, "rows": table}
    result["calibration"] = "embedded" if args.calib is None else args.calib.name
    (Path(__file__).parent / f"{args.name}.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
