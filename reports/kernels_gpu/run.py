"""What only a GPU can tell about the kernels, in one run of ten minutes.

    python reports/kernels_gpu/run.py --out DIR [--parts check,tune,products,decode]      on a GPU
    TRITON_INTERPRET=1 python reports/kernels_gpu/run.py --out DIR --small                anywhere: the checks, at small shapes

check     every format, 16-bit dtype and number of tokens against float64; PTX and plain decoding equal bit for bit; repeat
          runs equal bit for bit; INT8 activations, gate and up, sparse parts
tune      tiles for the shapes of Llama-3-8B, written into kernels/qkit_kernels/tables (and copied to DIR)
products  microseconds of every format x shape at 1 and 16 tokens, cold (weights rotate through three times the L2 cache)
          and warm, against the measured floor and dense bf16, beside gemlite, bitsandbytes and torch's int4 where they are
decode    tokens a second of a random Llama-3-8B: bf16, and int4 g128, both as a replayed CUDA graph

DIR gets one JSON per part, with GPU, clocks, driver, versions.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "kernels"), str(ROOT), str(ROOT / "calib_data")]
from qkit_kernels import autotune, tiles  # noqa: E402
from qkit_kernels.layout import block_columns, lay_out, lay_out_gated  # noqa: E402
from qkit_kernels.matmul import INTERPRETED, product  # noqa: E402
from qkit_kernels.matmul8 import product8, takes  # noqa: E402
from qkit_kernels.sparse import sparse_product  # noqa: E402
from qkit_kernels.weight import dequantize  # noqa: E402

DEVICE = torch.device("cpu" if INTERPRETED else "cuda")
SHAPES = ((4096, 4096), (6144, 4096), (14336, 4096), (28672, 4096), (4096, 14336), (8192, 8192), (8192, 28672))
PARTS = ("check", "tune", "products", "decode")


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    import triton

    found = {"torch": torch.__version__, "triton": triton.__version__, "interpreted": INTERPRETED}
    if not INTERPRETED:
        wanted = "name,driver_version,clocks.sm,clocks.mem,clocks.max.sm,power.limit,temperature.gpu"
        command = ["nvidia-smi", f"--query-gpu={wanted}", "--format=csv,noheader"]
        found["gpu"] = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    return found


def check(small: bool) -> list[dict[str, Any]]:
    """Rows of errors; a wrong one has 'wrong'."""
    rows = []
    names = ("int4 g128", "int3 g128", "nvfp4") if small else tuple(tiles.FORMATS)
    for name in names:
        fmt = tiles.FORMATS[name]
        for dtype in (torch.float16, torch.bfloat16):
            for m in (1, 3) if small else (1, 2, 3, 17, 64, 65):
                for out, blocks in ((24, 1),) if small else ((40, 1), (4096, 9), (136, 33)):
                    shape = (out, blocks * block_columns(fmt.bits) + (0 if fmt.group else 8))
                    weight = autotune.random_weight(fmt, shape, dtype, DEVICE, seed=m)
                    laid = lay_out(weight, dtype)
                    x = torch.randn(m, shape[1], device=DEVICE).to(dtype)
                    tile = tiles.rule(laid, m, 4 if small else 132)
                    dense = dequantize(weight)
                    truth = x.double() @ dense.double().T
                    plain = (x @ dense.to(dtype).T).double()
                    y = product(x, laid, tile)
                    row: dict[str, Any] = {"format": name, "dtype": str(dtype), "tokens": m, "shape": shape}
                    row["error"] = float((y.double() - truth).norm() / truth.norm())
                    row["error of dense"] = float((plain - truth).norm() / truth.norm())
                    row["asm equal"] = torch.equal(y, product(x, laid, tile, asm=False))
                    row["repeat equal"] = torch.equal(y, product(x, laid, tile))
                    good = row["error"] <= 2 * row["error of dense"] + 1e-6 and row["asm equal"] and row["repeat equal"]
                    if takes(laid):
                        scale = x.float().abs().amax(1, keepdim=True) / 127.5
                        codes = (x.float() / scale).round().clamp(-128, 127)
                        exact = codes.double() @ dense.double().T * scale.double()
                        row["error with INT8"] = float((product8(x, laid, tile).double() - exact).norm() / exact.norm())
                        good &= row["error with INT8"] < (2e-3 if dtype == torch.float16 else 8e-3)
                    rows.append(row if good else {**row, "wrong": True})
    gate, up = (autotune.random_weight(tiles.FORMATS["int4 g128"], (48, 256), torch.float16, DEVICE, s) for s in (1, 2))
    x = torch.randn(3, 256, device=DEVICE).half()
    laid = lay_out_gated(gate, up, torch.float16)
    y = product(x, laid, tiles.rule(laid, 3, 8), gated=True)
    g, u = (x.double() @ dequantize(w).double().T for w in (gate, up))
    error = float((y.double() - torch.nn.functional.silu(g) * u).norm() / (torch.nn.functional.silu(g) * u).norm())
    rows.append({"gate and up": error, **({} if error < 2e-3 else {"wrong": True})})
    thin = (torch.randn(64, 256, device=DEVICE) * (torch.rand(64, 256, device=DEVICE) < 0.05)).half()
    csr = thin.cpu().to_sparse_csr()
    pieces = (csr.crow_indices().int(), csr.col_indices().int(), csr.values())
    y = sparse_product(x, *(p.to(DEVICE) for p in pieces))
    error = float((y.double() - x.double() @ thin.double().T).norm() / (x.double() @ thin.double().T).norm())
    rows.append({"sparse": error, **({} if error < 1e-5 else {"wrong": True})})
    return rows


def bandwidth() -> dict[str, float]:
    """Bytes a second of this GPU: copied (read and written), and read alone."""
    a = torch.empty(1 << 30, dtype=torch.uint8, device=DEVICE)
    b = torch.empty_like(a)
    wide = a.view(torch.int64)
    return {
        "copy": 2 * a.nbytes / autotune.seconds([lambda: b.copy_(a)] * 4, 5)[2],
        "read": a.nbytes / autotune.seconds([lambda: wide.sum()] * 4, 5)[2],
    }


def rivals(shape: tuple[int, int], x: torch.Tensor) -> dict[str, Any]:
    """{name: function that multiplies with a random weight of its own}, of those that are installed."""
    found: dict[str, Any] = {}
    out, columns = shape
    try:
        codes = torch.randint(0, 256, (out, columns // 2), dtype=torch.uint8, device=DEVICE)
        packed = torch.ops.aten._convert_weight_to_int4pack(codes, 8)
        scales = torch.ones(columns // 128, out, 2, dtype=torch.bfloat16, device=DEVICE)
        found["torch int4"] = lambda: torch.ops.aten._weight_int4pack_mm(x, packed, 128, scales)
        found["torch int4"]()
    except (RuntimeError, AttributeError) as e:
        found.pop("torch int4", None)
        print("torch int4:", str(e).splitlines()[0])
    try:
        import bitsandbytes as bnb

        linear = bnb.nn.Linear4bit(columns, out, bias=False, compute_dtype=x.dtype, quant_type="nf4").to(DEVICE)
        found["bitsandbytes nf4"] = lambda: linear(x)
        found["bitsandbytes nf4"]()
    except (ImportError, RuntimeError) as e:
        found.pop("bitsandbytes nf4", None)
        print("bitsandbytes:", str(e).splitlines()[0])
    try:
        from gemlite.core import DType, GemLiteLinear

        layer = GemLiteLinear(4, 128, columns, out, input_dtype=DType.BF16, output_dtype=DType.BF16)
        codes = torch.randint(0, 16, (out, columns), dtype=torch.uint8, device=DEVICE)
        ones = torch.ones(out * columns // 128, 1, dtype=x.dtype, device=DEVICE)
        layer.pack(codes, ones, ones * 8)
        found["gemlite"] = lambda: layer(x)
        found["gemlite"]()
    except (ImportError, RuntimeError) as e:
        found.pop("gemlite", None)
        print("gemlite:", str(e).splitlines()[0])
    return found


def products(budget: float) -> dict[str, Any]:
    """Microseconds, and shares of the floor."""
    began, speed, rows = time.monotonic(), bandwidth(), []
    for shape in SHAPES:
        for m in (1, 16):
            x = torch.randn(m, shape[1], device=DEVICE, dtype=torch.bfloat16)
            dense = [torch.randn(shape, device=DEVICE, dtype=torch.bfloat16)]
            cache = torch.cuda.get_device_properties(DEVICE).L2_cache_size
            dense += [torch.randn_like(dense[0]) for _ in range(3 * cache // dense[0].nbytes + 1)]
            base = autotune.seconds([lambda w=w: torch.nn.functional.linear(x, w) for w in dense])[3]
            del dense
            rows.append({"shape": shape, "tokens": m, "what": "bf16", "us": base * 1e6})
            for name in tiles.FORMATS:
                if time.monotonic() - began > budget:
                    return {"bandwidth": speed, "rows": rows, "stopped": "out of time"}
                laid = lay_out(
                    autotune.random_weight(tiles.FORMATS[name], shape, torch.bfloat16, DEVICE, 0), torch.bfloat16
                )
                tile = tiles.choose(laid, m, DEVICE)
                cold = autotune.seconds([autotune._call(x, one, tile) for one in autotune.copies(laid, DEVICE)])
                warm = autotune.seconds([autotune._call(x, laid, tile)])
                floor = (laid.nbytes + 2 * m * sum(shape)) / speed["read"]
                row = {"shape": shape, "tokens": m, "what": name, "tile": str(tile), "us": cold[3] * 1e6}
                row |= {"p20": cold[1] * 1e6, "p80": cold[5] * 1e6, "warm us": warm[3] * 1e6, "floor us": floor * 1e6}
                row |= {"share of floor": floor / cold[3], "over bf16": base / cold[3]}
                row |= {"ideal over bf16": 2 * shape[0] * shape[1] / laid.nbytes}
                rows.append(row if floor <= 1.05 * cold[3] else {**row, "refused": "faster than memory"})
                print(row, flush=True)
            for name, call in rivals(shape, x).items():  # warm: their weights are not rotated
                row = {"shape": shape, "tokens": m, "what": name, "warm us": autotune.seconds([call])[3] * 1e6}
                rows.append(row)
                print(row, flush=True)
    return {"bandwidth": speed, "rows": rows}


class Quantized(torch.nn.Module):
    """A linear of random codes."""

    def __init__(self, out: int, columns: int, seed: int) -> None:
        super().__init__()
        fmt = tiles.FORMATS["int4 g128"]
        self.laid = lay_out(autotune.random_weight(fmt, (out, columns), torch.bfloat16, DEVICE, seed), torch.bfloat16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        from qkit_kernels import gpu

        return gpu.linear(x, self.laid)


def decode() -> dict[str, Any]:
    """Tokens a second of a random Llama-3-8B."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from qkit.runtime.generate import Decoder

    config = LlamaConfig(
        hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8,
        vocab_size=128256, max_position_embeddings=8192, tie_word_embeddings=False,
    )  # fmt: skip
    with torch.device(DEVICE):
        torch.set_default_dtype(torch.bfloat16)
        model = LlamaForCausalLM(config).eval()
        torch.set_default_dtype(torch.float32)
    prompt = torch.randint(0, 128256, (1, 32), device=DEVICE)

    def speed() -> float:
        decoder = Decoder(model, 512)
        decoder.generate(prompt, 16)
        torch.cuda.synchronize()
        began = time.monotonic()
        decoder.generate(prompt, 256)
        torch.cuda.synchronize()
        return 256 / (time.monotonic() - began)

    found = {"bf16 tokens/s": speed()}
    for i, layer in enumerate(model.model.layers):
        for owner in (layer.self_attn, layer.mlp):
            for j, (name, linear) in enumerate(list(owner.named_children())):
                if isinstance(linear, torch.nn.Linear):
                    setattr(owner, name, Quantized(linear.out_features, linear.in_features, 10 * i + j))
    found["int4 g128 tokens/s"] = speed()
    model.lm_head = Quantized(128256, 4096, 999)
    found["int4 g128, head too, tokens/s"] = speed()
    return found


