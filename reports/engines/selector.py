"""Holds the pre-flight against vLLM's own code: for every scheme and layout and models of awkward widths, on every kind of GPU.

python reports/engines/selector.py --python VENV/bin/python --work DIR

Models of one block with random weights are made and quantized into DIR (a run that was stopped goes on there). vLLM is then
asked what it selects for every layer of each file, and the table of qkit what it says. The result is selector.json beside this
file: for each file and kind of GPU both answers, and whether they are equal. A file that the pre-flight calls loadable and
vLLM refuses ends this program with exit code 1.
"""

import argparse
import json
import shutil
import sys
from collections import Counter
from dataclasses import asdict
from pathlib import Path

import torch
import transformers

import qkit
from qkit.engines.selector import LayerChoice, ModelChoice, ask
from qkit.errors import QkitError
from qkit.tensor.formats import SCHEMES
from qkit.verification.engine_types import PLATFORMS, Selected
from qkit.verification.model_engines import Deployment
from qkit.verification.verify import engine_table
from qkit.workflows.asked_engine import chosen_of

TARGET = Path(__file__).with_name("selector.json")
COMMON = {"vocab_size": 4096, "num_hidden_layers": 1, "max_position_embeddings": 1024, "tie_word_embeddings": False}
NOT_ASKED = ("6BIT", "NVFP4A8")  # of diffusion transformers
# Schemes in other layouts than compressed-tensors.
EXPORTS = {
    "gptq": ("W4A16", "W8A16"),
    "awq": ("W4A16_ASYM",),
    "modelopt": ("FP8", "FP8_DYNAMIC", "FP8_BLOCK", "NVFP4", "NVFP4A16", "MXFP8"),
}
RANKS = {1: PLATFORMS, 2: ("sm90",), 4: ("sm90",)}


def models() -> dict[str, tuple[str, dict[str, object]]]:
    """{name: (kind, config)}; each has the width in its name."""
    llama = {
        "576": {"hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9, "num_key_value_heads": 3},
        "960": {"hidden_size": 960, "intermediate_size": 2560, "num_attention_heads": 15, "num_key_value_heads": 5},
        "4304": {"hidden_size": 256, "intermediate_size": 4304, "num_attention_heads": 4, "num_key_value_heads": 4},
        "10944": {"hidden_size": 256, "intermediate_size": 10944, "num_attention_heads": 4, "num_key_value_heads": 2},
        "13824": {"hidden_size": 256, "intermediate_size": 13824, "num_attention_heads": 2, "num_key_value_heads": 2},
    }
    heads = {"num_attention_heads": 14, "num_key_value_heads": 2}
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2}
    few = {"num_experts": 4, "num_experts_per_tok": 2, "decoder_sparse_step": 1, "head_dim": 64}
    return {
        **{f"llama-{width}": ("llama", config) for width, config in llama.items()},
        "qwen2-896": ("qwen2", {"hidden_size": 896, "intermediate_size": 4864, **heads}),
        "gemma3-1152": (
            "gemma3_text",
            {"hidden_size": 1152, "intermediate_size": 6912, "num_attention_heads": 4, "num_key_value_heads": 1},
        ),
        "mixtral-2880": (
            "mixtral",
            {
                "hidden_size": 256,
                "intermediate_size": 2880,
                "num_attention_heads": 4,
                "num_key_value_heads": 2,
                **experts,
            },
        ),
        "qwen3moe-896": ("qwen3_moe", {"hidden_size": 896, "moe_intermediate_size": 320, **heads, **few}),
    }


def make_model(name: str, folder: Path) -> Path:
    """The model of that name, with the tokenizer of tiny-llama."""
    from qkit.files.locate import find_model

    kind, fields = models()[name]
    out = folder / name
    if not (out / "tokenizer.json").is_file():
        config = transformers.AutoConfig.for_model(kind, **COMMON, **fields)
        torch.manual_seed(0)
        transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(out)
        for file in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(find_model("tiny-llama") / file, out / file)
    return out


def make_files(work: Path) -> tuple[dict[str, Path], dict[str, str]]:
    """Files by name, and why there is none for the other names."""
    files, refused = {}, {}
    for model in models():
        source = make_model(model, work / "models")
        asked = [(s, None) for s in SCHEMES if s not in NOT_ASKED]
        asked += [(s, layout) for layout, schemes in EXPORTS.items() for s in schemes]
        for scheme, layout in asked:
            name = f"{model} {scheme.lower()}" + (f" {layout}" if layout else "")
            out, why = work / "files" / name.replace(" ", "-"), work / "files" / f"{name}.refused"
            if not (out / "config.json").is_file() and not why.is_file():
                try:
                    qkit.quantize(
                        source, scheme=scheme, method="rtn", export=layout, out=out, threads=1, samples=4, seqlen=32
                    )
                except QkitError as e:
                    why.write_text(str(e))
                shutil.rmtree(f"{out}.job", ignore_errors=True)
            if why.is_file():
                refused[name] = why.read_text()
            else:
                files[name] = out
    return files, refused


