"""Every class of models that transformers (or diffusers) has built in, in tiny, through qkit: what works, and what is refused.

    python tools/sweep_models.py causal --json sweep.json
    python tools/sweep_models.py image-text --only qwen3_vl,gemma3 --workers 2

Kinds: causal, image-text, encoders, diffusers. One line for each class: rtn and gptq in w4a16; the share of the weights of
matrix products in the blocks that is quantized or has a reason; how far qkit.load is from the stock model with fake-quantized
weights; how far stock transformers is that loads the folder, where qkit says that it does; and the refusal, or what went
wrong. An error that is not one of qkit's is marked TRACEBACK.
"""

from __future__ import annotations

import argparse
import json
import os
import queue
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
TARGETS = {"causal": 95, "image-text": 85, "encoders": 85, "diffusers": 90}  # per cent of the classes that can be built
TOLERANCE = 1e-5
BATCH = 8  # classes in one process: small enough that its memory stays small
_WIDTHS = (30, 8, 10, 9, 8, 8)


def environment() -> dict[str, str]:
    """That of a worker: the packages of this checkout first, one thread."""
    paths = [HERE.parent, HERE.parent / "calib_data", HERE.parent / "kernels", HERE]
    found = os.environ.get("PYTHONPATH")
    joined = os.pathsep.join([*map(str, paths), *([found] if found else [])])
    return {**os.environ, "PYTHONPATH": joined, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def run_batch(kind: str, names: list[str], limit: float) -> Iterator[dict[str, Any]]:
    """The results of some classes, in one process; a class that ends it or takes too long costs no other its result."""
    left = list(names)
    while left:
        done, at, ended = _run_process(kind, left, limit)
        if ended is None:
            yield from done.values()
            return
        culprit = at if at in left else left[0]
        yield {
            "type": culprit,
            "class": "",
            "built": True,
            "rtn": "TRACEBACK",
            "reasons": {"rtn": f"TRACEBACK {ended}"},
        }
        left.remove(culprit)


def _run_process(kind: str, names: list[str], limit: float) -> tuple[dict[str, Any], str, str | None]:
    """({type: result}, the class that was being worked on, how the process ended if not well)."""
    results: dict[str, Any] = {}
    at, ended = "", None
    with tempfile.TemporaryDirectory(prefix="qkit-sweep-") as folder, tempfile.TemporaryFile("w+") as said:
        command = [sys.executable, str(HERE / "sweep_worker.py"), kind, folder, *names]
        work = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=said, text=True, env=environment())
        lines: queue.Queue[str | None] = queue.Queue()
        threading.Thread(target=_read, args=(work.stdout, lines), daemon=True).start()
        while True:
            try:
                line = lines.get(timeout=limit * (len(names) if at == "stock" else 1))
            except queue.Empty:
                ended = f"it took longer than {limit:.0f} seconds"
                work.kill()
                break
            if line is None:
                break
            event = json.loads(line)
            at = event.get("begins", at)
            if "result" in event:
                results[event["result"]["type"]] = event["result"]
        if work.wait() != 0 and ended is None:
            said.seek(0)
            ended = f"the process ended with {work.returncode}: {' '.join(said.read()[-300:].split())}"
    return results, at, ended


def _read(stream: Any, lines: queue.Queue[str | None]) -> None:
    for line in stream:
        lines.put(line)
    lines.put(None)


def complete(result: dict[str, Any]) -> bool:
    """Whether everything that the sweep asks of a class holds. 'ok' of a method says that it loads equal, too."""
    stock = result.get("stock")
    loads = stock == "not claimed" or (isinstance(stock, float) and stock <= TOLERANCE)
    calibrated = result.get("gptq") == "ok" or (result.get("gptq") == "refused" and not text_alone(result))
    return bool(result.get("rtn") == "ok" and calibrated and loads and result.get("covered", 0) > 99.999)


def text_alone(result: dict[str, Any]) -> bool:
    """Whether tokens are all that the class reads: to calibrate others, sound or pictures are needed that are not here."""
    return all(name.endswith("_ids") for name in result.get("inputs", []))


def line(result: dict[str, Any]) -> str:
    """One line of the table."""
    if not result["built"]:
        return f"{result['type']:{_WIDTHS[0]}} {result.get('reason', '')}"
    loads = [n for n in (result.get("rtn_load"), result.get("gptq_load")) if n is not None]
    covered = f"{result['covered']:.4g}%" if "covered" in result else "-"
    cells = [
        result["type"],
        result.get("rtn", "-"),
        result.get("gptq", "-"),
        covered,
        _number(max(loads, default=None)),
    ]
    cells.append(_number(result.get("stock")))
    text = " ".join(f"{cell:{width}}" for cell, width in zip(cells, _WIDTHS, strict=True))
    return f"{text} {reason(result)}".rstrip()


def _number(value: Any) -> str:
    if isinstance(value, float):
        return "0" if value == 0 else f"{value:.0e}"
    return {None: "-", "not claimed": "no claim"}.get(value, str(value))


