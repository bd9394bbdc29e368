"""Defects seeded into sound files of several writers, and what ``qkit doctor`` finds: python reports/doctor/corpus.py

    python reports/doctor/corpus.py --work DIR --files DIR --llama-quantize PROGRAM --json reports/doctor/corpus.json

--files: a folder WRITER/NAME/ of files that other tools made from the reference model tiny-llama. qkit's own results, files of
compressed-tensors' compressor, of transformers and of llama.cpp's quantizer are made here. A sound file is right where no
fault is found (warnings are listed); a seeded one where a finding of the right kind names the right layer.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT), str(ROOT / "calib_data"), str(ROOT / "kernels")]

import quantized_sources as sources  # noqa: E402
import seeded_defects as seeds  # noqa: E402
import seeded_gguf  # noqa: E402
import tiny_models  # noqa: E402
import torch  # noqa: E402
from seeded_experts import expert_seeds  # noqa: E402

from qkit.files.embedded import reference_models  # noqa: E402
from qkit.workflows.doctor import diagnose  # noqa: E402

SCHEMES = (
    "w4a16",
    "w4a16_asym",
    "w2a16",
    "w3a16",
    "w8a16",
    "w8a8",
    "nvfp4",
    "mxfp4",
    "mxfp8",
    "fp8_dynamic",
    "fp8",
    "q4_k",
    "q8_0",
)
UNSERVED = ("qkit/group96",)  # what is wrong with it is how it was asked for


def quantized(model: Path, out: Path, *options: str) -> Path:
    """A result of qkit, made once."""
    if not out.is_dir():
        command = [sys.executable, "-m", "qkit", "quantize", "--model", str(model), "--out", str(out), *options]
        subprocess.run(command, check=True, capture_output=True)
    return out


def own(work: Path, base: Path) -> dict[str, tuple[Path, Path]]:
    """{name: (folder, original)} of qkit's results."""
    made = {}
    for scheme in SCHEMES:
        calibrated = ("--samples", "8", "--seqlen", "64") if scheme in ("fp8", "nvfp4") else ()
        made[f"qkit/{scheme}"] = quantized(base, work / f"qkit-{scheme}", "--scheme", scheme, *calibrated), base
    made["qkit/w4a16-kv"] = (
        quantized(base, work / "qkit-kv", "--scheme", "w4a16", "--kv", "fp8", "--samples", "8", "--seqlen", "64"), base,
    )  # fmt: skip
    narrow = work / "plain-192"
    if not narrow.is_dir():
        tiny_models.make("llama", narrow, hidden_size=192, intermediate_size=384)
    made["qkit/group96"] = quantized(narrow, work / "qkit-group96", "--scheme", "w4a16", "--group-size", "96"), narrow
    for family in ("mixtral", "qwen3_moe"):
        plain = work / f"plain-{family}"
        if not plain.is_dir():
            tiny_models.make(family, plain, hidden_size=256, num_hidden_layers=2)
        made[f"qkit/{family}"] = (
            quantized(plain, work / f"qkit-{family}", "--scheme", "w4a16", "--group-size", "32"),
            plain,
        )
    return made


def compressors(work: Path, base: Path) -> dict[str, tuple[Path, Path]]:
    """Files of the compressor of compressed-tensors, of transformers, and after the packing code of AutoGPTQ and AutoAWQ."""
    group = {"num_bits": 4, "strategy": "group", "group_size": 64, "symmetric": True, "type": "int"}
    channel = {"num_bits": 8, "strategy": "channel", "symmetric": True, "type": "float"}
    writers = {
        "compressed-tensors/int4": lambda f: sources.compressed(base, f, group, "pack-quantized"),
        "compressed-tensors/fp8": lambda f: sources.compressed(base, f, channel, "float-quantized"),
        "transformers/fp8-block": lambda f: sources.fp8(base, f, (128, 128)),
        "autogptq-layout/sym": lambda f: sources.gptq(base, f, sym=True),
        "autogptq-layout/ordered": lambda f: sources.gptq(base, f, act_order=True),
        "autogptq-layout/v2": lambda f: sources.gptq(base, f, version="gptq_v2"),
        "autoawq-layout/gemm": lambda f: sources.awq(base, f),
    }
    made = {}
    for name, write in writers.items():
        folder = work / name.replace("/", "-")
        if not folder.is_dir():
            write(folder)
        made[name] = folder / "source", base
    return made


def llama_cpp(work: Path, base: Path, program: Path | None) -> dict[str, tuple[Path, Path]]:
    """Files of llama.cpp's own quantizer, from qkit's file in Q8_0 of the same model."""
    made: dict[str, tuple[Path, Path]] = {}
    source = work / "qkit-q8_0" / "model.gguf"
    for kind in ("Q4_K_M", "Q2_K", "Q6_K", "Q4_0", "IQ4_XS") if program is not None else ():
        folder = work / f"llama-{kind}"
        if not folder.is_dir():
            folder.mkdir()
            command = [str(program), "--allow-requantize", str(source), str(folder / "model.gguf"), kind]
            subprocess.run(command, check=True, capture_output=True)
        made[f"llama.cpp/{kind}"] = folder, base
    return made


def others(files: Path | None, base: Path) -> dict[str, tuple[Path, Path]]:
    """Files that other tools made."""
    folders = sorted(f for f in files.glob("*/*") if f.is_dir()) if files is not None else []
    return {f"{f.parent.name}/{f.name}": (f, base) for f in folders if any(f.glob("*.safetensors"))}


