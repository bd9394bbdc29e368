"""Mixed GGUF files of a budget against llama.cpp's own mixes of types, at the bytes of those files.

    qkit profile --model DIR --candidates q2_k,q3_k,q4_k,q6_k --calib CALIB --out PROFILE [--measures ..]
    python reports/gguf/allocation.py --model DIR --name NAME --profile PROFILE --calib CALIB --text TEXT --tools BIN \\
        --work WORK [--mixes Q2_K,Q3_K_M,Q4_K_M] [--bits 2.7,3.5,4.5] [--measures kl,pqi,..] [--samples 128] [--windows 40]

BIN holds llama-quantize and llama-imatrix. The model becomes a GGUF file in its own 16 bits; llama-quantize makes its mixes of
that, without and with an importance matrix of as many calibration tokens as qkit gets. For the size of each mix, and for the
bits of --bits (all bytes of the file over all weights), qkit allocates within that size by every measure asked for, and
quantizes with gptq (for bits by the first measure alone). Files are read by the library gguf, whoever wrote them, and compared in float32 with the original in the
first windows of 512 tokens of the text: KL divergence, perplexity, and the paired difference to the mix at the same bytes, with
95 % intervals over windows. WORK keeps the files and a line for each: a stopped run goes on. reports/gguf/allocation-NAME.json
gets the figures.
"""

from __future__ import annotations

import argparse
import json
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from plain_files import decoded, write_source
from torch import Tensor

from qkit.allocation.limits import Budget, BudgetRequest
from qkit.calibration.dataset import read_text, token_ids
from qkit.evaluation.metrics import Interval, bootstrap_ci, compare_windows, perplexity, perplexity_change
from qkit.families.structure import ModelStructure
from qkit.files.gguf_container import MODEL
from qkit.planning.request import Request
from qkit.runtime.loading import load, load_tokenizer
from qkit.workflows.budget import allocate_budget
from qkit.workflows.quantize import open_structure, quantize

HERE = Path(__file__).resolve().parent
WINDOW = 512


class Silent:
    """No progress output."""

    def start(self, what: str, total: int) -> None:
        """A new phase."""

    def step(self, amount: int = 1) -> None:
        """Part of a phase."""


@dataclass(frozen=True)
class Entry:
    """One file. who: qkit or llama.cpp; name: of the mix or the measure; against: the mix whose bytes it was given"""

    who: str
    name: str
    against: str
    path: Path


def llama_files(args: argparse.Namespace, structure: ModelStructure) -> list[Entry]:
    """llama.cpp's mixes, made where they are missing."""
    source, matrix = args.work / "source.gguf", args.work / "imatrix.gguf"
    if not source.exists():
        write_source(structure, source)
    if not matrix.exists():
        line = [str(args.tools / "llama-imatrix"), "-m", str(source), "-f", str(args.calib), "-o", str(matrix), "-t", "1"]
        line += ["-c", str(args.seqlen), "-b", str(args.seqlen), "--chunks", str(args.samples), "--no-ppl"]
        subprocess.run([*line, "--process-output"], check=True, capture_output=True)
    entries = []
    for mix in args.mixes:
        for suffix, more in (("", []), (" imatrix", ["--imatrix", str(matrix)])):
            path = args.work / f"{mix}{suffix.replace(' ', '-')}.gguf"
            if not path.exists():
                line = [str(args.tools / "llama-quantize"), *more, str(source), str(path), mix, "1"]
                subprocess.run(line, check=True, capture_output=True)
            entries.append(Entry("llama.cpp", f"{mix}{suffix}", mix, path))
    return entries


def qkit_file(args: argparse.Namespace, size: int, measure: str, name: str) -> Path:
    """The file of a budget, made where it is missing."""
    out = args.work / f"qkit-{name}-{measure}"
    if not (out / MODEL).exists():
        request = Request(
            model=args.model, method="gptq", calib=args.calib, samples=args.samples, seqlen=args.seqlen, threads=args.threads
        )
        budget = BudgetRequest(budget=Budget(size=size), profile=args.profile, measure=measure, named=True)
        quantize(allocate_budget(request, budget, Silent()).request, out, Silent())
    if (out / MODEL).stat().st_size > size:
        raise SystemExit(f"{out}: the file is larger than the {size} bytes that it was given")
    return out / MODEL


