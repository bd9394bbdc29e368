"""What ``--quality fast``, ``balanced`` and ``best`` give, on the same model, calibration text and machine.

    python reports/comparison/levels.py --model DIR --name smollm2 --calib FILE --text NAME=FILE .. --lines LINES \\
        [--autoround PYTHON] [--llmcompressor PYTHON] [--rival-group 64] [--schemes w4a16,w3a16,..] \\
        [--levels fast,balanced,best] [--windows 20] [--busy]

Each run is the command that a user types, with a scheme and a level and nothing else but the calibration text, in a process of
its own: peak memory, and seconds with export and proof, of the clock and of the processor.
Figures are of the packed file, loaded back, in float32 arithmetic: KL divergence from the original and perplexity in windows
of 512 tokens of each text, and KL on the original's greedy answers of up to 128 tokens to the prompts of ``qkit eval --suite``,
in its chat template. AutoRound runs with its defaults (weights alone), and llm-compressor with its GPTQ of the same rows
(quantized inputs). Their groups have 128 columns unless --rival-group says so: of a width that 128 does not divide qkit has
groups of 64, which have more bytes. A scheme as w3a16:64 has groups of 64 in all files, qkit's too. LINES gets a line per run;
runs that are there are left out.
reports/comparison/levels-NAME.json has means, and the ratio of each divergence to that of the level below and of the rival,
with 95 % intervals over windows, or answers (paired).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import run
import torch

from qkit.calibration.chats import Chats
from qkit.calibration.dataset import read_text
from qkit.evaluation.continuations import greedy_continuations
from qkit.evaluation.metrics import compare_logits, compare_windows
from qkit.evaluation.suite import NEW_TOKENS, read_prompts
from qkit.files.embedded import embedded_prompts
from qkit.planning.quality_levels import LEVELS
from qkit.runtime.loading import load, load_tokenizer

# Who else makes a file of a scheme, and how.
RIVALS = {s: (run.AUTOROUND, "signround") for s in ("w4a16", "w3a16", "w2a16")}
RIVALS |= {s: (run.LLMCOMPRESSOR, "gptq") for s in ("w8a8", "w4a8", "nvfp4")}
SCHEMES = "w4a16,w3a16,w2a16,w8a16,w8a8,w4a8,fp8,nvfp4,mxfp4,q4_k,q3_k"
CHAT, GROUPS = "chat", ", groups of "
COPIED = ("scheme", "level", "seconds", "processor", "memory", "bytes", "sha256")


def main() -> None:
    """Run what is not there yet, then write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--name", required=True)
    parser.add_argument("--calib", type=Path, required=True)
    parser.add_argument("--text", action="append", required=True, metavar="NAME=FILE")
    parser.add_argument("--lines", type=Path, required=True)
    parser.add_argument("--autoround")
    parser.add_argument("--llmcompressor")
    parser.add_argument("--rival-group", type=int)
    parser.add_argument("--schemes", default=SCHEMES)
    parser.add_argument("--levels", default=",".join(LEVELS))
    parser.add_argument("--windows", type=int, default=20)
    parser.add_argument("--busy", action="store_true", help="other work runs on the machine: the table has no seconds")
    args = parser.parse_args()
    tokenizer, texts = load_tokenizer(args.model), {}
    for spec in args.text:
        name, _, file = spec.partition("=")
        ids = tokenizer(read_text(Path(file)), add_special_tokens=False, verbose=False)["input_ids"]
        texts[name] = torch.tensor(ids[: args.windows * run.WINDOW])
    lines = [json.loads(x) for x in args.lines.read_text().splitlines()] if args.lines.exists() else []
    done = {(x["scheme"], x["level"]) for x in lines}
    original = run.Remembered(load(args.model, dtype=torch.float32))
    dialogues = chats(original.model, tokenizer)
    for scheme in args.schemes.split(","):
        given = {run.AUTOROUND: args.autoround, run.LLMCOMPRESSOR: args.llmcompressor}
        name, _, width = scheme.partition(":")
        tool, group = RIVALS[name][0] if name in RIVALS else None, width or args.rival_group
        rivals = [tool + (f"{GROUPS}{group}" if group else "")] if given.get(tool) else []
        for level in (*filter(None, args.levels.split(",")), *rivals):
            if (scheme, level) not in done:
                entry = measured(args, scheme, level, original, texts, dialogues)
                with args.lines.open("a") as f:
                    f.write(json.dumps(entry) + "\n")
                lines.append(entry)
                shown = {t: round(divergence(entry, t), 5) for t in entry["kl"]}
                print(
                    scheme, level, f"{entry['seconds']:.0f} s, {entry['memory'] / 1e9:.2f} GB, KL {shown}", flush=True
                )
    table = summary(lines)
    if args.busy:
        for row in table:
            del row["seconds"]  # those of the processor stay
    (run.HERE / f"levels-{args.name}.json").write_text(json.dumps(table, indent=1) + "\n")