def answer_of(
    python: Path, gpu: str, ranks: int, files: dict[str, Path], work: Path
) -> tuple[str, dict[str, ModelChoice]]:
    """vLLM's version and its answers; they are kept in the work folder."""
    kept = work / f"answers-{gpu}-{ranks}.json"
    if not kept.is_file():
        answer = ask(python, gpu, files, tp=ranks, amx=False)  # the table is that of CPUs without AMX
        kept.write_text(
            json.dumps({"version": answer.version, "models": {n: asdict(m) for n, m in answer.models.items()}})
        )
    data = json.loads(kept.read_text())
    models = {}
    for name, found in data["models"].items():
        layers = {n: LayerChoice(**layer) for n, layer in found["layers"].items()}
        models[name] = ModelChoice(layers=layers, joined=found["joined"], refused=found["refused"])
    return data["version"], models


def said(rows: list) -> tuple[bool, dict[str, int]]:
    """Whether vLLM loads all, and what runs layers, of a table of engines for one kind of GPU."""
    own = [row for row in rows if row.engine == "vLLM"]
    kernels: Counter[str] = Counter()
    for row in own:
        for by_kernel in row.kernels.values():
            for kernel, count in by_kernel.items():
                kernels["refused" if kernel.startswith("refused") else kernel] += count
    return all(row.loads_as for row in own), dict(sorted(kernels.items()))


def compare(out: Path, gpu: str, ranks: int, answer: ModelChoice, version: str) -> dict[str, object]:
    """Both answers about one file."""
    before = Deployment(platforms=(gpu,), ranks=ranks)
    record = json.loads((out / "qkit.json").read_text())
    refused = {gpu: answer.refused} if answer.refused else {}
    selected = Selected(version, {gpu: dict(chosen_of(list(record["linears"]), answer))}, refused)
    loads, kernels = said(engine_table(out, before))
    takes, own = said(engine_table(out, Deployment(platforms=(gpu,), ranks=ranks, selected=selected)))
    raw = not answer.refused and not any(x.refused or x.kernel == "NONE" for x in answer.layers.values())
    selects = dict(sorted(Counter(x.kernel or x.scheme for x in answer.layers.values()).items()))
    entry: dict[str, object] = {"preflight": kernels if loads else "refused", "selector": selects if raw else "refused"}
    entry["equal"] = loads == raw and (not loads or kernels == own)
    if not entry["equal"]:
        words = answer.refused or next((x.refused for x in answer.layers.values() if x.refused), "")
        entry["words"] = " ".join(words.split())[:200]
        entry["limits"] = [limit for row in engine_table(out, before) if row.engine == "vLLM" for limit in row.limits][
            :4
        ]
    return entry


def main() -> None:
    parser = argparse.ArgumentParser()
    for name in ("--python", "--work"):
        parser.add_argument(name, type=Path, required=True)
    options = parser.parse_args()
    files, refused = make_files(options.work)
    result: dict[str, object] = {}
    counts: Counter[str] = Counter()
    for ranks, gpus in RANKS.items():
        for gpu in gpus:
            version, answers = answer_of(options.python, gpu, ranks, files, options.work)
            for name, out in files.items():
                entry = compare(out, gpu, ranks, answers[name], version)
                result.setdefault(name, {})[f"{gpu}" + (f" x {ranks}" if ranks > 1 else "")] = entry
                counts["equal" if entry["equal"] else "different"] += 1
                wrong = entry["preflight"] != "refused" and entry["selector"] == "refused"
                stricter = entry["preflight"] == "refused" and entry["selector"] != "refused"
                counts["called loadable and refused by vLLM"] += wrong
                counts["refused by the pre-flight alone"] += stricter
                if not entry["equal"]:
                    print(name, gpu, ranks, json.dumps(entry), flush=True)
            print(gpu, ranks, dict(counts), flush=True)
    summary = {"version": version, "files": len(files), "not made": refused, "counts": dict(counts)}
    TARGET.write_text(json.dumps({**summary, "answers": result}, indent=1) + "\n")
    sys.exit(1 if counts["called loadable and refused by vLLM"] else 0)


if __name__ == "__main__":
    main()
