"""Tiny random models of many architectures in GGUF: what llama.cpp computes against qkit's own numbers of the same file.

    python reports/gguf/architectures.py --llama VENV/bin/python --work WORK [--types q8_0,q4_0] [--only NAME,..]

Each model has random weights, norms and biases in all places, and the embedded tokenizer. It is quantized by rounding, loaded
back by qkit in float32, and run in llama.cpp by tools/llama_logits.py: the file, where llama.cpp rounds inputs of products to 8
bits, and a copy of it with the same numbers in float32, where it does not. ``mean`` and ``largest`` are of the absolute difference
of log-probabilities of 94 tokens; ``relative`` is its norm against how far the log-probabilities spread, which an order of rows
or a norm in the wrong place makes about one. A class that is refused has the sentence that says why.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
import transformers

ROOT = Path(__file__).parents[2]
sys.path += [str(ROOT / "tools"), str(ROOT / "tests")]
import sweep_configs  # noqa: E402
import tiny_models  # noqa: E402
from conftest import Quiet  # noqa: E402
from gguf_floats import as_floats  # noqa: E402

import qkit  # noqa: E402
from qkit.errors import QkitError  # noqa: E402
from qkit.verification.verify import verify  # noqa: E402
from qkit.workflows.quantize import Request, quantize  # noqa: E402

TARGET = Path(__file__).with_suffix(".json")
NAMES = (
    "llama mistral qwen2 qwen3 smollm3 gemma gemma2 gemma3_text phi phi3 olmo olmo2 granite starcoder2 gpt2 gpt_neox falcon stablelm "
    "cohere cohere2 glm4 exaone4 nemotron qwen2_moe qwen3_moe mixtral olmoe granitemoe phimoe llama4_text gpt_oss deepseek_v2 "
    "deepseek_v3 mamba mamba2 lfm2 opt"
).split()

# Where the tiny config of a class is not as models of the class are.
OPTIONS: dict[str, dict[str, Any]] = {
    "mistral": {"sliding_window": None},
    "gemma2": {"query_pre_attn_scalar": 32},
    "gemma3_text": {"query_pre_attn_scalar": 32, "layer_types": ["sliding_attention"] * 3},
    "smollm3": {"no_rope_layers": [1, 1, 1]},
    "phi": {"intermediate_size": 512, "num_key_value_heads": 4},
    "qwen3_moe": {"norm_topk_prob": True},
    "olmoe": {"num_key_value_heads": 4},
    "cohere2": {"layer_types": ["sliding_attention"] * 3},
    "gpt2": {"n_ctx": 256},
    "falcon": {"new_decoder_architecture": True, "ffn_hidden_size": 512},
}


def main() -> None:
    """See the top of the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--llama", required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--types", default="q8_0,q4_0")
    parser.add_argument("--only", default=",".join(NAMES))
    args = parser.parse_args()
    results = json.loads(TARGET.read_text()) if TARGET.is_file() else {}
    for name in args.only.split(","):
        source = args.work / f"model-{NAMES.index(name)}"  # llama.cpp does more for files that have well-known names
        if not source.is_dir():
            build(name, source)
        for kind in args.types.split(","):
            row = measured(source, args.work / "out", kind, args.llama)
            results.setdefault(name, {})[kind] = row
            print(name, kind, row, flush=True)
            TARGET.write_text(json.dumps(results, indent=1) + "\n")


def build(name: str, folder: Path) -> None:
    """A tiny model of a class, with the options that models of its kind have."""
    config = sweep_configs.config("causal", name)
    for key, value in OPTIONS.get(name, {}).items():
        setattr(config, key, value)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    sweep_configs.randomize(model)
    model.to(torch.bfloat16).save_pretrained(folder)
    tiny_models.add_tokenizer(folder)


def measured(source: Path, out: Path, kind: str, llama: str) -> dict[str, Any]:
    """One model in one type."""
    for folder in (out, out.with_name("out.job"), out.with_name("out.partial")):
        shutil.rmtree(folder, ignore_errors=True)
    try:
        quantize(Request(model=str(source), scheme=kind), out, Quiet())
        report = verify(out)
        tokens = tiny_models.tokens(2, 48)
        model = qkit.load(out, dtype=torch.float32)
        logits = torch.log_softmax(tiny_models.logits(model, tokens), -1)
    except QkitError as e:
        return {"refused": str(e).replace(f"{source}: ", "").replace(str(source), "MODEL")}
    wanted = -logits[:, :-1].gather(-1, tokens[:, 1:, None])[..., 0]
    windows, floats = out.with_suffix(".json"), out.with_suffix(".gguf")
    windows.write_text(json.dumps(tokens.tolist()))
    as_floats(out / "model.gguf", floats)
    row: dict[str, Any] = {"sound": not report.problems}
    for key, file in (("file", out / "model.gguf"), ("same numbers in float32", floats)):
        command = [llama, str(ROOT / "tools" / "llama_logits.py"), str(file), str(windows)]
        ran = subprocess.run(command, capture_output=True, text=True, check=False)
        if ran.returncode:
            said = [x for x in ran.stderr.strip().splitlines() if "error" in x] or ran.stderr.strip().splitlines()
            row[key] = said[0].replace(str(out), "OUT")[:200] if said else f"exit {ran.returncode}"
            continue
        gap = torch.tensor(json.loads(ran.stdout)["nll"]) - wanted
        row[key] = {
            "mean": round(float(gap.abs().mean()), 5),
            "largest": round(float(gap.abs().max()), 5),
            "relative": round(float(gap.norm() / (wanted - wanted.mean()).norm()), 5),
        }
    return row


if __name__ == "__main__":
    main()
