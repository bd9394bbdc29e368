"""Samples of a pipeline after quantization: schemes and policies by step, each from its packed folder, beside the original.

    python reports/video/run.py --model tiny-video --lines LINES --name tiny-video [--videos 128] [--part 0/2]

LINES gets one line per run and runs that are there are left out: a stopped report goes on; --part takes every second run, say,
for two processes with LINES of their own (cat both, run without --part for the table). Original and quantized samples share
prompts and seeds; the original's are made once. reports/video/NAME.json gets the table, with 95 % intervals over samples.
Modelled: "operations", multiply-adds of linears in blocks times bits of both sides, and "traffic", bytes of weights that one
sample reads, both as shares of the original's in 16 bits.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from qkit.diffusion.policy import BITS
from qkit.diffusion.trajectory import sampling_of
from qkit.evaluation.video import Video, sample_figures, held_out, interval, latent_errors, make_video, psnr
from qkit.runtime.loading import load
from qkit.files.locate import find_model
from qkit.workflows.quantize import Request, quantize


def _steps(method: str = "gptq", **policy: Any) -> dict[str, Any]:
    return {"scheme": "6bit", "method": method, "policy": {"skips": 0, **policy}}


RUNS: dict[str, dict[str, Any]] = {
    "W8A8": {"scheme": "w8a8"},
    "W4A8, GPTQ": {"scheme": "w4a8", "method": "gptq"},
    "W4A8, SmoothQuant": {"scheme": "w4a8", "method": "smoothquant"},
    "W4A8, Hadamard": {"scheme": "w4a8", "method": "hadamard"},
    "W4A8, SmoothQuant, Hadamard": {"scheme": "w4a8", "method": "smoothquant+hadamard"},
    "NVFP4 weights, INT8 inputs": {"scheme": "nvfp4a8", "method": "gptq"},
    "NVFP4": {"scheme": "nvfp4", "method": "gptq"},
    **{f"{kind}, {width} bits": _steps(kind=kind, width=width) for width in (6, 5, 7) for kind in ("static", "dmpq")},
    "dmpq, weighed, 6 bits": _steps(width=6, weigh=True),
    "dmpq, 6 bits, cache": _steps(width=6, skips=0.25),
    "dmpq, 6 bits, schedule": _steps(width=6, skips=0.25, cache="schedule"),
    "dmpq, weighed, 5 bits": _steps(width=5, weigh=True),
    "dmpq, 6 bits, Hadamard": _steps("hadamard+gptq", width=6),
    "W4A8": {"scheme": "w4a8"},
    "static, weighed, 6 bits": _steps(kind="static", width=6, weigh=True),
    "decoupled, 6 bits": _steps(kind="decoupled", width=6),
    "INT8 inputs, schedule": _steps(width=8, skips=0.25, cache="schedule"),
}
# Differences sample by sample that a reader asks for: the first less the second.
PAIRS = (
    *((f"dmpq, {w} bits", f"static, {w} bits") for w in (5, 6, 7)),
    *((f"dmpq, weighed, {w} bits", f"static, {w} bits") for w in (5, 6)),
    ("dmpq, weighed, 6 bits", "dmpq, 6 bits"),
    ("dmpq, weighed, 6 bits", "static, weighed, 6 bits"),
    ("decoupled, 6 bits", "static, 6 bits"),
    ("dmpq, 6 bits", "W4A8, SmoothQuant, Hadamard"),
    ("dmpq, 6 bits, schedule", "dmpq, 6 bits, cache"),
)


class Silent:
    """No progress output."""

    def start(self, what: str, total: int) -> None:
        """A new phase."""

    def step(self, amount: int = 1) -> None:
        """Part of a phase."""


def samples(folder: Path, count: int) -> list[Video]:
    """What the pipeline makes of its own prompts, in float32."""
    pipeline = load(folder, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    sampling = sampling_of(folder, None, {})
    chosen = [held_out(sampling, i) for i in range(count)]
    return [make_video(pipeline, prompt, sampling.call, seed) for prompt, seed in chosen]


def modelled(model: Path, out: Path, record: dict[str, Any], made: list[Video]) -> dict[str, float]:
    """{"bytes", "operations", "traffic"}: see above. Multiply-adds by linear are counted in one sample of the original."""
    sizes = [weights.stat().st_size for weights in map(_weights, (model, out))]
    bits = {name: _bits(entry) for name, entry in record["linears"].items()}
    macs = dict.fromkeys(bits, 0)
    pipeline = load(model, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)

    def count(name: str) -> Any:
        def hook(module: Any, args: Any, _: Any) -> None:
            macs[name] += args[0].numel() * module.out_features

        return hook

    for name in bits:
        pipeline.transformer.get_submodule(name).register_forward_hook(count(name))
    sampling = sampling_of(model, None, {})
    make_video(pipeline, sampling.prompts[0], sampling.call, 0)
    whole = 256 * sum(macs.values())
    calls = sampling.call["num_inference_steps"] * 2  # guidance
    operations, computed = [], []
    for video in made:
        chosen = [(c.linear, BITS[c.choice]) for c in video.log if c.linear]
        if chosen:
            operations.append(sum(macs[n] / calls * bits[n][0] * b for n, b in chosen) / whole)
        else:
            operations.append(sum(macs[n] * w * a for n, (w, a) in bits.items()) / whole)
        computed.append(1.0 if video.skipped != video.skipped else 1 - video.skipped)
    return {
        "bytes": sizes[1],
        "operations": round(sum(operations) / len(operations), 4),
        "traffic": round(sizes[1] / sizes[0] * sum(computed) / len(computed), 4),
    }


def _weights(folder: Path) -> Path:
    return folder / "transformer" / "diffusion_pytorch_model.safetensors"


def _bits(entry: dict[str, Any]) -> tuple[int, int]:
    """(bits of the weight, of the inputs)"""
    activations = entry["activations"]
    return entry["format"]["bits"], 16 if activations is None else activations["bits"]


def main() -> None:
    """All runs that are not there yet, then the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--lines", type=Path, required=True)
    parser.add_argument("--name", required=True)
    parser.add_argument("--videos", type=int, default=128)
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--part", default="0/1")
    args = parser.parse_args()
    torch.set_num_threads(1)
    model, work = find_model(args.model), Path(tempfile.mkdtemp())
    lines = [json.loads(x) for x in args.lines.read_text().splitlines()] if args.lines.exists() else []
    done = {x["run"] for x in lines}
    original = samples(model, args.videos)
    part, parts = map(int, args.part.split("/"))
    for name, given in list(RUNS.items())[part::parts]:
        if name in done:
            continue
        out, began = work / "out", time.perf_counter()
        quantize(Request(model=str(model), samples=args.samples, **given), out, Silent())
        record = json.loads((out / "transformer" / "qkit.json").read_text())
        took, made = time.perf_counter() - began, samples(out, args.videos)
        line = {
            "run": name, "quantize_seconds": round(took, 1), **modelled(model, out, record, made),
            **sample_figures(made, original), "policy": record.get("diffusion"),
            "each": {
                "latent_error": [latent_errors(a, b)[-1] for a, b in zip(made, original, strict=True)],
                "psnr": [psnr(a.frames, b.frames) for a, b in zip(made, original, strict=True)],
            },
        }  # fmt: skip
        shutil.rmtree(out)
        shutil.rmtree(work / "out.job")
        lines.append(line)
        with args.lines.open("a") as f:
            f.write(json.dumps(line) + "\n")
        print(
            name,
            line["latent_error"],
            line["psnr"],
            line.get("recognised"),
            line.get("width"),
            line.get("skipped"),
            flush=True,
        )
    if parts > 1:
        return
    lines.sort(key=lambda x: list(RUNS).index(x["run"]))
    each = {x["run"]: x.pop("each") for x in lines}
    pairs = {
        f"{a} - {b}": {k: interval([x - y for x, y in zip(each[a][k], each[b][k], strict=True)]) for k in each[a]}
        for a, b in PAIRS
        if a in each and b in each
    }
    table = {"videos": args.videos, "original": sample_figures(original, []), "rows": lines, "pairs": pairs}
    Path(__file__).with_name(f"{args.name}.json").write_text(json.dumps(table, indent=1) + "\n")


if __name__ == "__main__":
    main()
