"""ReQuant at 3 bits against its base methods, and against the same bytes spent on more bits.

    python reports/requant/run.py --model DIR --calib FILE --text NAME=FILE .. --lines LINES --name tiny-llama

For each of rtn, awq and gptq: W3A16 in groups of 128; the same with ReQuant (0.45 % outliers, 0.05 % significant); W3A16
in groups of 64; and, for solvers alone, int3 and int4 mixed, with no more bytes of tensors than the ReQuant file has. "rtn
with rows": with calibration rows, by which it weighs its scale search, as ReQuant has them; one weight is put back.
Everything is made by the command line, loaded back from disk and measured in 200 windows of 512 tokens. LINES keeps the loss
of every window, so that a stopped run goes on; reports/requant/NAME.json gets perplexities, bytes, and paired differences
with 95 % intervals.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import torch

from qkit.calibration.dataset import read_text
from qkit.runtime.loading import load, load_tokenizer
from qkit.evaluation.metrics import nll_windows
from qkit.files.safefile import read_header

COMMAND = [sys.executable, "-c", "from qkit.commands import main; main()"]


def tensor_bytes(folder: Path) -> int:
    """Of all tensors."""
    return sum(i.nbytes for f in folder.glob("*.safetensors") for i in read_header(f).values())


def main() -> None:
    """Measure what is not measured yet."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--calib", type=Path, required=True)
    parser.add_argument("--text", action="append", required=True, metavar="NAME=FILE")
    parser.add_argument("--work", type=Path, required=True, help="Folder for checkpoints and profiles.")
    parser.add_argument("--lines", type=Path, required=True)
    parser.add_argument("--name", required=True)
    parser.add_argument("--windows", type=int, default=200)
    args = parser.parse_args()
    tokenizer = load_tokenizer(args.model)
    texts = {}
    for spec in args.text:
        name, _, file = spec.partition("=")
        ids = tokenizer(read_text(Path(file)), add_special_tokens=False, verbose=False)["input_ids"]
        texts[name] = torch.tensor(ids)
    done = {r["row"]: r for r in map(json.loads, args.lines.read_text().splitlines())} if args.lines.exists() else {}

    def measure(row: str, *options: str) -> None:
        if row in done:
            return
        out = args.work / row.replace(" ", "-").replace("+", "-")
        began = time.monotonic()
        if options:
            command = ["quantize", "--model", args.model, "--calib", str(args.calib), "--out", str(out), *options]
            subprocess.run([*COMMAND, *command], check=True, stdout=subprocess.DEVNULL)
        seconds = time.monotonic() - began
        model = load(str(out) if options else args.model, dtype=torch.float32)
        with torch.inference_mode():
            nll = {
                n: [round(x, 6) for x in nll_windows(model, t, 512, args.windows).mean(1).tolist()]
                for n, t in texts.items()
            }
        folder = out if options else Path(args.model)
        size = tensor_bytes(folder)
        headers = sum(f.stat().st_size for f in folder.glob("*.safetensors")) - size
        made = {"row": row, "bytes": size, "headers": headers, "seconds": round(seconds, 1), "options": options}
        done[row] = {**made, "nll": nll}
        with args.lines.open("a") as f:
            f.write(json.dumps(done[row]) + "\n")
        print(row, size, {k: round(float(np.exp(mean(v))), 3) for k, v in nll.items()}, flush=True)
        shutil.rmtree(out, ignore_errors=True)

    w3 = ("--scheme", "w3a16")
    measure("full precision")
    for method in ("rtn", "awq", "gptq"):
        measure(f"{method}", *w3, "--method", method)
        measure(f"requant+{method}", *w3, "--method", f"requant+{method}")
        measure(f"{method} g64", *w3, "--method", method, "--group-size", "64")
        if method == "rtn":  # which weighs its scale search by activations where rows were run; one weight is put back
            measure("rtn with rows", *w3, "--method", "rtn", "--significant", "0.00001")
        if method != "awq":
            size = done[f"requant+{method}"]["bytes"] + done[method]["headers"]  # --size counts headers too
            profile = (
                "--profile",
                str(args.work / f"{method}.profile"),
                "--candidates",
                "int3,int4",
                "--method",
                method,
            )
            measure(f"{method} int3/int4", "--size", f"{size}B", *profile)
    rows = table(done, list(texts))
    out = Path(__file__).resolve().parent / f"{args.name}.json"
    out.write_text(json.dumps(rows, indent=1) + "\n")


def table(done: dict[str, Any], texts: list[str]) -> list[dict[str, Any]]:
    """One row per checkpoint; under ReQuant also its difference to the rows of the same method, negative where it is better."""
    chance = np.random.default_rng(0)
    ppl: dict[str, dict[str, np.ndarray]] = {r: {} for r in done}
    for t in texts:
        windows = len(done["full precision"]["nll"][t])
        samples = [np.arange(windows), *(chance.integers(0, windows, windows) for _ in range(10_000))]
        for r, d in done.items():
            ppl[r][t] = np.exp([np.array(d["nll"][t])[s].mean() for s in samples])
    rows = []
    for name, d in done.items():
        row: dict[str, Any] = {"row": name, "bytes": d["bytes"], "seconds": d["seconds"]}
        row["perplexity"] = {t: round(float(ppl[name][t][0]), 3) for t in texts}
        method = name.removeprefix("requant+")
        for rival in [r for r in done if name != method and (r == method or r.startswith(method + " "))]:
            gap = {t: ppl[name][t] - ppl[rival][t] for t in texts}
            row[f"against {rival}"] = {
                t: [round(float(v), 3) for v in (g[0], *np.quantile(g[1:], (0.025, 0.975)))] for t, g in gap.items()
            }
        rows.append(row)
        print(json.dumps(row))
    return rows


if __name__ == "__main__":
    main()
