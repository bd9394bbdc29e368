"""Perplexity of packed mixed checkpoints under a budget: measures, refinement, random plans and uniform formats.

    qkit profile --model DIR --candidates int2,int3,int4,int8 --group-size 64 --calib CALIB \\
        --measures weight,output,first,fisher,pqi,loss,kl --out PROFILE
    python reports/allocation/run.py --model DIR --calib CALIB --text W=FILE --text H=FILE --profile PROFILE \\
        --lines LINES --name tiny-llama

Every plan is quantized with the profile's solver, written, proven, loaded back and measured. LINES gets one line per plan, with
the loss of every window, and plans that are there are left out: a stopped run goes on. reports/allocation/NAME.json gets the
table: perplexities, and by how much the refined plan is below each rival plan, with the 95 % interval of that difference
(windows resampled, the same for both: the windows differ far more from each other than the plans do).
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import tempfile
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np
import torch

from qkit.allocation.limits import Budget
from qkit.allocation.allocate import allocate, limit_bytes, outliers, rules
from qkit.workflows.budget import BudgetRequest, allocate_budget
from qkit.calibration.dataset import read_text
from qkit.runtime.loading import load, load_tokenizer
from qkit.workflows.quantize import Request, quantize
from qkit.evaluation.metrics import nll_windows
from qkit.sensitivity.profile import Profile


class Silent:
    """No progress output."""

    def start(self, what: str, total: int) -> None:
        """A new phase."""

    def step(self, amount: int = 1) -> None:
        """Part of a phase."""


def random_plan(made: Profile, limit: int, seed: int) -> dict[str, str]:
    """Units raised in random order from the smallest format, a step at a time, as long as the bytes fit."""
    chance = random.Random(seed)
    sizes = {u.key: sorted((c.bytes, n) for n, c in u.choices.items()) for u in made.units}
    level = dict.fromkeys(sizes, 0)
    used = sum(s[0][0] for s in sizes.values())
    open_ = list(sizes)
    while open_:
        key = chance.choice(open_)
        now = level[key]
        if now + 1 == len(sizes[key]) or used + sizes[key][now + 1][0] - sizes[key][now][0] > limit:
            open_.remove(key)
            continue
        used += sizes[key][now + 1][0] - sizes[key][now][0]
        level[key] += 1
    return {key: sizes[key][i][1] for key, i in level.items()}


def main() -> None:
    """Measure what is not measured yet."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--calib", type=Path, required=True)
    parser.add_argument("--text", action="append", required=True, metavar="NAME=FILE")
    parser.add_argument("--profile", type=Path, required=True)
    parser.add_argument("--lines", type=Path, required=True)
    parser.add_argument("--name", required=True)
    parser.add_argument("--bits", default="2.5,3.0,3.5,4.25")
    parser.add_argument("--measures", default="weight,pqi,kl")
    parser.add_argument("--refine", type=int, default=40)
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--windows", type=int, default=200)
    args = parser.parse_args()
    made = Profile.load(args.profile)
    tokenizer = load_tokenizer(args.model)
    texts = {}
    for spec in args.text:
        name, _, file = spec.partition("=")
        ids = tokenizer(read_text(Path(file)), add_special_tokens=False, verbose=False)["input_ids"]
        texts[name] = torch.tensor(ids)
    done = {json.loads(line)["plan"] for line in args.lines.read_text().splitlines()} if args.lines.exists() else set()

    def measure(plan: str, picks: dict[str, str], predicted: dict[str, float]) -> None:
        if plan in done:
            return
        work = Path(tempfile.mkdtemp())
        chosen = tuple(rules(made, picks))
        scheme = next((r["scheme"] for r in chosen if "scheme" in r), None)
        if scheme is not None:
            kept = outliers(made, picks)
            request = Request(
                model=args.model,
                scheme=scheme,
                method=made.request["method"],
                calib=args.calib,
                rules=chosen,
                outliers=kept,
            )
            quantize(request, work / "out", Silent())
        model = load(str(work / "out") if scheme else args.model, dtype=torch.float32)
        nll = {}
        with torch.inference_mode():
            for name, tokens in texts.items():
                nll[name] = [round(x, 6) for x in nll_windows(model, tokens, 512, args.windows).mean(1).tolist()]
        shutil.rmtree(work)
        size = sum(u.choices[picks[u.key]].bytes for u in made.units)
        bits = 8 * size / sum(u.weights for u in made.units)
        line = {"plan": plan, "bits": bits, "bytes": size, "predicted": predicted, "nll": nll}
        with args.lines.open("a") as f:
            f.write(json.dumps(line) + "\n")
        print(plan, f"{bits:.3f}", {k: round(float(np.exp(mean(v))), 3) for k, v in nll.items()}, flush=True)

    for name in made.candidates:
        measure(f"uniform {name}", {u.key: name for u in made.units}, {})
    for bits in map(float, args.bits.split(",")):
        limit = limit_bytes(made, Budget(bits=bits), 0)
        for name in args.measures.split(","):
            found = allocate(made, limit, name)
            measure(f"{bits} {name}", found.picks, {name: found.cost})
        if args.refine and f"{bits} refined" not in done:
            base = Request(model=args.model, method=made.request["method"], calib=args.calib)
            wanted = BudgetRequest(
                budget=Budget(bits=bits), profile=args.profile, measure="kl", evaluations=args.refine
            )
            best = allocate_budget(base, wanted, Silent())
            assert best.refined is not None
            measure(f"{bits} refined", best.allocation.picks, {"kl, measured": best.refined.end})
        for seed in range(args.seeds):
            measure(f"{bits} random {seed}", random_plan(made, limit, seed), {})
    table = summary(args.lines, [float(b) for b in args.bits.split(",")], list(texts))
    described = {"candidates": made.candidates, "made with": made.request, "base loss": made.base_loss}
    out = Path(__file__).resolve().parent / f"{args.name}.json"
    out.write_text(json.dumps({**described, **table}, indent=1) + "\n")


