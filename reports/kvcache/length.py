"""Memory and speed against length: bytes of KV caches and the time of a decoded token, for contexts of more and more tokens.

    python reports/kvcache/length.py --model DIR --text FILE [--lengths 256,512,1024,2048,4096] [--rounds 9]

One thread of the CPU, float32 arithmetic, one sequence. A context of text goes into the cache in pieces, then tokens are
decoded one at a time: the median of their times, and the cache's bytes as they are held, tokens that are kept as they came
at 16 bits. Rounds go over all caches in turn, so that what else runs on the machine hits all of them; its load average
stands in the file. Positions beyond those of the model cost what others do, and what is computed is not looked at. Writes
reports/kvcache/length.json and length.png.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import statistics
import time
from pathlib import Path

import torch

from qkit.evaluation.decoding import fresh_cache, sizes
from qkit.evaluation.retrieval import fill
from qkit.evaluation.sources import read_text
from qkit.evaluation.text import tokenize
from qkit.kvcache.attention import NAME
from qkit.kvcache.policy import parse
from qkit.runtime.loading import load, load_tokenizer

CACHES = "int8,pm-kvq:2,kivi2,int2,xquant4"
TOKENS = 2  # decoded in a round


@torch.inference_mode()
def measured(model: object, ids: torch.Tensor, names: list[str], rounds: int) -> dict[str, dict[str, float]]:
    """Figures of caches that hold ids [1, n], by name."""
    caches, found, times = {}, {}, {name: [] for name in names}
    for name in names:
        caches[name] = fresh_cache(model, None if name == "none" else parse(name), ids.shape[1] + TOKENS)
        began = time.perf_counter()
        fill(model, ids, caches[name])
        seconds = time.perf_counter() - began
        held, plain = sizes(model, caches[name], 1)
        found[name] = {"bytes": held, "share": held / plain, "prefill_ms": 1e3 * seconds / ids.shape[1]}
    for _ in range(rounds):
        for name in names:
            cache = copy.copy(caches[name])
            cache.layers = [copy.copy(layer) for layer in cache.layers]  # layers replace their tensors
            for _ in range(TOKENS):
                began = time.perf_counter()
                model(input_ids=ids[:, :1], past_key_values=cache, use_cache=True)
                times[name].append(1e3 * (time.perf_counter() - began))
    for name, ms in times.items():
        found[name] |= {"token_ms": statistics.median(ms), "least_ms": min(ms)}
    return found


def figure(found: dict, file: Path) -> None:
    """Bytes and times against length."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    drawing = Figure(figsize=(9, 3.5), layout="constrained")
    lengths = [int(n) for n in found]
    for i, (key, label, unit) in enumerate(
        (("bytes", "MB of the cache", 1e-6), ("token_ms", "ms a token, median", 1.0))
    ):
        axes = drawing.add_subplot(1, 2, i + 1)
        for name in next(iter(found.values())):
            shown = "plain" if name == "none" else name
            axes.plot(lengths, [f[name][key] * unit for f in found.values()], marker="o", markersize=3, label=shown)
        axes.set(xlabel="tokens of context", ylabel=label, xscale="log", yscale="log", xticks=lengths)
        axes.set_xticklabels([f"{n:,}" for n in lengths])
        axes.tick_params(axis="x", which="minor", bottom=False, labelbottom=False)
        axes.legend(fontsize=7)
    FigureCanvasAgg(drawing).print_png(str(file))


def main() -> None:
    """Measure, write, draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--text", required=True)
    parser.add_argument("--lengths", default="256,512,1024,2048,4096")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--kv", default=CACHES)
    args = parser.parse_args()
    torch.set_num_threads(1)
    model, tokenizer = load(args.model, dtype=torch.float32, kv="none"), load_tokenizer(args.model)
    model.set_attn_implementation(NAME)  # the past is read packed, as by a model with a cache attached
    tokens = tokenize(tokenizer, read_text(args.text))
    path = Path(__file__).resolve().parent / "length.json"
    found: dict = {}
    loads = [os.getloadavg()]
    for length in map(int, args.lengths.split(",")):
        found[length] = measured(model, tokens[None, :length], ["none", *args.kv.split(",")], args.rounds)
        loads.append(os.getloadavg())
        result = {"model": Path(args.model).name, "threads": 1, "cores": os.cpu_count(), "rounds": args.rounds}
        path.write_text(json.dumps(result | {"load averages": loads, "lengths": found}, indent=1) + "\n")
        for name, f in found[length].items():
            print(f"{length:6} {name:<10} {f['bytes'] / 1e3:8.0f} kB {f['share']:.3f} {f['prefill_ms']:7.2f} ms a token of "
                  f"prefill {f['token_ms']:7.2f} ms a token (least {f['least_ms']:.2f})", flush=True)  # fmt: skip
    figure(found, path.with_suffix(".png"))


if __name__ == "__main__":
    main()