def main() -> None:
    """The parts that are asked for, in order; each is written when it is done."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--small", action="store_true", help="The checks alone, small enough for the interpreter.")
    parser.add_argument("--seconds", type=float, default=200.0, help="For the part 'products'.")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    for part in ("check",) if args.small else args.parts.split(","):
        began = time.monotonic()
        if part == "check":
            result: Any = check(args.small)
            wrong = [r for r in result if "wrong" in r]
            print(len(result), "checks,", len(wrong), "wrong", wrong[:5])
        elif part == "tune":
            names = ["int4 g128", "int3 g128", "int2 g128", "int8 channel", "nvfp4"]
            sys.argv = ["autotune", "--shapes", ",".join(f"{a}x{b}" for a, b in SHAPES[:5]), "--tokens", "8,16"]
            for name in names if time.monotonic() - began < 200 else names[:1]:
                sys.argv[5:] = ["--formats", name]
                autotune.main()
            for file in tiles.TABLES.glob("nvidia*.json"):
                shutil.copy(file, args.out)
            result = "see tables"
        else:
            result = products(args.seconds) if part == "products" else decode()
        text = {"machine": machine(), "seconds": round(time.monotonic() - began, 1), part: result}
        (args.out / f"{part}.json").write_text(json.dumps(text, indent=1) + "\n")
        print(part, "done in", text["seconds"], "s", flush=True)


if __name__ == "__main__":
    main()
