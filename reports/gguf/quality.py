"""GGUF files of qkit and of llama.cpp's own quantizer, with the same type for each tensor, measured in the same code.

    python reports/gguf/quality.py --model DIR --name NAME --calib FILE --text FILE --tools BIN --lines LINES \\
        [--schemes q2_k,q3_k,..] [--samples 64] [--seqlen 256] [--windows 20] [--llama PYTHON] [--only NAME ..]

BIN holds llama-quantize and llama-imatrix. The model becomes a GGUF file in its own 16 bits, and llama-imatrix gets the calibration
tokens that qkit gets. For each scheme qkit makes its files, then llama-quantize makes one with the types of qkit's, without
and with the importance matrix. Every file is decoded by the library gguf into a model of transformers, in float32, and compared with
the original in the first windows of 512 tokens of the text: KL divergence and perplexity. With --llama, llama.cpp runs qkit's
files, too, and the same numbers as float32. LINES gets a line per file; files that are there are left out.
reports/gguf/NAME.json gets all figures, with 95 % intervals over windows of the ratio of each divergence to that of llama.cpp.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from torch import Tensor, nn
from plain_files import decoded, write_source
from transformers import AutoModelForCausalLM

from qkit.calibration.dataset import read_text, token_ids
from qkit.evaluation.metrics import compare_windows, split_windows
from qkit.families.structure import ModelStructure
from qkit.files.gguf_container import MODEL
from qkit.runtime.loading import load, load_tokenizer
from qkit.tensor.formats import GGUF_FORMATS
from qkit.workflows.own_arithmetic import input_blocks, rounded_inputs
from qkit.workflows.quantize import open_structure

HERE = Path(__file__).resolve().parent
sys.path.append(str(HERE.parents[1] / "tools"))
from gguf_floats import as_floats  # noqa: E402

WINDOW = 512
QKIT, LLAMA = "qkit", "llama.cpp"
# What is compared: who, how, and options.
METHODS: dict[str, tuple[str, ...]] = {
    "rtn": ("--method", "rtn"),
    "gptq": ("--method", "gptq"),
    "gptq sweeps=0 compensate=0": ("--method", "gptq", "--option", "sweeps=0", "--option", "compensate=0"),
    "best": ("--quality", "best"),
}
RIVALS = ("plain", "imatrix")


@dataclass(frozen=True)
class Bench:
    """What all files share."""

    args: argparse.Namespace
    structure: ModelStructure
    work: Path
    tokens: Tensor

    @property
    def source(self) -> Path:
        """The model as a GGUF file that is not quantized."""
        return self.work / "source.gguf"

    @property
    def matrix(self) -> Path:
        """The importance matrix."""
        return self.work / "imatrix.gguf"


def types_of(path: Path) -> dict[str, str]:
    """{tensor: type} of the quantized tensors of a file."""
    found = {t.name: t.tensor_type.name.lower() for t in gguf.GGUFReader(path).tensors}
    return {name: kind for name, kind in found.items() if kind in GGUF_FORMATS}


def ran(line: list[str]) -> float:
    """Seconds of a command. Raises CalledProcessError, whose output is printed."""
    began = time.monotonic()
    done = subprocess.run(line, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False)
    if done.returncode:
        sys.stderr.buffer.write(done.stdout[-4000:])
        raise subprocess.CalledProcessError(done.returncode, line)
    return time.monotonic() - began


def made_by_qkit(bench: Bench, scheme: str, options: tuple[str, ...], out: Path) -> float:
    """Seconds that qkit takes for its file."""
    args = bench.args
    line = [sys.executable, "-W", "ignore", "-c", "from qkit.commands import main; main()", "quantize"]
    line += ["--model", args.model, "--scheme", scheme, *options, "--out", str(out)]
    if "rtn" not in options:
        line += ["--calib", str(args.calib), "--samples", str(args.samples), "--seqlen", str(args.seqlen)]
    return ran(line)


def make_matrix(bench: Bench) -> None:
    """llama.cpp's importance matrix of the calibration tokens that qkit gets."""
    args = bench.args
    line = [str(args.tools / "llama-imatrix"), "-m", str(bench.source), "-f", str(args.calib), "-o", str(bench.matrix)]
    line += ["-c", str(args.seqlen), "-b", str(args.seqlen), "--chunks", str(args.samples), "-t", "1", "--no-ppl"]
    ran([*line, "--process-output"])