def summary(file: Path, budgets: list[float], texts: list[str]) -> dict[str, Any]:
    """Per budget and text: perplexity of each kind of plan, and what the refined plan is below the rivals, with intervals."""
    lines = {r["plan"]: r for r in map(json.loads, file.read_text().splitlines())}
    uniform = sorted((r["bits"], n) for n, r in lines.items() if n.startswith("uniform"))
    found: dict[str, Any] = {"uniform": {}, "budgets": []}
    chance = np.random.default_rng(0)
    for text in texts:
        windows = len(next(iter(lines.values()))["nll"][text])
        samples = [np.arange(windows), *(chance.integers(0, windows, windows) for _ in range(10_000))]
        # One perplexity per resampling of the windows; the first is that of all windows as they are.
        nll = {n: np.array(r["nll"][text]) for n, r in lines.items()}
        resampled = {n: np.exp(np.array([x[s].mean() for s in samples])) for n, x in nll.items()}
        found["uniform"][text] = {n: [round(b, 3), round(float(resampled[n][0]), 3)] for b, n in uniform}
        for bits in budgets:
            kinds = {n.split(" ", 1)[1]: x for n, x in resampled.items() if n.startswith(f"{bits} ")}
            random_ = [kinds.pop(k) for k in list(kinds) if k.startswith("random")]
            if random_:
                kinds["random, mean"] = np.mean(random_, axis=0)
            below = [(b, n) for b, n in uniform if b <= bits + 1e-9]
            above = [(b, n) for b, n in uniform if b >= bits - 1e-9]
            if below and above:
                (b0, n0), (b1, n1) = below[-1], above[0]
                t = 0.0 if b0 == b1 else (bits - b0) / (b1 - b0)
                kinds["uniform, interpolated"] = (1 - t) * resampled[n0] + t * resampled[n1]
            row: dict[str, Any] = {"bits": bits, "text": text}
            row["perplexity"] = {k: round(float(x[0]), 3) for k, x in kinds.items()}
            if len(random_) > 1:
                row["random, standard deviation"] = round(stdev(float(x[0]) for x in random_), 3)
            best = kinds.get("refined")
            if best is not None:
                gains = {k: x - best for k, x in kinds.items() if k != "refined"}
                row["refined is below by"] = {
                    k: [round(float(v), 3) for v in (g[0], *np.quantile(g[1:], (0.025, 0.975)))]
                    for k, g in gains.items()
                }
            found["budgets"].append(row)
            print(json.dumps(row))
    return found


if __name__ == "__main__":
    main()
