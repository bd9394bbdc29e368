r"""What KV caches keep of a long context: facts asked for, by depth, length and cache.

    python reports/kvcache/train.py --model LONG --text train.txt.xz --out DIR --length 128 --batch 4 --retrieval 0.75 \
        --rate 1e-3 --steps 1000
    python reports/kvcache/retrieval.py --model DIR --text NAME=FILE [--window 1024] [--windows 8] [--name retrieval]

Writes reports/kvcache/retrieval.json, with the figures of ``qkit.evaluation.retrieval``, and retrieval.png: for each task and
length, by depth, the nats a token that the true answer is less likely where the fact was another, and how often it is the
likeliest of the choices (dotted: chance).
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

import torch

from qkit.evaluation.retrieval import evaluate_retrieval
from qkit.evaluation.sources import read_text
from qkit.evaluation.text import tokenize
from qkit.kvcache.policy import parse
from qkit.runtime.loading import load, load_tokenizer

CACHES = "int8,pm-kvq:2,kivi2,int2"


def figure(found: dict, file: Path) -> None:
    """Gain above, choices below; a column for each task and length."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = list(dict.fromkeys((r["task"], r["length"]) for r in found["none"]))
    drawing = Figure(figsize=(3 * len(columns), 5.5), layout="constrained")
    axes = drawing.subplots(2, len(columns), sharex=True, sharey="row", squeeze=False)
    for i, (task, length) in enumerate(columns):
        for name, rows in found.items():
            here = [r for r in rows if (r["task"], r["length"]) == (task, length)]
            depths = [r["depth"] for r in here]
            label = "plain, 16 bits" if name == "none" else name
            axes[0, i].plot(depths, [r["gain"] for r in here], marker="o", markersize=3, label=label)
            axes[1, i].plot(depths, [r["best"] for r in here], marker="o", markersize=3, label=label)
        axes[0, i].set(title=f"{task}, {length:,} tokens")
        axes[0, i].axhline(0, color="grey", linestyle=":")
        axes[1, i].set(xlabel="depth", ylim=(-0.02, 1.02))
        axes[1, i].axhline(1 / found["none"][0]["choices"], color="grey", linestyle=":")
    axes[0, 0].set(ylabel="gain, nats a token")
    axes[1, 0].set(ylabel="likeliest of the choices")
    axes[0, 0].legend(fontsize=7)
    FigureCanvasAgg(drawing).print_png(str(file))


def main() -> None:
    """Measure, write, draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--text", required=True, metavar="NAME=FILE")
    parser.add_argument("--window", type=int, default=1024)
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--kv", default=CACHES)
    parser.add_argument("--name", default="retrieval")
    args = parser.parse_args()
    torch.set_num_threads(1)
    model, tokenizer = load(args.model, dtype=torch.float32, kv="none"), load_tokenizer(args.model)
    name, _, file = args.text.partition("=")
    text = read_text(file)
    found = evaluate_retrieval(
        model, tokenizer, text, tokenize(tokenizer, text), args.window, args.windows,
        {n: parse(n) for n in args.kv.split(",")},
        progress=lambda what, done, total: print(what, done, total, flush=True) if done % 10 == 0 else None,
    )  # fmt: skip
    path = Path(__file__).resolve().parent / f"{args.name}.json"
    result = {"model": Path(args.model).name, "text": name, "windows": args.windows, "load": os.getloadavg()}
    path.write_text(json.dumps(result | {"caches": found}, indent=1) + "\n")
    figure(found, path.with_suffix(".png"))
    for cache, rows in found.items():
        for r in rows:
            ends = "[{:+.2f}, {:+.2f}]".format(*r["gain_ci"])
            place = f"{r['task']:<7} {r['length']:5} {r['depth']:.2f}"
            print(
                f"{cache:<10} {r['share']:.3f} {place} {r['nll']:6.2f} {r['gain']:+.2f} {ends} {r['exact']:.2f} {r['best']:.2f}"
            )


if __name__ == "__main__":
    main()
