"""KV caches side by side: perplexity by decoding past a prompt, true bytes, and what the allocation of widths is worth.

    python reports/kvcache/train.py --model DIR --text train.txt.xz --out LONG
    python reports/kvcache/run.py --model LONG --calib FILE --text NAME=FILE --name tiny-llama-long

Windows of 2,048 tokens: a prompt of 1,024, then the rest in steps, each of which reads the cache. 'direct 2' has the layout of
pm-kvq:2 and a body of 2 bits from the first token on. 'pm-kvq:4-2' shares the bytes in the middle between all layers at 4 bits and
all at 2 out by sensitivity (rows of 512 tokens, at positions 0, 1, 2, .. and stretched by 4); 'equal budgets' gives every
layer the same share of them, 'least sensitive first' shares them out the wrong way round. Writes reports/kvcache/NAME.json and
NAME.png (bits of each layer over time) after every text.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path

import torch

from qkit.allocation.knapsack import Choice, solve
from qkit.calibration.dataset import calibration_rows
from qkit.evaluation.decoding import evaluate_caches
from qkit.evaluation.sources import read_text
from qkit.evaluation.text import tokenize
from qkit.kvcache.cache import with_budgets
from qkit.kvcache.shape import CacheShape
from qkit.kvcache.policy import CachePolicy, parse
from qkit.kvcache.sensitivity import sensitivities
from qkit.runtime.loading import load, load_tokenizer

WINDOW, PROMPT, ROWS, SEQLEN = 2048, 1024, 16, 512
PLAIN = (
    "pm-kvq:2",
    "pm-kvq:4",
    "kivi2",
    "kivi4",
    "int2",
    "int3",
    "int4",
    "int8",
    "fp8",
    "rotate2",
    "rotate4",
    "hierarchical8",
    "xquant2",
    "xquant4",
    "xquant-cl2",
    "xquant-cl3",
    "xquant-cl4",
)


def allocated(model: object, costs: torch.Tensor, memory: int, widths: tuple[int, ...]) -> CachePolicy:
    """The policy that shares the memory out by these costs [layers, widths]."""
    policy, heads = parse("pm-kvq:" + "-".join(map(str, widths))), CacheShape.of(model)
    sizes = [heads.bytes_at(policy, w, WINDOW) for w in widths]
    units = [
        [Choice(str(w), float(c), {"bytes": s}) for w, c, s in zip(widths, row, sizes, strict=True)] for row in costs
    ]
    picks = solve(units, {"bytes": memory}).picks
    return with_budgets(replace(policy, finals=tuple(widths[i] for i in picks)), model, WINDOW)


def upside_down(costs: torch.Tensor) -> torch.Tensor:
    """Costs by which the least sensitive layers get the wider caches."""
    return torch.stack([torch.zeros(len(costs)).double(), 1 / (costs[:, 1] - costs[:, 0])], dim=1)


def figure(found: dict, file: Path, layers: int) -> None:
    """Bits of each layer against tokens, for the caches whose widths change."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    shown = [n for n, f in found.items() if len({w for _, _, w in f["halvings"]}) > 1]
    drawing = Figure(figsize=(4 * len(shown), 3), layout="constrained")
    for i, name in enumerate(shown):
        axes = drawing.add_subplot(1, len(shown), i + 1)
        for layer in range(layers):
            steps = [(t, w) for t, n, w in found[name]["halvings"] if n == layer]
            times = [t for t, _ in steps] + [WINDOW]
            axes.step(times, [w for _, w in steps] + [steps[-1][1]], where="post", label=f"layer {layer}", alpha=0.7)
        axes.set(title=name, xlabel="tokens", ylabel="bits of the body", yscale="log", yticks=[2, 4, 8, 16])
        axes.set_yticklabels(["2", "4", "8", "16"])
    FigureCanvasAgg(drawing).print_png(str(file))


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--calib", type=Path, required=True)
    parser.add_argument("--text", action="append", required=True, metavar="NAME=FILE")
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--step", type=int, default=4)
    parser.add_argument("--name", required=True)
    args = parser.parse_args()
    model, tokenizer = load(args.model, dtype=torch.float32), load_tokenizer(args.model)
    rows = calibration_rows(args.calib, tokenizer, ROWS, SEQLEN, model.config.vocab_size).tokens
    heads, widths = CacheShape.of(model), (4, 2)
    costs = {stretch: sensitivities(model, rows, widths, stretch=stretch) for stretch in (1, 4)}
    base = parse("pm-kvq:4-2")
    memory = heads.layers * sum(heads.bytes_at(base, w, WINDOW) for w in widths) // 2
    equal = with_budgets(parse("pm-kvq:2"), model, WINDOW)
    policies = {name: parse(name) for name in PLAIN} | {
        "direct 2": replace(parse("pm-kvq:2"), start=2),
        "pm-kvq:4-2": allocated(model, costs[1], memory, widths),
        "pm-kvq:4-2, stretched": allocated(model, costs[4], memory, widths),
        "equal budgets": replace(equal, budgets=(memory // heads.layers,) * heads.layers),
        "least sensitive first": allocated(model, upside_down(costs[1]), memory, widths),
    }
    path = Path(__file__).resolve().parent / f"{args.name}.json"
    result = {
        "windows": args.windows, "window": WINDOW, "prompt": PROMPT, "step": args.step,
        "sensitivity": {str(k): v.tolist() for k, v in costs.items()},
        "finals": {n: p.finals for n, p in policies.items() if p.finals}, "texts": {},
    }  # fmt: skip
    for spec in args.text:
        name, _, file = spec.partition("=")
        tokens = tokenize(tokenizer, read_text(file))
        found = evaluate_caches(
            model, tokens, WINDOW, args.windows, PROMPT, policies, args.step,
            lambda what, done, total, name=name: print(name, what, done, total, flush=True),
        )  # fmt: skip
        result["texts"][name] = found
        path.write_text(json.dumps(result, indent=1) + "\n")
        figure(found, path.with_suffix(".png"), heads.layers)
        for cache, f in found.items():
            change = (
                f"{f['change_percent']:+.2f} [{f['change_ci'][0]:+.2f}, {f['change_ci'][1]:+.2f}]"
                if "change_ci" in f
                else ""
            )
            print(f"{cache:<24} {f['perplexity']:8.3f} {f['first_half']:8.3f} {f['share']:.3f} {change}")


if __name__ == "__main__":
    main()