def plan_of(sound: dict[str, tuple[Path, Path]], base: Path) -> list[tuple[str, seeds.Seed]]:
    """(sound file, defect) of all that are seeded."""
    mixtral = "model.layers.0.block_sparse_moe.experts", ("w1", "w2", "w3")
    qwen = "model.layers.0.mlp.experts", ("gate_proj", "down_proj", "up_proj")
    gptq = [("autoround/gptq-w4g32-sym", seeds.gptq_seeds(base)), ("autogptq-layout/sym", seeds.gptq_seeds(base))]
    planned = [
        ("qkit/w4a16", seeds.compressed_seeds(base)),
        ("llmcompressor/w4a16-g128", seeds.compressed_seeds(base)),
        ("qkit/w4a16-kv", seeds.cache_seeds()),
        ("llmcompressor/fp8-static-kv", seeds.cache_seeds()),
        ("modelopt/fp8-kv", seeds.cache_seeds("self_attn.k_proj.k_scale", ("k_proj.k_scale", "v_proj.v_scale"))),
        ("qkit/nvfp4", seeds.nvfp4_seeds()),
        ("llmcompressor/nvfp4a16", seeds.nvfp4_seeds()),
        ("modelopt/nvfp4", seeds.modelopt_seeds(base)),
        *gptq,
        ("qkit/group96", seeds.kernel_seeds()),
        ("qkit/w4a16_asym", seeds.engine_seeds()),
        ("autogptq-layout/ordered", seeds.ordered_seeds()),
        ("autoround/awq-w4g32-asym", seeds.awq_seeds()),
        ("autoawq-layout/gemm", seeds.awq_seeds()),
        ("transformers/fp8-block", seeds.fp8_seeds(base)),
        ("qkit/mixtral", expert_seeds(sound["qkit/mixtral"][1], *mixtral)),
        ("qkit/qwen3_moe", expert_seeds(sound["qkit/qwen3_moe"][1], *qwen)),
        ("qkit/q4_k", seeded_gguf.gguf_seeds()),
        ("llama.cpp/Q4_K_M", seeded_gguf.gguf_seeds()),
    ]
    return [(name, seed) for name, found in planned if name in sound for seed in found]


def check_sound(name: str, folder: Path, base: Path) -> dict[str, object]:
    """One sound file, without and with its original: all that was found."""
    lines = {}
    for label, original in (("alone", None), ("baseline", base)):
        started = time.monotonic()
        found = diagnose(folder, original)
        lines[label] = {
            "seconds": round(time.monotonic() - started, 2),
            "invented": [f.to_json() for f in found.findings if f.level == "fault"],
            "warnings": [
                f"{f.kind}: {f.found} ({', '.join(f.layers[:2])})" for f in found.findings if f.level == "warning"
            ],
        }
    return {"file": name, **lines}


def check_seed(name: str, seed: seeds.Seed, folder: Path, base: Path, work: Path) -> dict[str, object]:
    """One defect: seeded into a copy, and looked for."""
    copy = work / "seeded"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(folder, copy)
    seed.edit(copy)
    found = diagnose(copy, base if seed.baseline else None, seed.engine).findings
    hits = [f for f in found if f.kind in seed.kinds and f.level != "note" and any(seed.where in x for x in f.layers)]
    rest = [f for f in found if f not in hits and f.level != "note"]
    return {
        "file": name,
        "seeded": seed.name,
        "found": f"{hits[0].level}: {hits[0].kind}: {hits[0].layers[0]}: {hits[0].found}" if hits else None,
        "also": [f"{f.level}: {f.kind}: {f.layers[0]}: {f.found}"[:200] for f in rest],
    }


def main() -> None:
    """Make the corpus, look at it, and write what was found."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--files", type=Path)
    parser.add_argument("--llama-quantize", type=Path)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--defects-alone", action="store_true", help="leave the sound files out")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    asked.work.mkdir(parents=True, exist_ok=True)
    base = reference_models()["tiny-llama"]
    sound = {**own(asked.work, base), **compressors(asked.work, base)}
    sound |= {**llama_cpp(asked.work, base, asked.llama_quantize), **others(asked.files, base)}
    named = {name: paths for name, paths in sound.items() if name not in UNSERVED and not asked.defects_alone}
    clean = [check_sound(name, *paths) for name, paths in named.items()]
    for line in clean:
        for label in ("alone", "baseline"):
            for text in (*line[label]["invented"], *line[label]["warnings"]):  # type: ignore[index]
                print("sound", line["file"], label, text)
    defects = []
    for name, seed in plan_of(sound, base):
        defects.append(check_seed(name, seed, *sound[name], asked.work))
        if defects[-1]["found"] is None:
            print("MISSED", name, seed.name, defects[-1]["also"], flush=True)
    missed = [d for d in defects if d["found"] is None]
    invented = sum(len(line[label]["invented"]) for line in clean for label in ("alone", "baseline"))  # type: ignore[index]
    summary = {
        "sound_files": len(clean),
        "writers": sorted({str(line["file"]).partition("/")[0] for line in clean}),
        "invented_faults": invented,
        "seeded": len(defects),
        "found": len(defects) - len(missed),
    }
    print(json.dumps(summary))
    if asked.json is not None:
        asked.json.write_text(json.dumps({"summary": summary, "defects": defects, "sound": clean}, indent=1) + "\n")


if __name__ == "__main__":
    main()