def made_by_llama(bench: Bench, types: dict[str, str], rival: str, out: Path) -> float:
    """Seconds of llama-quantize for a file with these types."""
    if rival == "imatrix" and not bench.matrix.exists():
        make_matrix(bench)
    listed = out.with_suffix(".types")
    # Names of tensors are regular expressions there, in small letters.
    listed.write_text("\n".join(f"^{re.escape(name)}$={kind}" for name, kind in types.items()))
    line = [str(bench.args.tools / "llama-quantize"), "--pure", "--tensor-type-file", str(listed)]
    for flag, name in (("--token-embedding-type", "token_embd.weight"), ("--output-tensor-type", "output.weight")):
        line += [flag, types[name]] if name in types else []
    line += ["--imatrix", str(bench.matrix)] if rival == "imatrix" else []
    seconds = ran([*line, str(bench.source), str(out), "Q8_0", "1"])
    if types_of(out) != types:
        raise SystemExit(f"{out}: llama-quantize gave other types than were asked for")
    return seconds


def filled(model: Any, values: dict[str, Tensor]) -> Any:
    """The model with these numbers."""
    missing, unexpected = model.load_state_dict(values, strict=False)
    if unexpected or [n for n in missing if n != "lm_head.weight" or not model.config.tie_word_embeddings]:
        raise SystemExit(f"the file and the model differ: {missing} {unexpected}")
    return model


class Remembered(nn.Module):
    """A model whose logits are kept: every file is compared with the same ones."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model, self.config = model, model.config
        self.seen: dict[bytes, Any] = {}

    def forward(self, input_ids: Tensor, **given: Any) -> Any:
        """As the model's."""
        key = input_ids.numpy().tobytes()
        if key not in self.seen:
            self.seen[key] = self.model(input_ids=input_ids, **given)
        return self.seen[key]


@torch.inference_mode()
def measured(bench: Bench, original: Any, model: Any) -> dict[str, list[float]]:
    """Means of each window: likelihoods of the original and of the file, and the divergence."""
    found = compare_windows(original, model, bench.tokens, WINDOW, bench.args.windows)
    pairs = (("original", found.reference), ("nll", found.approx), ("kl", found.kl))
    return {key: [round(x, 7) for x in values.mean(1).tolist()] for key, values in pairs}


def in_llama(bench: Bench, model: Any, path: Path) -> dict[str, Any]:
    """Perplexities in llama.cpp of the file and of its numbers as float32, beside those of qkit's model, which holds them."""
    windows = split_windows(bench.tokens, WINDOW, bench.args.llama_windows)
    plain = bench.work / "plain.gguf"
    as_floats(path, plain)
    tokens = bench.work / "tokens.json"
    tokens.write_text(json.dumps(windows.tolist()))
    result: dict[str, Any] = {"windows": len(windows)}
    for key, file in (("file", path), ("float32", plain)):
        line = [str(bench.args.llama), str(HERE.parents[1] / "tools" / "llama_logits.py"), str(file), str(tokens)]
        nll = json.loads(subprocess.run(line, capture_output=True, check=True, text=True).stdout)["nll"]
        result[key] = float(np.exp(np.mean(nll)))
    plain.unlink()
    with torch.inference_mode():
        result["qkit"] = _perplexity(model, windows)
        with rounded_inputs(model, input_blocks(path, model)):
            result["qkit, inputs rounded"] = _perplexity(model, windows)
    return {key: round(value, 5) for key, value in result.items()}


def _perplexity(model: Any, windows: Tensor) -> float:
    total = 0.0
    for ids in windows:
        logits = model(input_ids=ids[None], use_cache=False).logits[0, :-1].float()
        total -= float(logits.log_softmax(-1).gather(1, ids[1:, None]).double().mean())
    return float(np.exp(total / len(windows)))


def files(bench: Bench, scheme: str, wanted: set[str]) -> Iterator[tuple[str, Path, float]]:
    """(name, file, seconds) of each file of a scheme that is wanted."""
    types = bench.work / f"{scheme}.json"
    methods = [m for m in METHODS if f"{QKIT} {m}" in wanted]
    for method in methods or ([] if types.exists() else ["rtn"]):  # whose types llama.cpp's files get
        out = bench.work / "out"
        seconds = made_by_qkit(bench, scheme, METHODS[method], out)
        types.write_text(json.dumps(types_of(out / MODEL)))
        if method in methods:
            yield f"{QKIT} {method}", out / MODEL, seconds
        shutil.rmtree(out)
        shutil.rmtree(bench.work / "out.job", ignore_errors=True)
    for rival in RIVALS:
        if f"{LLAMA} {rival}" in wanted:
            out = bench.work / "rival.gguf"
            seconds = made_by_llama(bench, json.loads(types.read_text()), rival, out)
            yield f"{LLAMA} {rival}", out, seconds
            out.unlink()


