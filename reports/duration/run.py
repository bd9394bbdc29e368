"""The seconds that ``qkit plan`` estimates beside those that ``qkit quantize`` takes: whole commands, with export and proof.

    python reports/duration/run.py --model DIR --name tiny-llama --calib FILE [--cases w4a16:fast,w4a16:balanced,..] [--threads 1]

Each case is a scheme and a level of --quality. The estimate is made right before its run. reports/duration/NAME.json gets a row
for each case: estimated, measured, and their ratio. The machine has to be idle, or each process to have a core of its own.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
CASES = "w4a16:fast,w4a16:balanced,w4a16:best,w8a8:balanced,nvfp4:balanced,nvfp4:best,q4_k:fast,q4_k:balanced"
QKIT = [sys.executable, "-W", "ignore", "-m", "qkit"]


def main() -> None:
    """Estimate and run every case that is not there yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for flag in ("--model", "--name", "--calib"):
        parser.add_argument(flag, required=True)
    parser.add_argument("--cases", default=CASES)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    file = HERE / f"{args.name}.json"
    rows = json.loads(file.read_text()) if file.exists() else []
    done = {(r["scheme"], r["quality"], r["threads"]) for r in rows}
    for case in args.cases.split(","):
        scheme, _, quality = case.partition(":")
        if (scheme, quality, args.threads) in done:
            continue
        work = Path(tempfile.mkdtemp())
        asked = ["--model", args.model, "--scheme", scheme, "--quality", quality, "--calib", args.calib]
        asked += ["--threads", str(args.threads)]
        subprocess.run([*QKIT, "plan", *asked, "--json", work / "plan.json"], capture_output=True, check=True)
        forecast = json.loads((work / "plan.json").read_text())["forecast"]
        began = time.monotonic()
        subprocess.run([*QKIT, "quantize", *asked, "--out", work / "out"], capture_output=True, check=True)
        measured = time.monotonic() - began
        shutil.rmtree(work)
        row = {"scheme": scheme, "quality": quality, "threads": args.threads, "estimated": forecast["seconds"]}
        row |= {"measured": round(measured, 1), "ratio": round(forecast["seconds"] / measured, 3)}
        print(row, forecast["seconds_by_phase"], flush=True)
        rows.append(row)
        file.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
