"""Perplexity of packed mixed checkpoints under a budget: measures, refinement, random plans and uniform formats.

    qkit profile --model DIR --candidates int2,int3,int4,int8 --group-size 64 --calib CALIB \\
        --measures weight,output,first,fisher,pqi,loss,kl --out PROFILE
    python reports/allocation/run.py --model DIR --calib CALIB --text W=FILE --text H=FILE --profile PROFILE --name tiny-llama

Every plan is quantized with the profile's solver, written, proven, loaded back and measured. Appends one line per plan to
reports/allocation/NAME.jsonl and leaves out those that are there: a stopped run goes on.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import shutil
import tempfile
from pathlib import Path

import torch

from qkit.allocation.allocate import Budget, allocate, limit_bytes, rules
from qkit.budgeting import BudgetRequest, allocated
from qkit.calibration import read_text
from qkit.loading import load, load_tokenizer
from qkit.pipeline import Request, quantize
from qkit.quality import nll_windows, perplexity
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
    out = Path(__file__).resolve().parent / f"{args.name}.jsonl"
    done = {json.loads(line)["plan"] for line in out.read_text().splitlines()} if out.exists() else set()

    def measure(plan: str, picks: dict[str, str], predicted: dict[str, float]) -> None:
        if plan in done:
            return
        work = Path(tempfile.mkdtemp())
        chosen = tuple(rules(made, picks))
        scheme = next(r["scheme"] for r in chosen if "scheme" in r)
        request = Request(args.model, scheme, made.request["method"], calib=args.calib, rules=chosen)
        quantize(request, work / "out", Silent())
        model = load(str(work / "out"), dtype=torch.float32)
        figures = {}
        with torch.inference_mode():
            for name, tokens in texts.items():
                nll = nll_windows(model, tokens, 512, args.windows)
                found = perplexity(nll)
                figures[name] = {"perplexity": found.mean, "ci": [found.low, found.high]}
        shutil.rmtree(work)
        size = sum(u.choices[picks[u.key]].bytes for u in made.units)
        bits = 8 * size / sum(u.weights for u in made.units)
        line = {"plan": plan, "bits": bits, "bytes": size, "predicted": predicted, "texts": figures}
        with out.open("a") as f:
            f.write(json.dumps(line) + "\n")
        print(plan, f"{bits:.3f}", {k: round(v["perplexity"], 3) for k, v in figures.items()}, flush=True)

    for name in made.candidates:
        measure(f"uniform {name}", {u.key: name for u in made.units}, {})
    for bits in map(float, args.bits.split(",")):
        limit = limit_bytes(made, Budget(bits=bits), 0)
        for name in args.measures.split(","):
            found = allocate(made, limit, name)
            measure(f"{bits} {name}", found.picks, {name: found.cost})
        if args.refine and f"{bits} refined" not in done:
            base = Request(args.model, method=made.request["method"], calib=args.calib)
            wanted = BudgetRequest(Budget(bits=bits), args.profile, measure="kl", evaluations=args.refine)
            best = allocated(base, wanted, Silent())
            assert best.refined is not None
            measure(f"{bits} refined", best.allocation.picks, {"kl, measured": best.refined.end})
        for seed in range(args.seeds):
            measure(f"{bits} random {seed}", random_plan(made, limit, seed), {})
    summary(out, made, [float(b) for b in args.bits.split(",")], list(texts))


def summary(out: Path, made: Profile, budgets: list[float], texts: list[str]) -> None:
    """Print the table: per budget and text, each kind of plan, random ones as mean and deviation, uniform ones interpolated."""
    lines = {r["plan"]: r for r in map(json.loads, out.read_text().splitlines())}
    uniform = sorted((r["bits"], r) for n, r in lines.items() if n.startswith("uniform"))
    for bits in budgets:
        for text in texts:
            row = {}
            for name, r in lines.items():
                if name.startswith(f"{bits} ") and "random" not in name:
                    row[name.split(" ", 1)[1]] = r["texts"][text]["perplexity"]
            chance = [r["texts"][text]["perplexity"] for n, r in lines.items() if n.startswith(f"{bits} random")]
            if chance:
                mean = sum(chance) / len(chance)
                row["random"] = mean
                row["random, sd"] = math.sqrt(sum((x - mean) ** 2 for x in chance) / max(1, len(chance) - 1))
            below = [(b, r) for b, r in uniform if b <= bits]
            above = [(b, r) for b, r in uniform if b >= bits]
            if below and above:
                (b0, r0), (b1, r1) = below[-1], above[0]
                p0, p1 = r0["texts"][text]["perplexity"], r1["texts"][text]["perplexity"]
                row["uniform, interpolated"] = p0 if b0 == b1 else p0 + (p1 - p0) * (bits - b0) / (b1 - b0)
            print(bits, text, {k: round(v, 3) for k, v in row.items()})


if __name__ == "__main__":
    main()