@torch.inference_mode()
def measured(args: argparse.Namespace, structure: ModelStructure, entry: Entry, original: Any, tokens: Tensor) -> dict[str, Any]:
    """The means of every window of a file; read from WORK where they are there."""
    lines = args.work / f"windows-{args.windows}.jsonl"
    key = f"{entry.who} {entry.name} {entry.path.stat().st_size}"
    for line in lines.read_text().splitlines() if lines.exists() else []:
        if json.loads(line)["key"] == key:
            return dict(json.loads(line))
    model = load(args.model, dtype=torch.float32)
    model.load_state_dict(decoded(structure, entry.path)[0], strict=False)
    found = compare_windows(original, model, tokens, WINDOW, args.windows)
    kinds: dict[str, int] = {}
    for t in gguf.GGUFReader(entry.path).tensors:
        if len(t.shape) > 1:
            kinds[t.tensor_type.name] = kinds.get(t.tensor_type.name, 0) + 1
    pairs = (("original", found.reference), ("nll", found.approx), ("kl", found.kl))
    data = {"key": key, "types": kinds, **{k: v.mean(1).tolist() for k, v in pairs}}
    with lines.open("a") as file:
        file.write(json.dumps(data) + "\n")
    return data


def shown(x: Interval) -> list[float]:
    """The mean and its interval, to five digits."""
    return [float(f"{v:.5g}") for v in (x.mean, x.low, x.high)]


def row(entry: Entry, data: dict[str, Any], rivals: dict[str, dict[str, Any]], weights: int) -> dict[str, Any]:
    """The figures of a file. rivals: data of the mixes at the same bytes, by name"""
    size = entry.path.stat().st_size
    nll, kl = (torch.tensor(data[k], dtype=torch.float64) for k in ("nll", "kl"))
    figures = {
        "who": entry.who, "name": entry.name, "against": entry.against, "bytes": size, "bits": round(8 * size / weights, 4),
        "types": data["types"], "kl": shown(bootstrap_ci(kl)), "perplexity": shown(perplexity(nll[:, None])),
    }  # fmt: skip
    if entry.who == "qkit":
        for name, rival in rivals.items():
            other_nll, other_kl = (torch.tensor(rival[k], dtype=torch.float64) for k in ("nll", "kl"))
            figures[f"to {name}"] = {
                "kl ratio": float(f"{kl.mean() / other_kl.mean():.4g}"),
                "kl difference": shown(bootstrap_ci(kl - other_kl)),
                "perplexity change": shown(perplexity_change(other_nll[:, None], nll[:, None])),
            }
    return figures


def main() -> None:
    """Makes, measures and writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("model", "name"):
        parser.add_argument(f"--{name}", required=True)
    for name in ("profile", "calib", "text", "tools", "work"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    for name, default in (("mixes", "Q2_K,Q3_K_M,Q4_K_M"), ("bits", ""), ("measures", "kl")):
        parser.add_argument(f"--{name}", type=lambda text: [x for x in text.split(",") if x], default=default)
    for name, number in (("samples", 128), ("seqlen", 256), ("windows", 40), ("threads", 1)):
        parser.add_argument(f"--{name}", type=int, default=number)
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    structure = open_structure(args.model)
    weights = sum(int(np.prod(t.shape)) for n, t in structure.checkpoint.tensors.items() if n not in structure.tied)
    original = load(args.model, dtype=torch.float32)
    tokens = torch.tensor(token_ids(load_tokenizer(Path(args.model)), read_text(args.text)))
    rows, mixes = [], llama_files(args, structure)
    theirs = {e.name: measured(args, structure, e, original, tokens) for e in mixes}
    rows += [row(e, theirs[e.name], {}, weights) for e in mixes]
    goals = [(mix, mix, next(e.path.stat().st_size for e in mixes if e.name == mix)) for mix in args.mixes]
    goals += [(f"{bits} bits", "", int(float(bits) * weights / 8)) for bits in args.bits]
    for name, against, size in goals:
        for measure in args.measures if against else args.measures[:1]:
            path = qkit_file(args, size, measure, name.replace(" ", "-"))
            entry = Entry("qkit", f"{name} by {measure}", against, path)
            rivals = {n: d for n, d in theirs.items() if against and n.split(" ")[0] == against}
            rows.append(row(entry, measured(args, structure, entry, original, tokens), rivals, weights))
            print(json.dumps(rows[-1]), flush=True)
    made = {"model": args.name, "weights": weights, "text": args.text.name, "windows": args.windows, "window": WINDOW,
            "calibration": f"{args.samples} x {args.seqlen}", "files": rows}  # fmt: skip
    (HERE / f"allocation-{args.name}.json").write_text(json.dumps(made, indent=1) + "\n")


if __name__ == "__main__":
    main()
