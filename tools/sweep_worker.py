"""One class of a sweep: its tiny model through qkit, and what came out compared with references. Prints one JSON object.

    python tools/sweep_worker.py causal FOLDER llama qwen3 ...

A line is printed when a class begins ({"begins": model_type}) and one with its result. Stock transformers looks at all
outputs of the process at its end, in a process of its own that never imports qkit.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
import traceback
import warnings
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import sweep_configs
import sweep_inputs
import torch
import transformers
from safetensors.torch import load_file, save_file
from sweep_reference import Coverage, Lost, load_stock, reference

METHODS = ("rtn", "gptq")
TOLERANCE = 1e-5
STOCK = "transformers + compressed-tensors"


def one_line(error: BaseException, scratch: Path) -> str:
    """The error in one line: as qkit says it, or marked as what no user should see."""
    from qkit.errors import QkitError

    text = " ".join(str(error).replace(f"{scratch}/", "").split())
    text = text.replace("rtn.", "OUT.").replace("gptq.", "OUT.")
    if isinstance(error, QkitError):
        return f"{type(error).__name__}: {text}"
    last = traceback.extract_tb(error.__traceback__)[-1]
    return f"TRACEBACK {type(error).__name__}: {text[:300]} ({Path(last.filename).name}:{last.lineno})"


def relative(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """Norm of the difference over the norm of ``wanted``; infinite where a value is not finite."""
    if found.shape != wanted.shape or not (found.isfinite().all() and wanted.isfinite().all()):
        return float("inf")
    return float((found.double() - wanted.double()).norm() / wanted.double().norm())


def run_class(kind: str, model_type: str, scratch: Path) -> dict[str, Any]:
    """What happened to one class; the folders stay in ``scratch`` for the look of stock transformers."""
    result: dict[str, Any] = {"type": model_type, "class": "", "built": False}
    source = scratch / "source"
    began = time.monotonic()
    try:
        sweep_configs.save(kind, model_type, source)
        model = load_stock(source)
        inputs = sweep_inputs.inputs_of(model_type, model)
        if not sweep_inputs.call(model, inputs).isfinite().all():
            raise ValueError("the output of the model itself is not finite")
        result["inputs"] = sorted(inputs)
        sweep_inputs.write(inputs, scratch / "inputs.safetensors")
        result["class"] = json.loads((source / "config.json").read_text())["architectures"][0]
        result["built"] = True
    except Exception as error:  # whatever a class of transformers raises
        result["reason"] = f"not built: {type(error).__name__}: {' '.join(str(error).split())[-200:]}"
        return result
    for method in METHODS:
        result[method] = _method(kind, source, scratch / method, method, result)
    result["seconds"] = round(time.monotonic() - began, 1)
    return result


def _method(kind: str, source: Path, out: Path, method: str, result: dict[str, Any]) -> str:
    """'ok', 'refused' or 'TRACEBACK'; fills in coverage, differences and reasons."""
    import qkit
    from qkit.files.embedded import embedded_text

    options: dict[str, Any] = {} if method == "rtn" else {"samples": 8, "seqlen": 64}
    if options and kind == "image-text":  # their default is text with pictures, which asks for a processor
        options["calib"] = embedded_text("calibration")
    try:
        report = qkit.quantize(source, out=out, scheme="w4a16", method=method, threads=1, **options)
    except Exception as error:  # an error that is not qkit's is what the sweep looks for
        result.setdefault("reasons", {})[method] = one_line(error, out.parent)
        return "TRACEBACK" if one_line(error, out.parent).startswith("TRACEBACK") else "refused"
    record = json.loads((out / "qkit.json").read_text())
    result["fallbacks"] = sum(bool(linear["fallback"]) for linear in record["linears"].values())
    engines = [row for row in report.to_json()["engines"] if row["engine"] == STOCK]
    refusals = [" ".join(row["limits"]) for row in engines if row["loads_as"] is None]
    result["claim"] = refusals[0] if refusals else "loads"
    try:
        result |= Coverage(source, record).summary()
        model, inputs = (
            reference(source, out, out.parent / "reference"),
            sweep_inputs.read(source.parent / "inputs.safetensors"),
        )
        wanted = sweep_inputs.call(model, inputs)
        result[f"{method}_load"] = relative(sweep_inputs.call(qkit.load(out, torch.float32), inputs), wanted)
        round_experts(model)
        save_file(
            {"wanted": wanted, "rounded": sweep_inputs.call(model, inputs)}, out.parent / f"{method}.wanted.safetensors"
        )
    except Lost as error:
        result.setdefault("reasons", {})[method] = f"LOST: {error}"
        return "wrong"
    except Exception as error:
        result.setdefault("reasons", {})[method] = f"after quantize: {one_line(error, out.parent)}"
        return "TRACEBACK" if "TRACEBACK" in one_line(error, out.parent) else "wrong"
    return "ok" if result[f"{method}_load"] <= TOLERANCE else "wrong"


def round_experts(model: Any) -> None:
    """Experts as stock transformers has them, which decompresses those of a layer into one tensor in bfloat16."""
    for p in model.parameters():
        if p.dim() == 3:
            p.data = p.data.bfloat16().float()


def stock(results: list[dict[str, Any]], scratch: Path) -> None:
    """Adds what stock transformers makes of the outputs that qkit says it loads."""
    jobs = {}
    for result in results:
        method = next((m for m in reversed(METHODS) if result.get(m) in ("ok", "wrong")), None)
        if method and result.get("claim") == "loads" and f"{method}_load" in result:
            jobs[result["type"]] = str(scratch / result["type"] / method)
        elif method:
            result["stock"] = "not claimed"
    if not jobs:
        return
    script = Path(__file__).with_name("sweep_stock.py")
    done = subprocess.run([sys.executable, script], input=json.dumps(jobs), capture_output=True, text=True)
    answers = json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else {}
    for result in results:
        if result["type"] not in jobs:
            continue
        error, folder = answers.get(result["type"], f"the process ended: {done.stderr[-200:]}"), jobs[result["type"]]
        if error is None:
            found = load_file(f"{folder}.stock.safetensors")["logits"]
            result["stock"] = min(
                relative(found, wanted) for wanted in load_file(f"{folder}.wanted.safetensors").values()
            )
        else:
            result["stock"] = "fails"
            result.setdefault("reasons", {})["stock"] = error


def main(kind: str, folder: str, *model_types: str) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    scratch, results = Path(folder), []
    for model_type in model_types:
        print(json.dumps({"begins": model_type}), flush=True)
        with redirect_stdout(sys.stderr):
            results.append(run_class(kind, model_type, scratch / model_type))
    print(json.dumps({"begins": "stock"}), flush=True)
    stock(results, scratch)
    for result in results:
        print(json.dumps({"result": result}), flush=True)
        shutil.rmtree(scratch / result["type"], ignore_errors=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
