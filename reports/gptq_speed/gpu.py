"""Quantization on a GPU: seconds and peak memory of a random Llama of the shape of Llama-3-8B, from disk to the proven folder.

    python reports/gptq_speed/gpu.py --out reports/gptq_speed/GPU.json
    python reports/gptq_speed/gpu.py --small --out FILE                       (no GPU: the same on the CPU, 2 small layers)

128 samples of 2048 tokens. Of each run: seconds of the whole command and of its phases, the peak of memory that torch held on
the GPU, and the peak of the process. A small model comes first and is quantized on the CPU and on the GPU: the report has
the relative difference of the dequantized weights, and of logits, between the two.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import qkit_data
import torch
from transformers import AutoTokenizer

import qkit
from qkit.system.memory import bound_heap

HERE = Path(__file__).resolve().parent
LARGE = {"hidden": 4096, "mlp": 14336, "layers": 32, "heads": 32, "kv-heads": 8, "vocab": 128256}
SMALL = {"hidden": 256, "mlp": 512, "layers": 2, "heads": 4, "kv-heads": 2, "vocab": 4096}
RUNS = {
    "w4a16 gptq": {"scheme": "w4a16", "method": "gptq"},
    "nvfp4 gptq": {"scheme": "nvfp4", "method": "gptq"},
    "w4a16 signround": {"scheme": "w4a16", "method": "signround"},
}


class Phases:
    """Progress that keeps the seconds of each phase, by its name behind the block."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.current, self.began = "", time.monotonic()

    def start(self, what: str, total: int) -> None:
        """A new phase."""
        now = time.monotonic()
        self.seconds[self.current] = self.seconds.get(self.current, 0.0) + now - self.began
        self.current, self.began = what.rpartition(", ")[2], now

    def step(self, amount: int = 1) -> None:
        """Part of a phase."""


def made(sizes: dict[str, int], folder: Path) -> Path:
    """A random model, in a process of its own, so that its memory is in no peak."""
    line = [sys.executable, str(HERE / "make_random_llama.py"), "--out", str(folder)]
    line += ["--tokenizer", str(qkit_data.model_path("tiny-llama")), "--shard-size", "4GB"]
    subprocess.run([*line, *(x for name, n in sizes.items() for x in (f"--{name}", str(n)))], check=True)
    return folder


def random_text(tokens: int, file: Path) -> Path:
    """A text of about so many tokens of the tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(qkit_data.model_path("tiny-llama"))
    ids = torch.randint(300, 4096, (tokens,), generator=torch.Generator().manual_seed(0))
    file.write_text(" ".join(tokenizer.batch_decode(ids.split(64))))
    return file


def measured(model: Path, out: Path, device: str, **options: Any) -> dict[str, Any]:
    """Figures of one run."""
    on_gpu = device.startswith("cuda")
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    phases, began = Phases(), time.monotonic()
    report = qkit.quantize(model, out=out, device=device, progress=phases, **options)
    phases.start("", 0)
    phases.seconds.pop("")
    longest = sorted(phases.seconds.items(), key=lambda item: -item[1])
    return {
        "seconds": round(time.monotonic() - began, 2),
        "phases": {name: round(s, 2) for name, s in longest},
        "gpu_peak_bytes": torch.cuda.max_memory_allocated() if on_gpu else None,
        "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,  # of this process so far
        "output_bytes": report.bytes,
    }


@torch.inference_mode()
def difference(one: Path, other: Path) -> float:
    """Relative difference of the logits of two results, on random tokens."""
    tokens = torch.randint(5, 4096, (2, 64), generator=torch.Generator().manual_seed(1))
    a, b = (qkit.load(x, dtype=torch.float32)(input_ids=tokens).logits.double() for x in (one, other))
    return float((a - b).norm() / b.norm())


def main() -> None:
    """Make the models, run, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", choices=RUNS, action="append", help="one of the runs, repeatable")
    args = parser.parse_args()
    bound_heap()
    device = "cpu" if args.small else "cuda"
    result: dict[str, Any] = {
        "device": "cpu" if args.small else torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "agreement": {},
        "runs": {},
    }
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        small = made(SMALL, work / "small")
        short = random_text(9000, work / "short.txt")
        rows = {"calib": short, "samples": 16, "seqlen": 256}
        for name in args.only or RUNS:
            both = {d: work / f"{d} {name}" for d in ("cpu", device)}
            for d, out in both.items():
                result["runs"][f"{name}, small, {d}"] = measured(small, out, d, overwrite=True, **rows, **RUNS[name])
            result["agreement"][name] = difference(both[device], both["cpu"])
        if not args.small:
            large = made(LARGE, work / "large")
            rows = {"calib": random_text(300_000, work / "long.txt"), "samples": 128, "seqlen": 2048}
            for name in args.only or RUNS:
                result["runs"][name] = measured(large, work / "out", device, overwrite=True, **rows, **RUNS[name])
                args.out.write_text(json.dumps(result, indent=1) + "\n")
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
