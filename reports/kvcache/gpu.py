"""Decode attention over packed keys and values on a GPU: right, and how fast beside attention over float16.

    python reports/kvcache/gpu.py --out reports/kvcache/GPU.json
    TRITON_INTERPRET=1 python reports/kvcache/gpu.py --small --out FILE        (no GPU: the same at small shapes, no times)

One new token of Llama-3-8B's heads (32 of queries, 8 of keys, 128 channels) over 32k and 128k tokens at 8, 4 and 2 bits: the
kernel against float32 on what the codes stand for, equal bits on a second run, and medians of 50 runs with the cache read
from memory (copies in turn, more than the L2 cache), beside scaled_dot_product_attention over the same keys in float16.
The floor is bytes over the bandwidth of a copy measured in the same run.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from pathlib import Path

import torch
from qkit_kernels import kv
from torch.nn import functional

from qkit.kvcache.store import quantize

HEADS, QUERIES, DIM = 8, 32, 128


def milliseconds(run: Callable[[int], object], rounds: int = 50) -> float:
    """Median of ``run(i)`` by events."""
    times = []
    for i in range(rounds + 5):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        run(i)
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end))
    return statistics.median(times[5:])


def main() -> None:
    """Check, time, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    device = "cpu" if args.small else "cuda"
    rows, bandwidth = [], None
    if not args.small:
        big = torch.empty(1 << 30, dtype=torch.uint8, device=device)
        other = torch.empty_like(big)
        bandwidth = 2 * big.numel() / milliseconds(lambda i: other.copy_(big)) * 1e3
        del big, other
    for tokens in (300, 1000) if args.small else (32768, 131072):
        g = torch.Generator(device).manual_seed(0)
        k, v = (torch.randn(1, HEADS, tokens, DIM, generator=g, device=device, dtype=torch.float16) for _ in range(2))
        q = torch.randn(1, HEADS, QUERIES // HEADS, DIM, generator=g, device=device).mul(DIM**-0.5).half()
        plain = None
        if not args.small:
            wide = q.reshape(1, QUERIES, 1, DIM)
            copies = [(k.clone(), v.clone()) for _ in range(4)]

            def dense(i: int, wide: torch.Tensor = wide, copies: list = copies) -> object:
                a, b = copies[i % len(copies)]
                return functional.scaled_dot_product_attention(wide, a, b, scale=1.0, enable_gqa=True)

            plain = milliseconds(dense)
        for bits in kv.BITS:
            packed = [quantize(x, bits, DIM) for x in (k, v)]
            held = [kv.Tokens(p.words, p.low[..., 0].contiguous(), p.span[..., 0].contiguous(), bits) for p in packed]
            most, total, sums = kv.decode(q, *held)
            found = sums / total[..., None]
            scores = q.float() @ packed[0].dequantize(torch.float32).transpose(2, 3)
            expected = scores.softmax(-1) @ packed[1].dequantize(torch.float32)
            again = kv.decode(q, *held)
            row = {
                "tokens": tokens,
                "bits": bits,
                "error": float((found - expected).norm() / expected.norm()),
                "repeats": all(torch.equal(a, b) for a, b in zip((most, total, sums), again, strict=True)),
                "bytes": sum(t.nbytes for h in held for t in (h.words, h.low, h.span)),
                "float16 bytes": k.nbytes + v.nbytes,
            }
            row["right"] = row["error"] < 5e-3 and row["repeats"]
            if bandwidth is not None and plain is not None:
                many = [[kv.Tokens(h.words.clone(), h.low, h.span, bits) for h in held] for _ in range(8)]
                ms = milliseconds(lambda i, many=many, q=q: kv.decode(q, *many[i % len(many)]))
                row |= {
                    "ms": ms,
                    "float16 ms": plain,
                    "speed-up": plain / ms,
                    "share of floor": row["bytes"] / bandwidth * 1e3 / ms,
                }
            rows.append(row)
            print(json.dumps(row), flush=True)
    machine = "interpreter" if args.small else torch.cuda.get_device_name()
    data = {"machine": machine, "torch": torch.__version__, "copy bytes/s": bandwidth, "rows": rows}
    args.out.write_text(json.dumps(data, indent=1) + "\n")
    raise SystemExit(0 if all(r["right"] for r in rows) else 1)


if __name__ == "__main__":
    main()