def chats(model: Any, tokenizer: Any) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """[(prompt, the model's answer)], int64 [n]."""
    prompts = Chats(tokenizer).prompts([p["prompt"] for p in read_prompts(embedded_prompts())])
    questions = [torch.tensor(ids, dtype=torch.int64) for ids in prompts]
    return list(zip(questions, greedy_continuations(model, questions, [NEW_TOKENS] * len(questions)), strict=True))


@torch.inference_mode()
def on_chat(original: Any, model: Any, question: torch.Tensor, answer: torch.Tensor) -> Any:
    """The comparison of both models on an answer."""
    ids = torch.cat([question, answer])[None]
    of_answer = slice(len(question) - 1, -1)
    return compare_logits(
        original(input_ids=ids, use_cache=False).logits[:, of_answer],
        model(input_ids=ids, use_cache=False).logits[:, of_answer],
        answer[None],
    )


def measured(
    args: argparse.Namespace, scheme: str, level: str, original: Any, texts: dict[str, Any], dialogues: list[Any]
) -> dict[str, Any]:
    """One run, its file loaded back and measured. Under "kl" are means of windows, and sums of answers."""
    work, (name, _, width) = Path(tempfile.mkdtemp()), scheme.partition(":")
    tool = run.QKIT if level in LEVELS else level.partition(GROUPS)[0]
    if tool != run.QKIT:
        asked = run.Run(tool, name, int(width) if width else args.rival_group, RIVALS[name][1])
        line = run.command(asked, args, args.calib, work / "out")
        assert line is not None
    else:
        line = [sys.executable, "-W", "ignore", "-m", "qkit", "quantize", "--model", args.model, "--scheme", name]
        line += ["--group-size", width] if width else []
        line += ["--quality", level, "--calib", str(args.calib), "--out", str(work / "out")]
    seconds, memory, processor = run.started(line)
    folder = next(work.glob("out/**/config.json")).parent
    model = run.model_of(run.Run(tool, name, None, ""), folder)
    files = sorted((*folder.glob("*.safetensors"), *folder.glob("*.gguf")))
    entry: dict[str, Any] = {
        "scheme": scheme,
        "level": level,
        "seconds": round(seconds, 1),
        "processor": round(processor, 1),
        "memory": memory,
        "bytes": sum(f.stat().st_size for f in files),
        "sha256": hashlib.sha256(b"".join(hashlib.sha256(f.read_bytes()).digest() for f in files)).hexdigest(),
        "answers": [len(answer) for _, answer in dialogues],
    }
    for name, tokens in texts.items():
        with torch.inference_mode():
            found = compare_windows(original, model, tokens, run.WINDOW, args.windows)
        for key, values in (("original", found.reference), ("nll", found.approx), ("kl", found.kl)):
            entry.setdefault(key, {})[name] = [round(x, 7) for x in values.mean(1).tolist()]
    entry["kl"][CHAT] = [round(float(on_chat(original, model, *x).kl.sum()), 7) for x in dialogues]
    shutil.rmtree(work)
    return entry


def divergence(entry: dict[str, Any], name: str) -> float:
    """The mean over tokens of a text or of the answers."""
    values = entry["kl"][name]
    return float(np.sum(values) / np.sum(entry["answers"]) if name == CHAT else np.mean(values))


def summary(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row for each run, with ratios of divergences to the level below and to the rival."""
    found = {(x["scheme"], x["level"]): x for x in lines}
    rows = []
    for (scheme, level), x in found.items():
        row: dict[str, Any] = {k: x[k] for k in COPIED if k in x}
        for t in x["kl"]:
            row[t] = {"kl": divergence(x, t)}
            if t != CHAT:
                row[t]["perplexity"] = round(float(np.exp(np.mean(x["nll"][t]))), 3)
                row[t]["original"] = round(float(np.exp(np.mean(x["original"][t]))), 3)
            below = LEVELS[LEVELS.index(level) - 1] if level in LEVELS[1:] else None
            rivals = [other for of, other in found if of == scheme and other not in LEVELS] if level in LEVELS else []
            for other in (below, *rivals):
                if t in found.get((scheme, other), {"kl": ()})["kl"]:
                    row[t][f"to {other}"] = ratio(x["kl"][t], found[scheme, other]["kl"][t])
        rows.append(row)
    return rows


def ratio(ours: list[float], theirs: list[float]) -> list[float]:
    """The ratio of two divergences on the same tokens, with its 95 % interval over windows or answers, resampled as pairs."""
    one, two = np.array(ours), np.array(theirs)
    picks = np.random.default_rng(0).integers(0, len(one), (10_000, len(one)))
    each = one[picks].mean(1) / two[picks].mean(1)
    return [round(float(v), 4) for v in (one.mean() / two.mean(), *np.quantile(each, (0.025, 0.975)))]


if __name__ == "__main__":
    main()
