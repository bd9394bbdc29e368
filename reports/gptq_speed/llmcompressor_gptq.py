"""Measure GPTQ by llmcompressor on a local model: time, peak memory and, unless --no-save, a compressed checkpoint.

Its own defaults are kept (damping 0.01, block 128, static activation order, batches of one row); only the order of the
calibration rows is fixed. Everything runs where torch runs by default, with the threads torch takes by default.
"""

import argparse
import json
import os
import platform
import resource
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

PACKAGES = ("llmcompressor", "compressed-tensors", "torch", "transformers", "datasets")


def process_seconds() -> float:
    """Seconds since this process started, imports included (Linux; resolution of one clock tick, 10 ms)."""
    # The program's name is in parentheses and may hold spaces; the start time is field 22 of proc_pid_stat(5).
    after_name = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    started = int(after_name[22 - 3]) / os.sysconf("SC_CLK_TCK")
    return time.clock_gettime(time.CLOCK_BOOTTIME) - started


def peak_rss_bytes() -> int:
    """Largest resident memory of this process so far, shared pages and mapped files included."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def calibration_rows(text: str, tokenizer: PreTrainedTokenizerBase, samples: int, seqlen: int) -> Dataset:
    """The first `samples` consecutive rows of `seqlen` tokens of the text, tokenised whole without special tokens."""
    tokens = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    if len(tokens) < samples * seqlen:
        raise SystemExit(f"the text has {len(tokens)} tokens, {samples} x {seqlen} are needed: give a longer text")
    rows = [tokens[i * seqlen : (i + 1) * seqlen] for i in range(samples)]
    return Dataset.from_dict({"input_ids": rows, "attention_mask": [[1] * seqlen] * samples})


def measure(args: argparse.Namespace) -> dict[str, Any]:
    load_before = os.getloadavg()
    import_s = process_seconds()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.bfloat16)
    rows = calibration_rows(args.calib.read_text(encoding="utf-8"), tokenizer, args.samples, args.seqlen)
    prepare_s = process_seconds() - import_s
    peak_before_oneshot = peak_rss_bytes()

    start = time.perf_counter()
    oneshot(
        model=model,
        tokenizer=tokenizer,
        dataset=rows,
        recipe=GPTQModifier(targets="Linear", scheme=args.scheme, ignore=["lm_head"]),
        num_calibration_samples=args.samples,
        max_seq_length=args.seqlen,
        shuffle_calibration_samples=False,
    )
    oneshot_s = time.perf_counter() - start
    peak_before_save = peak_rss_bytes()

    save_s = None
    if not args.no_save:
        start = time.perf_counter()
        model.save_pretrained(args.out, save_compressed=True)
        tokenizer.save_pretrained(args.out)
        save_s = time.perf_counter() - start

    usage = resource.getrusage(resource.RUSAGE_SELF)
    return {
        "model": str(args.model),
        "scheme": args.scheme,
        "samples": args.samples,
        "seqlen": args.seqlen,
        "vocab_size": model.config.vocab_size,
        "import_s": import_s,
        "prepare_s": prepare_s,
        "oneshot_s": oneshot_s,
        "save_s": save_s,
        "process_s": process_seconds(),
        "cpu_s": usage.ru_utime + usage.ru_stime,
        "peak_rss_bytes": peak_rss_bytes(),
        "peak_rss_before_oneshot_bytes": peak_before_oneshot,
        "peak_rss_before_save_bytes": peak_before_save,
        "threads": torch.get_num_threads(),
        "cuda": torch.cuda.is_available(),
        "load_average_before": load_before,
        "load_average_after": os.getloadavg(),
        "versions": {"python": platform.python_version()} | {name: version(name) for name in PACKAGES},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="folder of the checkpoint and its tokenizer")
    parser.add_argument("--calib", type=Path, required=True, help="calibration text, UTF-8")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--seqlen", type=int, default=256)
    parser.add_argument("--scheme", default="W4A16")
    parser.add_argument("--out", type=Path, help="folder for the compressed checkpoint")
    parser.add_argument("--json", type=Path, required=True, help="file for the figures")
    parser.add_argument("--no-save", action="store_true", help="do not write the compressed checkpoint")
    args = parser.parse_args()
    if args.out is None and not args.no_save:
        parser.error("give --out or --no-save")

    text = json.dumps(measure(args), indent=2)
    args.json.write_text(text + "\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
