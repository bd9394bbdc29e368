"""Who makes the best checkpoint of a size: qkit's methods and rivals, on the same model, calibration rows and machine.

    python reports/comparison/run.py --model DIR --calib FILE --text NAME=FILE .. --lines LINES --name tiny-llama \\
        [--autoround PYTHON] [--llmcompressor PYTHON] [--slices 3] [--first N] [--only NAME ..] [--busy]

Each run is a command in a process of its own, on all cores: its wall-clock seconds (with export and proof, where the tool has
them) and its peak memory are measured. The calibration text is cut into ``--slices`` parts, and each part is one repetition.
Figures are of the checkpoint as it is read back from disk, in float32 arithmetic, in the first 200 windows of 512 tokens of
each text: perplexity, and KL divergence from the original. LINES gets one line per run; runs that are there are left out.
reports/comparison/NAME.json gets means over slices, with 95 % intervals over windows of the difference to each rival, and
NAME.png perplexity against bytes. Rivals whose interpreter is not given are left out.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from qkit.calibration.dataset import read_text
from qkit.runtime.loading import load, load_tokenizer
from qkit.evaluation.metrics import compare_windows
from qkit.files.safefile import read_header

HERE = Path(__file__).resolve().parent
WINDOW, WINDOWS = 512, 200
LEARNED = ("loss_weighted=true", "--synthetic-samples=192")  # chosen on the texts that are named in the README
SWEPT = ("sweeps=4",)
QKIT, AUTOROUND, LLMCOMPRESSOR = "qkit", "AutoRound", "llm-compressor"
# Between this process and the tool: Linux counts what a process was before it became another program to its peak, and this one
# holds models.
STARTER = """
import resource, subprocess, sys
code = subprocess.call(sys.argv[2:])
used = resource.getrusage(resource.RUSAGE_CHILDREN)
open(sys.argv[1], "w").write(f"{used.ru_maxrss} {used.ru_utime + used.ru_stime}")
sys.exit(code)
"""


@dataclass(frozen=True)
class Run:
    """One entry: a tool, a scheme, and how it is asked for it; options: of the method, or flags."""

    tool: str
    scheme: str
    group: int | None
    method: str
    options: tuple[str, ...] = ()

    @property
    def kind(self) -> str:
        """The same for all schemes."""
        return " ".join((self.tool, self.method, *self.options))

    def __str__(self) -> str:
        return f"{self.scheme} {self.group or ''}".rstrip() + f" {self.kind}"


def entries() -> list[Run]:
    """Everybody."""
    found = []
    for scheme, group in (("w4a16", None), ("w3a16", None), ("w2a16", 64)):
        found += [
            Run(QKIT, scheme, group, method, options)
            for method in ("rtn", "gptq")
            for options in ((), ("signed=true",))
        ]
        found += [Run(QKIT, scheme, group, "gptq", ("signed=true", *x)) for x in (SWEPT, (*SWEPT, "compensate=0.5"))]
        found.append(Run(QKIT, scheme, group, "auto"))
        found += [Run(QKIT, scheme, group, method) for method in ("signround", "gptq+signround")]
        found.append(Run(QKIT, scheme, group, "signround", LEARNED))
        found.append(Run(QKIT, scheme, group, "smoothquant+signround", LEARNED))  # for models with outliers
        found += [Run(AUTOROUND, scheme, group, "signround"), Run(LLMCOMPRESSOR, scheme, group, "gptq")]
    for scheme in ("nvfp4", "w4a8", "w8a8"):
        found += [Run(QKIT, scheme, None, method) for method in ("rtn", "gptq", "auto", "gptq+signround")]
        if scheme == "nvfp4":
            found += [
                Run(QKIT, scheme, None, "residual+gptq", x) for x in ((), SWEPT, ("share=0.5",), (*SWEPT, "share=0.5"))
            ]
            found += [Run(QKIT, scheme, None, "residual+auto", ("share=0.5",))]
        else:
            found += [Run(QKIT, scheme, None, "gptq", x) for x in (SWEPT, (*SWEPT, "compensate=0.5"))]
        found.append(Run(QKIT, scheme, None, "gptq+signround", LEARNED))
        found.append(Run(LLMCOMPRESSOR, scheme, None, "gptq"))
    return found


def command(run: Run, args: argparse.Namespace, calib: Path, out: Path) -> list[str] | None:
    """What is started; None where the tool is not there."""
    given = ["--model", args.model, "--calib", str(calib), "--out", str(out)]
    group = [] if run.group is None else ["--group-size", str(run.group)]
    if run.tool == QKIT:
        options = [x for o in run.options for x in ([o] if o.startswith("--") else ["--option", o])]
        start = [sys.executable, "-W", "ignore", "-c", "from qkit.commands import main; main()", "quantize"]
        return [*start, *given, "--scheme", run.scheme, "--method", run.method, *group, *options]
    python = args.autoround if run.tool == AUTOROUND else args.llmcompressor
    if python is None:
        return None
    if run.tool == AUTOROUND:
        return [python, str(HERE / "autoround.py"), *given, "--scheme", run.scheme.upper(), *group]
    if run.group is not None:
        return None  # its presets have groups of 128
    script = HERE.parent / "gptq_speed" / "llmcompressor_gptq.py"
    return [python, str(script), *given, "--scheme", run.scheme.upper(), "--json", str(out.with_suffix(".json"))]


def started(line: list[str]) -> tuple[float, int, float]:
    """(seconds, bytes of memory at the peak, seconds of processor time) of a command. Raises CalledProcessError."""
    # What the tool says is kept for a failure alone.
    with tempfile.TemporaryFile() as said, tempfile.NamedTemporaryFile("r") as peak:
        began = time.monotonic()
        code = subprocess.call([sys.executable, "-c", STARTER, peak.name, *line], stdout=said, stderr=subprocess.STDOUT)
        seconds = time.monotonic() - began
        if code:
            said.seek(0)
            raise subprocess.CalledProcessError(code, line, said.read())
        kilobytes, processor = peak.read().split()
        return seconds, 1024 * int(kilobytes), float(processor)


def model_of(run: Run, folder: Path) -> Any:
    """What was written, in float32."""
    if run.tool != AUTOROUND:  # both write compressed-tensors, which transformers multiplies with in bfloat16 alone
        return load(str(folder), dtype=torch.float32)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


class Remembered(torch.nn.Module):
    """A model whose logits are kept: each entry is compared with the same ones."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model, self.config = model, model.config
        self.seen: dict[bytes, Any] = {}

    def forward(self, input_ids: torch.Tensor, **given: Any) -> Any:
        """As the model's."""
        key = input_ids.numpy().tobytes()
        if key not in self.seen:
            self.seen[key] = self.model(input_ids=input_ids, **given)
        return self.seen[key]


