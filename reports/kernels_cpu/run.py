"""W4A16 on the CPU: products beside dense ones and other libraries, and whole-model decoding beside bf16 and float32.

    python reports/kernels_cpu/run.py --name avx2 --work DIR [--threads 1 2] [--only products | decode]

Products: 4096x4096 and 14336x4096 (out x in), groups of 128, at 1, 4, 16, 64 and 256 rows, with weights from memory and from the
cache; beside dense bf16, dense float32, torch's own operator, and (where installed: pip install onnx onnxruntime auto-round-lib)
onnxruntime's MatMulNBits at accuracy levels 4 (INT8 activations) and 0, and auto-round-lib. Decoding: a random Llama of 300 million
parameters, made and quantized in DIR, 32 tokens of prompt and 64 new ones, five times in turn. All in one process, for each number
of threads. reports/kernels_cpu/NAME.json gets everything, after each step. Nothing else should run on the machine.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import qkit_data
import torch
import transformers

from qkit.benchmark.contenders import random_product
from qkit.benchmark.decode import decode
from qkit.benchmark.host import describe_host, measure_host
from qkit.benchmark.products import compare, make_entrants
from qkit.benchmark.products import product_record as described_product
from qkit.runtime.loading import load
from qkit.workflows.quantize import Request, quantize
from qkit.files.safefile import write_atomic
from qkit.sensitivity.candidates import parse_candidates

SHAPES = ((4096, 4096), (14336, 4096))
ROWS = (1, 4, 16, 64, 256)
SECONDS = 2.0  # of a contender at a number of rows
LLAMA = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 18,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "vocab_size": 4096,
    "tie_word_embeddings": False,
}


class Quiet:
    """A listener that says nothing."""

    def start(self, what: str, total: int) -> None: ...

    def step(self, amount: int = 1) -> None: ...


def models(work: Path) -> tuple[Path, Path]:
    """(original, W4A16) of the random Llama; made where they are missing."""
    model, packed = work / "llama-300m", work / "llama-300m-w4a16"
    if not packed.is_dir():
        torch.manual_seed(0)
        made = transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA)).to(torch.bfloat16)
        made.save_pretrained(model)
        source = qkit_data.model_path("tiny-llama")
        assert source is not None
        for name in ("tokenizer.json", "tokenizer_config.json"):
            (model / name).write_bytes((source / name).read_bytes())
        quantize(Request(model=str(model), scheme="w4a16", method="rtn"), packed, Quiet())
    return model, packed


def main() -> None:
    """Measure, and write after each step."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--name", required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--only", choices=["products", "decode"])
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    file = Path(__file__).with_name(f"{args.name}.json")
    found: dict[str, Any] = json.loads(file.read_text()) if file.is_file() else {}
    (int4,) = parse_candidates("int4", None)

    def keep(part: str, threads: int, data: dict[str, Any]) -> None:
        now = {"machine": describe_host(), **data}
        found.setdefault(part, {})[str(threads)] = now
        write_atomic(file, (json.dumps(found, indent=1, sort_keys=True) + "\n").encode())
        print(f"{part}, {threads} threads: kept", flush=True)

    for threads in args.threads:
        torch.set_num_threads(threads)
        host = measure_host()
        if args.only != "decode":
            products = []
            for shape in SHAPES:
                p = random_product(int4, shape, torch.bfloat16)
                entrants = make_entrants(p, "cpu", host)
                results = [r for rows in ROWS for r in compare(p, entrants, rows, host, SECONDS)]
                products.append(described_product(p, results))
                for r in results:
                    times = r.refused or f"cold {r.cold.p50 * 1e3:.3f} ms, warm {r.warm.p50 * 1e3:.3f} ms"  # type: ignore[union-attr]
                    print(
                        f"{shape[0]}x{shape[1]}, {r.rows} rows, {r.contender}: {times}, error {r.error:.2g}", flush=True
                    )
                del entrants
            keep("products", threads, {"bandwidth": host.to_json(), "products": products})
        if args.only != "products":
            model, packed = models(args.work)
            three = [
                ("w4a16", load(packed, torch.bfloat16)),
                ("bf16", load(model, torch.bfloat16)),
                ("float32", load(model, torch.float32)),
            ]
            decoded = decode(three, prompt=32, new=64, rounds=5, host=host, step=lambda: None)
            for d in decoded:
                print(f"{d.name}: {d.refused or f'{1 / d.token.p50:.2f} tokens/s'}", flush=True)
            keep("decode", threads, {"bandwidth": host.to_json(), "models": [d.to_json() for d in decoded]})


if __name__ == "__main__":
    main()