def reason(result: dict[str, Any]) -> str:
    """Why a class is not complete, once for equal reasons."""
    by_text: dict[str, list[str]] = {}
    for what, text in result.get("reasons", {}).items():
        by_text.setdefault(text, []).append(what)
    said = [f"{'/'.join(what)}: {text}" for text, what in by_text.items()]
    if result.get("missing"):
        said.append(f"neither format nor reason: {', '.join(result['missing'])}")
    return "; ".join(said)


def totals(kind: str, results: list[dict[str, Any]]) -> dict[str, Any]:
    """Counts and shares over the classes that can be built."""
    built = [r for r in results if r["built"]]
    stock = [r for r in built if isinstance(r.get("stock"), float) or r.get("stock") == "fails"]
    counts = {
        "classes": len(results),
        "built": len(built),
        "rtn": sum(r.get("rtn") == "ok" for r in built),
        "gptq": sum(r.get("gptq") == "ok" for r in built),
        "gptq_without_data": sum(r.get("gptq") == "refused" and not text_alone(r) for r in built),
        "covered": sum(r.get("covered", 0) > 99.999 for r in built),
        "stock_claimed": len(stock),
        "stock_equal": sum(isinstance(r.get("stock"), float) and r["stock"] <= TOLERANCE for r in stock),
        "complete": sum(map(complete, built)),
        "refused": sum("refused" in (r.get("rtn"), r.get("gptq")) for r in built),
        "wrong": sum("wrong" in (r.get("rtn"), r.get("gptq")) for r in built),
        "tracebacks": sum("TRACEBACK" in json.dumps(r) for r in built),
    }
    share = 100 * counts["complete"] / max(len(built), 1)
    return {**counts, "share": share, "target": TARGETS[kind], "met": share >= TARGETS[kind]}


def sweep(kind: str, names: list[str], workers: int, limit: float) -> list[dict[str, Any]]:
    """The results of all classes, each printed as it comes, in the order of ``names``."""
    print(
        " ".join(
            f"{c:{w}}" for c, w in zip(("class", "rtn", "gptq", "covered", "load", "stock"), _WIDTHS, strict=True)
        ),
        "reason",
    )
    waiting: queue.SimpleQueue[list[str]] = queue.SimpleQueue()
    for i in range(0, len(names), BATCH):
        waiting.put(names[i : i + BATCH])
    results: dict[str, dict[str, Any]] = {}

    def work() -> None:
        while True:
            try:
                batch = waiting.get_nowait()
            except queue.Empty:
                return
            for result in run_batch(kind, batch, limit):
                results[result["type"]] = result
                print(line(result), flush=True)

    threads = [threading.Thread(target=work) for _ in range(workers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [results[name] for name in names]


def report(kind: str, results: list[dict[str, Any]]) -> dict[str, Any]:
    """Print the total; gives what --json writes."""
    found = totals(kind, results)
    print(
        f"\n{found['built']} of {found['classes']} {kind} classes can be built here. rtn {found['rtn']}, gptq {found['gptq']} "
        f"(refused for want of sound or pictures: {found['gptq_without_data']}), fully covered {found['covered']}, "
        f"stock transformers equal {found['stock_equal']} of {found['stock_claimed']} where qkit says so. "
        f"Refused {found['refused']}, wrong {found['wrong']}, tracebacks {found['tracebacks']}.\n"
        f"Everything holds for {found['complete']}: {found['share']:.1f} % (target {found['target']} %: "
        f"{'met' if found['met'] else 'not met'})."
    )
    return {"kind": kind, "total": found, "classes": results}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=sorted(TARGETS))
    parser.add_argument("--only", help="model types, separated by commas")
    parser.add_argument("--json", type=Path, help="write the results there")
    parser.add_argument("--workers", type=int, default=1, help="processes at once")
    parser.add_argument("--limit", type=float, default=180, help="seconds that a class may take")
    asked = parser.parse_args(arguments)
    if asked.kind == "diffusers":
        return _diffusers(asked)
    names = _names(parser, asked.kind, asked.only)
    found = report(asked.kind, sweep(asked.kind, names, asked.workers, asked.limit))
    if asked.json:
        asked.json.write_text(json.dumps(found, indent=1) + "\n")
    return 0 if found["total"]["met"] else 1


def _names(parser: argparse.ArgumentParser, kind: str, only: str | None) -> list[str]:
    sys.path.insert(0, str(HERE))
    import sweep_configs

    known = sweep_configs.names(kind)
    asked = known if only is None else only.split(",")
    unknown = [name for name in asked if name not in known]
    if unknown:
        parser.error(f"--only {unknown[0]}: transformers has no {kind} class of this model type")
    return asked


def _diffusers(asked: argparse.Namespace) -> int:
    """The sweep of diffusers' classes, which builds its models in its own way."""
    sys.path.insert(0, str(HERE))
    try:
        import sweep_diffusers  # type: ignore[import-not-found, unused-ignore]
    except ImportError as error:
        print(
            f"sweep of diffusers: {error}: it needs tools/sweep_diffusers.py and the diffusers package", file=sys.stderr
        )
        return 2
    given = ["--json", str(asked.json)] if asked.json else []
    return int(sweep_diffusers.main([*given, *(["--only", asked.only] if asked.only else [])]))


if __name__ == "__main__":
    sys.exit(main())
