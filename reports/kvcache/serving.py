"""What vLLM's KV caches cost a packed model, and what vLLM computes with the scales in its file.

python reports/kvcache/serving.py --model SMOLLM2 --work DIR --text TEXT --out reports/kvcache/serving.json [--vllm PYTHON]

The model is quantized to W4A16 twice, with a scale for each layer (--kv fp8) and one for each head (fp8_head). Each cache is
measured at 512 and at 2,048 tokens by ``qkit.workflows.cache_choice``, and with --vllm each file runs in vLLM.
"""

import argparse
import json
import time
from dataclasses import asdict
from pathlib import Path

from qkit.engines.process import TIMEOUT
from qkit.kvcache.policy import parse
from qkit.system.progress import Silent
from qkit.workflows.cache_choice import measure_caches
from qkit.workflows.engine_proof import prove
from qkit.workflows.quantize import Request, quantize

WINDOWS = {512: 2, 2048: 1}  # on a busy machine: more windows, narrower intervals
CANDIDATES = ("fp8", "fp8_per_token_head", "int8_per_token_head")  # of others no layers are ranked, which takes a pass for each
SAMPLES, LENGTH = 64, 512


def made(model: str, kv: str, work: Path) -> Path:
    out = work / f"{Path(model).name}-{kv}"
    request = Request(
        model=model, scheme="w4a16", method="rtn", samples=SAMPLES, seqlen=LENGTH, threads=1, kv=parse(kv).to_json()
    )
    if not (out / "qkit.json").is_file():
        assert quantize(request, out, Silent()).ok
    return out


def main() -> None:
    parser = argparse.ArgumentParser()
    for name in ("model", "work", "text", "out"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--vllm")
    args = parser.parse_args()
    found = {"model": Path(args.model).name, "calibration": [SAMPLES, LENGTH], "files": {}}
    for kv in ("fp8", "fp8_head"):
        out = made(args.model, kv, Path(args.work))
        entry = found["files"].setdefault(kv, {"contexts": {}})
        for context, windows in WINDOWS.items():
            start = time.monotonic()
            asked = CANDIDATES if kv == "fp8" else ("fp8",)
            measured = measure_caches(out, Path(args.text), context, Silent(), windows, asked=asked)
            entry["contexts"][str(context)] = {**measured.to_json(), "seconds": round(time.monotonic() - start)}
            Path(args.out).write_text(json.dumps(found, indent=1) + "\n")
        if args.vllm:
            proof = prove(out, "vllm", Path(args.vllm), TIMEOUT)
            entry["vllm"] = {"ok": proof.ok, "verdict": proof.verdict, **asdict(proof)}
        Path(args.out).write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
