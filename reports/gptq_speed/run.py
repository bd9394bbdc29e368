"""GPTQ of qkit and of llm-compressor on the same model, rows and machine, one after the other.

    python reports/gptq_speed/run.py --rival-python RIVAL_VENV/bin/python --model DIR --calib FILE --name tiny-llama

Writes reports/gptq_speed/NAME.json: both tools' figures, their ratios, and the load of the machine around each run. A run
on a busy machine is worth nothing: look at the loads.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent


def run(python: str, script: str, args: argparse.Namespace, work: Path) -> dict[str, object]:
    """The figures of one tool in a process of its own."""
    figures = work / f"{script}.json"
    before = os.getloadavg()[0]
    command = [python, str(HERE / f"{script}.py"), "--model", str(args.model), "--calib", str(args.calib)]
    command += ["--out", str(work / f"{script}.out"), "--json", str(figures)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return {**json.loads(figures.read_text()), "load_before": before, "load_after": os.getloadavg()[0]}


def main() -> None:
    """Run both and write the comparison."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rival-python", required=True)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--calib", type=Path, required=True)
    parser.add_argument("--name", required=True)
    args = parser.parse_args()
    work = Path(tempfile.mkdtemp())
    try:
        ours = run(sys.executable, "qkit_gptq", args, work)
        rival = run(args.rival_python, "llmcompressor_gptq", args, work)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    result = {
        "model": args.name,
        "qkit": ours,
        "llm-compressor": rival,
        "ratio": {
            "time: qkit quantize (export and proof included) / oneshot": ours["quantize_s"] / rival["oneshot_s"],
            "time: whole process": ours["process_s"] / rival["process_s"],
            "peak memory: whole process": ours["peak_rss_bytes"] / rival["peak_rss_bytes"],
            "peak memory: rival without saving": ours["peak_rss_bytes"] / rival["peak_rss_before_save_bytes"],
        },
    }
    (HERE / f"{args.name}.json").write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result["ratio"], indent=1))


if __name__ == "__main__":
    main()