def summary(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row per file: perplexity, divergence, and its ratio to that of llama.cpp's files of the scheme."""
    chance = np.random.default_rng(0)
    rows = []
    for x in lines:
        row = {key: x[key] for key in ("scheme", "file", "bytes", "calibration")}
        row["windows"] = len(x["kl"])
        row["original"] = round(float(np.exp(np.mean(x["original"]))), 4)
        row["perplexity"] = round(float(np.exp(np.mean(x["nll"]))), 4)
        row["kl"] = round(float(np.mean(x["kl"])), 6)
        for rival in RIVALS:
            other = next((y for y in lines if (y["scheme"], y["file"]) == (x["scheme"], f"{LLAMA} {rival}")), None)
            if other is None or not x["file"].startswith(QKIT):
                continue
            if other["bytes"] != x["bytes"]:
                raise SystemExit(f"{x['scheme']}: {x['file']} has {x['bytes']} bytes, {rival} {other['bytes']}")
            a, b = np.array(x["kl"]), np.array(other["kl"])
            drawn = chance.integers(0, len(a), (10_000, len(a)))
            ends = np.quantile(a[drawn].mean(1) / b[drawn].mean(1), (0.025, 0.975))
            row[f"against {rival}"] = [round(float(v), 4) for v in (a.mean() / b.mean(), *ends)]
        if "llama.cpp" in x:
            row["llama.cpp"] = x["llama.cpp"]
        rows.append(row)
    return rows


def arguments() -> argparse.Namespace:
    """Of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for flag in ("--model", "--name"):
        parser.add_argument(flag, required=True)
    for flag in ("--calib", "--text", "--tools", "--lines"):
        parser.add_argument(flag, type=Path, required=True)
    parser.add_argument("--llama", type=Path, help="interpreter with xllamacpp; without it llama.cpp runs no file")
    parser.add_argument("--llama-windows", type=int, default=8, help="windows that llama.cpp runs")
    parser.add_argument("--schemes", default=",".join(GGUF_FORMATS))
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--seqlen", type=int, default=256)
    parser.add_argument("--windows", type=int, default=20)
    parser.add_argument("--work", type=Path, help="folder that keeps the source file and the importance matrix")
    parser.add_argument("--only", action="append", default=[], help="files by name, repeatable: 'qkit gptq'")
    return parser.parse_args()


def main() -> None:
    """Make and measure what is not there yet, then write the table."""
    args = arguments()
    work = args.work or Path(tempfile.mkdtemp())
    work.mkdir(exist_ok=True)
    tokens = torch.tensor(token_ids(load_tokenizer(args.model), read_text(args.text)))
    structure = open_structure(args.model)
    bench = Bench(args, structure, work, tokens)
    if not bench.source.exists():
        write_source(structure, bench.source)
    lines = [json.loads(x) for x in args.lines.read_text().splitlines()] if args.lines.exists() else []
    original = Remembered(load(args.model, dtype=torch.float32))
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    everything = [*(f"{QKIT} {m}" for m in METHODS), *(f"{LLAMA} {r}" for r in RIVALS)]
    for scheme in args.schemes.split(","):
        done = {x["file"] for x in lines if x["scheme"] == scheme}
        for name, file, seconds in files(bench, scheme, {n for n in args.only or everything} - done):
            values, size = decoded(structure, file)
            entry: dict[str, Any] = {"scheme": scheme, "file": name, "bytes": size, "seconds": round(seconds, 1)}
            entry["calibration"] = args.samples * args.seqlen
            entry |= measured(bench, original, filled(model, values))
            if args.llama is not None and name.startswith(QKIT):
                entry["llama.cpp"] = in_llama(bench, model, file)
            lines.append(entry)
            with args.lines.open("a") as f:
                f.write(json.dumps(entry) + "\n")
            shown = f"kl {np.mean(entry['kl']):.5f} perplexity {np.exp(np.mean(entry['nll'])):.3f}"
            print(f"{scheme} {name}: {shown}, {seconds:.0f} s", entry.get("llama.cpp", ""), flush=True)
    (HERE / f"{args.name}.json").write_text(json.dumps(summary(lines), indent=1) + "\n")


if __name__ == "__main__":
    main()