def main() -> None:
    """Run what is not there yet, then write the table and the figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--calib", type=Path, required=True)
    parser.add_argument("--text", action="append", required=True, metavar="NAME=FILE")
    parser.add_argument("--lines", type=Path, required=True)
    parser.add_argument("--name", required=True)
    parser.add_argument("--autoround")
    parser.add_argument("--llmcompressor")
    parser.add_argument("--slices", type=int, default=3)
    parser.add_argument("--first", type=int, help="so many of the slices (default: all)")
    parser.add_argument("--busy", action="store_true", help="other work runs on the machine: the table has no seconds")
    parser.add_argument("--only", action="append", default=[], help="runs whose name begins so, repeatable")
    args = parser.parse_args()
    tokenizer = load_tokenizer(args.model)
    texts = {}
    for spec in args.text:
        name, _, file = spec.partition("=")
        ids = tokenizer(read_text(Path(file)), add_special_tokens=False, verbose=False)["input_ids"]
        texts[name] = torch.tensor(ids)
    lines = [json.loads(x) for x in args.lines.read_text().splitlines()] if args.lines.exists() else []
    done = {(x["run"], x["slice"]) for x in lines}
    original = Remembered(load(args.model, dtype=torch.float32))
    text = read_text(args.calib)
    for part in range(args.slices if args.first is None else args.first):
        for run in entries():
            if (str(run), part) in done or (args.only and not str(run).startswith(tuple(args.only))):
                continue
            work = Path(tempfile.mkdtemp())
            calib = work / "calib.txt"
            calib.write_text(sliced(text, part, args.slices), encoding="utf-8")
            line = command(run, args, calib, work / "out")
            if line is None:
                continue
            seconds, memory, _ = started(line)
            folder = next(work.glob("out/**/config.json")).parent
            size = sum(i.nbytes for f in folder.glob("*.safetensors") for i in read_header(f).values())
            entry: dict[str, Any] = {"run": str(run), "slice": part, "tool": run.tool, "kind": run.kind}
            entry |= {"scheme": run.scheme, "group": run.group}
            entry |= {"seconds": round(seconds, 1), "memory": memory, "bytes": None if run.tool == AUTOROUND else size}
            model = model_of(run, folder)
            for name, tokens in texts.items():
                with torch.inference_mode():
                    found = compare_windows(original, model, tokens, WINDOW, WINDOWS)
                for key, values in (("original", found.reference), ("nll", found.approx), ("kl", found.kl)):
                    entry.setdefault(key, {})[name] = [round(x, 6) for x in values.mean(1).tolist()]
            shutil.rmtree(work)
            with args.lines.open("a") as f:
                f.write(json.dumps(entry) + "\n")
            lines.append(entry)
            shown = {n: round(float(np.exp(np.mean(x))), 3) for n, x in entry["nll"].items()}
            print(run, f"slice {part}", f"{seconds:.0f} s", shown, flush=True)
    table = summary(lines, list(texts))
    if args.busy:
        for row in table:
            del row["seconds"]
    (HERE / f"{args.name}.json").write_text(json.dumps(table, indent=1) + "\n")
    figure(table, next(iter(texts)), HERE / f"{args.name}.png")


def sliced(text: str, part: int, parts: int) -> str:
    """A part of a text, from the start of a line."""
    first = 0 if part == 0 else text.index("\n", len(text) * part // parts) + 1
    return text[first : None if part + 1 == parts else len(text) * (part + 1) // parts]


def summary(lines: list[dict[str, Any]], texts: list[str]) -> list[dict[str, Any]]:
    """A row for each run: means over slices, and the difference of its perplexity to each rival of its scheme, negative where
    it is better, with the 95 % interval over windows (resampled, the same for both, slices averaged)."""
    chance = np.random.default_rng(0)
    runs: dict[str, list[dict[str, Any]]] = {}
    for x in lines:
        runs.setdefault(x["run"], []).append(x)
    rows = []
    sampled: dict[tuple[str, str], np.ndarray] = {}
    for t in texts:
        windows = len(lines[0]["nll"][t])
        samples = [np.arange(windows), *(chance.integers(0, windows, windows) for _ in range(10_000))]
        for name, each in runs.items():
            nll = np.array([x["nll"][t] for x in each])
            sampled[name, t] = np.mean([[np.exp(n[s].mean()) for s in samples] for n in nll], axis=0)
    sizes = {(x["scheme"], x["group"]): x["bytes"] for x in lines if x["tool"] == QKIT}
    for name, each in runs.items():
        first = each[0]
        row: dict[str, Any] = {"run": name, "tool": first["tool"], "kind": first["kind"], "scheme": first["scheme"]}
        row["slices"] = len(each)
        # Of AutoRound, whose weights are written dequantized, those of the same format as qkit packs it.
        row["bytes"] = first["bytes"] or sizes.get((first["scheme"], first["group"]))
        row["seconds"] = round(float(np.mean([x["seconds"] for x in each])), 1)
        row["memory"] = max((x["memory"] for x in each if x["memory"]), default=None)
        for t in texts:
            original = float(np.exp(np.mean(first["original"][t])))
            perplexities = [float(np.exp(np.mean(x["nll"][t]))) for x in each]
            row[t] = {
                "perplexity": round(float(np.mean(perplexities)), 3),
                "each": [round(p, 3) for p in perplexities],
                "increase": round(float(np.mean(perplexities)) - original, 3),
                "kl": round(float(np.mean([np.mean(x["kl"][t]) for x in each])), 6),
            }
            for rival, others in runs.items():
                same = others[0]["scheme"] == first["scheme"] and others[0]["tool"] != QKIT
                if first["tool"] == QKIT and same:
                    gap = sampled[name, t] - sampled[rival, t]
                    ends = np.quantile(gap[1:], (0.025, 0.975))
                    row[t][f"against {rival}"] = [round(float(v), 3) for v in (gap[0], *ends)]
        rows.append(row)
    return rows


def figure(table: list[dict[str, Any]], text: str, file: Path) -> None:
    """Perplexity on one text against bytes."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    drawing = Figure(figsize=(8, 5), layout="constrained")
    axes = drawing.add_subplot()
    kinds: dict[str, list[tuple[float, float]]] = {}
    for row in table:
        if row["bytes"]:
            kinds.setdefault(row["kind"], []).append((row["bytes"] / 1e6, row[text]["perplexity"]))
    for i, (label, points) in enumerate(kinds.items()):
        axes.plot(*zip(*sorted(points), strict=True), "o^sv*Dx+"[i % 8], label=label)
    axes.set(xlabel="MB", ylabel=f"perplexity, {text}", yscale="log")
    for each in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
        each("{x:g}")
    axes.legend(fontsize=7)
    FigureCanvasAgg(drawing).print_png(str(file))


if __name__ == "__main__":
    main()
