"""Answers about held-out scenes after quantization: methods, widths and calibration seeds, each from its packed checkpoint.

    python reports/vlm/run.py --model tiny-vlm --text CALIB.txt --lines LINES --name tiny-vlm [--questions 2000] [--seeds 3]

LINES gets one line per run, with every question's result, and runs that are there are left out: a stopped report goes on.
reports/vlm/NAME.json gets the table: accuracy and divergence of answers as means over the seeds, and by how much MBQ differs
from AWQ on the same questions, with the 95 % interval of that difference over questions (each the mean of the seeds).
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch

from qkit.calibration.dataset import KINDS
from qkit.evaluation.image_text import score_questions
from qkit.runtime.loading import load
from qkit.files.locate import find_model
from qkit.calibration.options import DRAWN
from qkit.calibration.image_text import load_processor
from qkit.workflows.quantize import Request, prepare, quantize
from qkit.evaluation.metrics import Interval, bootstrap_ci, ratio_ci
from qkit.transforms.balance import gradients, ratios

SETTINGS = {"W4A8": ("w4a8", None), "W3A16 g64": ("w3a16", 64), "W2A16 g64": ("w2a16", 64), "W2A16 g32": ("w2a16", 32)}
METHODS = ("rtn", "awq (text)", "awq", "gptq", "mbq-mse", "mbq", "mbq+gptq", "auto", "signround")
PAIRS = (
    ("mbq", "awq"),
    ("mbq-mse", "awq"),
    ("mbq", "awq (text)"),
    ("mbq+gptq", "gptq"),
    ("auto", "gptq"),
    ("signround", "gptq"),
)


class Silent:
    """No progress output."""

    def start(self, what: str, total: int) -> None:
        """A new phase."""

    def step(self, amount: int = 1) -> None:
        """Part of a phase."""


def one(model: Path, setting: str, method: str, seed: int, args: argparse.Namespace) -> dict[str, Any]:
    """Quantize, write, prove, load back, ask. Per question: right or not, sums of loss and divergence over its answer."""
    scheme, group = SETTINGS[setting]
    calib = args.text if "text" in method else None
    asked = method.partition(" ")[0]
    # Another seed is other scenes; of a text, which has no seed, other rows.
    if calib is not None and seed:
        whole = args.text.read_text(encoding="utf-8")
        calib = Path(args.work) / f"text{seed}.txt"
        calib.write_text(whole[seed * len(whole) // args.seeds :], encoding="utf-8")
    request = Request(
        model=str(model),
        scheme=scheme,
        method=asked,
        group_size=group,
        calib=calib,
        samples=args.samples,
        seqlen=128,
        seed=seed,
    )
    out = Path(tempfile.mkdtemp(dir=args.work)) / "out"
    quantize(request, out, Silent())
    found = score_questions(
        load(out, dtype=torch.float32), load_processor(model), DRAWN, args.questions, load(model, dtype=torch.float32)
    )
    size = (out / "model.safetensors").stat().st_size
    shutil.rmtree(out.parent)
    means = {k: sum(a.errors[k] for a in found) / len(found) for k in KINDS if k in found[0].errors}
    return {
        "setting": setting, "method": method, "seed": seed, "bytes": size,
        "kind": [a.kind for a in found], "tokens": [len(a.ours.nll) for a in found],
        "right": [a.ours.right for a in found], "before": [a.theirs.right for a in found],
        "nll": [round(float(a.ours.nll.sum()), 6) for a in found], "kl": [round(float(a.kl.sum()), 7) for a in found],
        "errors": means,
    }  # fmt: skip


def table(lines: list[dict[str, Any]]) -> dict[str, Any]:
    """Means over seeds by setting and method, and the differences of PAIRS."""
    by: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for line in lines:
        by.setdefault((line["setting"], line["method"]), []).append(line)

    def mean(runs: list[dict[str, Any]], field: str) -> torch.Tensor:
        return torch.tensor([r[field] for r in runs], dtype=torch.float64).mean(0)

    def interval(value: Interval) -> list[float]:
        return [round(value.mean, 5), *(round(x, 5) for x in value.ends)]

    rows, differences = [], []
    for (setting, method), runs in by.items():
        tokens, right, kl = mean(runs, "tokens"), mean(runs, "right"), mean(runs, "kl")
        kinds = runs[0]["kind"]
        of = {k: [i for i, x in enumerate(kinds) if x == k] for k in sorted(set(kinds))}
        rows.append(
            {
                "setting": setting, "method": method, "seeds": len(runs), "bytes": runs[0]["bytes"],
                "accuracy": interval(bootstrap_ci(100 * right)),
                "accuracy_each": [round(100 * sum(r["right"]) / len(r["right"]), 2) for r in runs],
                "original": round(100 * float(mean(runs, "before").mean()), 2), "kl": interval(ratio_ci(kl, tokens)),
                "kl_each": [round(sum(r["kl"]) / sum(r["tokens"]), 5) for r in runs],
                "perplexity": round(float((mean(runs, "nll").sum() / tokens.sum()).exp()), 4),
                "errors": {k: round(sum(r["errors"][k] for r in runs) / len(runs), 5) for k in runs[0]["errors"]},
                "kinds": {k: round(100 * float(right[at].mean()), 1) for k, at in of.items()},
            }
        )  # fmt: skip
    for setting in dict.fromkeys(s for s, _ in by):
        for a, b in PAIRS:
            if (setting, a) in by and (setting, b) in by:
                first, second = by[setting, a], by[setting, b]
                tokens = mean(first, "tokens")
                differences.append(
                    {
                        "setting": setting, "of": a, "against": b,
                        "accuracy": interval(bootstrap_ci(100 * (mean(first, "right") - mean(second, "right")))),
                        "kl": interval(ratio_ci(mean(first, "kl") - mean(second, "kl"), tokens)),
                    }
                )  # fmt: skip
    return {"rows": rows, "differences": differences}


def imbalance(model: Path, samples: int) -> list[dict[str, Any]]:
    """By block and part: mean absolute gradients at pictures and at answers, their ratio, and with the floor."""
    found = prepare(Request(model=str(model), scheme="w4a16", method="mbq", samples=samples))
    assert found.plan.calibration is not None
    each = gradients(load(model, dtype=torch.float32), found.structure, found.plan.calibration)
    return [
        {"block": i, "part": part, "vision": v, "answer": a, "ratio": round(v / a, 4), "used": round(r[part], 4)}
        for i, (block, r) in enumerate(zip(each, ratios(each), strict=True))
        for part, (v, a) in block.items()
    ]


def main() -> None:
    """All runs that are not there yet, then the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--lines", type=Path, required=True)
    parser.add_argument("--name", required=True)
    parser.add_argument("--questions", type=int, default=2000)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--settings", default=",".join(SETTINGS))
    parser.add_argument("--work", default=None)
    args = parser.parse_args()
    args.work = args.work or tempfile.mkdtemp()
    model = find_model(args.model)
    lines = [json.loads(x) for x in args.lines.read_text().splitlines()] if args.lines.exists() else []
    done = {(x["setting"], x["method"], x["seed"]) for x in lines}
    for seed in range(args.seeds):
        for setting in args.settings.split(","):
            for method in METHODS:
                if (setting, method, seed) in done or (seed and method == "rtn"):  # rounding needs no rows
                    continue
                lines.append(one(model, setting, method, seed, args))
                with args.lines.open("a") as f:
                    f.write(json.dumps(lines[-1]) + "\n")
                accuracy = 100 * sum(lines[-1]["right"]) / len(lines[-1]["right"])
                print(
                    setting,
                    method,
                    seed,
                    f"{accuracy:.2f} %",
                    f"KL {sum(lines[-1]['kl']) / sum(lines[-1]['tokens']):.4f}",
                )
    result = {"questions": args.questions, "imbalance": imbalance(model, args.samples), **table(lines)}
    Path(__file__).with_name(f"{args.name}.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
