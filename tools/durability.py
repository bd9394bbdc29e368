"""Kills, races and full disks: does the same command give the same bytes, or one sentence?

    python tools/durability.py --json reports/reliability/durability.json

Kills: children that end as by kill -9, half of them right before a file operation, half at a random moment; the command is then
run again, and the result has to be that of an undisturbed run, byte for byte. Races: two children with one OUT and two job
folders. Full disks: a file system in memory (Linux, root) that is too small, then large enough. Needs the packages of
'qkit[test]'; the models are the tiny ones of tests/.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
os.environ.setdefault("OMP_NUM_THREADS", "1")

import qkit_data
import tiny_models
import tiny_vlms
import torch
from conftest import Quiet

from qkit.engine.partial_output import partial_path
from qkit.errors import QkitError
from qkit.workflows.quantize import Request, quantize

FILE_OPERATIONS = ("fsync", "rename", "replace", "unlink", "mkdir", "rmdir", "open")


def cases(folder: Path) -> dict[str, Request]:
    """Requests over methods, formats and kinds of models."""
    calib = folder / "calib.txt"
    calib.write_text(qkit_data.text_path("calibration").read_text(encoding="utf-8")[:6000], encoding="utf-8")
    models = {f: str(tiny_models.make(f, folder / f)) for f in ("llama", "mixtral", "opt", "qwen3_moe", "gpt_neox")}
    vlm = tiny_vlms.make("llava", folder / "llava")
    tiny_vlms.add_processor(vlm)
    text = {"calib": calib, "samples": 8, "seqlen": 32, "threads": 1}
    wanted: list[tuple[str, str, str, int | None, dict[str, Any]]] = [
        ("llama", "w4a16", "gptq", 32, {}),
        ("llama", "w8a8", "smoothquant+gptq", None, {}),
        ("llama", "nvfp4", "residual+gptq", None, {}),
        ("llama", "w4a16", "awq", 32, {}),
        ("llama", "w3a16", "rotate+gptq", 32, {"significant": 0.5, "outliers": 1.0}),
        ("llama", "w4a16", "gptq+signround", 32, {"options": {"steps": 4}}),
        ("llama", "w4a16", "signround", 32, {"options": {"steps": 4, "e2e_steps": 4}, "synthetic_samples": 4}),
        ("llama", "w4a16", "auto", 32, {}),
        ("llama", "w3a16", "gptq", 32, {"rank": 4}),
        ("llama", "mxfp4", "rtn", None, {}),
        ("mixtral", "w4a16", "gptq", 32, {}),
        ("qwen3_moe", "nvfp4", "gptq", None, {}),
        ("opt", "fp8", "awq", None, {}),
        ("gpt_neox", "w4a16_asym", "rtn", 32, {}),
    ]
    found = {
        f"{m} {s} {x}": Request(model=models[m], scheme=s, method=x, group_size=g, **{**text, **more})
        for m, s, x, g, more in wanted
    }
    found["llava w4a16 gptq"] = Request(
        model=str(vlm), scheme="w4a16", method="gptq", group_size=32, samples=4, threads=1
    )
    return found


def contents(folder: Path) -> dict[str, str]:
    return {
        str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in sorted(folder.rglob("*"))
        if p.is_file()
    }


def in_child(action: Callable[[], object]) -> tuple[int, str]:
    """(wait status, message of the error) of a forked child."""
    return end(*begin(action))


def begin(action: Callable[[], object]) -> tuple[int, int]:
    """(pid, end of a pipe for the message) of a forked child."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid:
        os.close(writer)
        return pid, reader
    os.close(reader)
    code, message = 99, ""
    try:
        action()
        code = 0
    except QkitError as e:
        code, message = e.exit_code, str(e)
    except BaseException as e:
        message = f"{type(e).__name__}: {e}"
    os.write(writer, message.encode()[:4000])
    os._exit(code)


def end(pid: int, reader: int) -> tuple[int, str]:
    """Wait for a child."""
    with os.fdopen(reader, "rb") as pipe:
        message = pipe.read().decode(errors="replace")
    return os.waitpid(pid, 0)[1], message


def counting(request: Request, out: Path, number: int, counted: int | None = None) -> None:
    """Quantize; end as by kill -9 right before the ``number``-th file operation that changes something. counted: where to write
    how many there were."""
    left = number

    def wrapped(real: Callable[..., Any], name: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal left
            flags = args[1] if len(args) > 1 and isinstance(args[1], int) else 0
            if name != "open" or flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
                left -= 1
                if left == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
            return real(*args, **kwargs)

        return call

    for name in FILE_OPERATIONS:
        setattr(os, name, wrapped(getattr(os, name), name))
    quantize(request, out, Quiet())
    if counted is not None:
        os.write(counted, str(number - left).encode())


def killed(status: int) -> bool:
    return os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL


@dataclass(frozen=True)
class Clean:
    """An undisturbed run: {file: sha256} of its result, file operations, seconds."""

    files: dict[str, str]
    operations: int
    seconds: float


def undisturbed(request: Request, out: Path) -> Clean:
    reader, writer = os.pipe()
    began = time.monotonic()
    status, message = in_child(lambda: counting(request, out, 10**9, writer))
    assert status == 0, message
    return Clean(contents(out), int(os.read(reader, 20)), time.monotonic() - began)


def kill_at_operation(request: Request, out: Path, clean: Clean, chance: random.Random) -> bool:
    return killed(in_child(lambda: counting(request, out, chance.randint(1, clean.operations)))[0])


def kill_at_moment(request: Request, out: Path, clean: Clean, chance: random.Random) -> bool:
    pid = os.fork()
    if pid == 0:
        quantize(request, out, Quiet())
        os._exit(0)
    time.sleep(clean.seconds * chance.uniform(0.05, 0.95))
    os.kill(pid, signal.SIGKILL)
    return killed(os.waitpid(pid, 0)[1])


def kills(folder: Path, requests: dict[str, Request], count: int, chance: random.Random) -> dict[str, Any]:
    """``count`` kills, spread over the requests in turn."""
    known: dict[str, Clean] = {}
    hits, wrong, rows = 0, [], Counter[str]()
    for number in range(count):
        name = list(requests)[number % len(requests)]
        request, out = requests[name], folder / "killed" / str(number)
        if name not in known:
            known[name] = undisturbed(request, folder / "clean" / name.replace(" ", "-"))
        clean = known[name]
        hits += (kill_at_operation if number % 2 else kill_at_moment)(request, out, clean, chance)
        half_written = out.exists() and contents(out) != clean.files
        status, message = in_child(partial(quantize, request, out, Quiet()))
        sound = not status and not half_written and contents(out) == clean.files and not partial_path(out).exists()
        if not sound:
            wrong.append({"case": name, "number": number, "message": message})
        rows[name] += 1
        print(f"kill {number + 1}/{count}: {name}: {'ok' if sound else message}", flush=True)
    return {"kills": count, "hit a live run": hits, "cases": dict(rows), "wrong": wrong}


def races(folder: Path, request: Request, count: int, chance: random.Random) -> dict[str, Any]:
    """Two children with one OUT and two job folders, begun up to half a run apart."""
    clean = undisturbed(request, folder / "race-clean")
    ends, wrong = Counter[str](), []
    for number in range(count):
        out, codes, messages = folder / "races" / str(number), [], []
        running = []
        for i in range(2):
            running.append(begin(partial(quantize, request, out, Quiet(), work=Path(f"{out}.job{i}"))))
            time.sleep(chance.uniform(0, clean.seconds / 2) if number % 4 else 0)
        for child in running:
            status, message = end(*child)
            codes.append(os.waitstatus_to_exitcode(status))
            messages.append(message)
        sound = min(codes) == 0 and max(codes) in (0, 2, 6) and contents(out) == clean.files
        ends[str(sorted(codes))] += 1
        if not sound or partial_path(out).exists() or any("fault of qkit" in m for m in messages):
            wrong.append({"number": number, "codes": codes, "messages": messages})
        print(f"race {number + 1}/{count}: exit codes {sorted(codes)}", flush=True)
    return {"races": count, "exit codes": dict(ends), "wrong": wrong}


def full_disks(folder: Path, requests: dict[str, Request], count: int) -> dict[str, Any]:
    """Runs on a disk of ``count`` sizes between nothing and enough, and the same command once there is room."""
    wrong, ends, known = [], Counter[str](), {}
    for number in range(count):
        name = list(requests)[number % 3]
        request, place = requests[name], folder / f"disk{number}"
        if name not in known:
            clean = folder / "clean-disk" / name.replace(" ", "-")
            assert in_child(partial(quantize, request, clean, Quiet(), keep_job=True))[0] == 0
            written = [p for p in (*clean.rglob("*"), *Path(f"{clean}.job").rglob("*")) if p.is_file()]
            known[name] = contents(clean), sum(p.stat().st_size for p in written)
        files, needed = known[name]
        size = 64 * 1024 + int(needed * number / (count - 1))
        row = _on_a_disk(request, place, files, size)
        ends[f"exit {row['code']}"] += 1
        if not row["sound"]:
            wrong.append({"case": name, **row})
        print(f"disk {number + 1}/{count}: {size} bytes, exit {row['code']}: {row['message'][:100]}", flush=True)
    return {"disks": count, "ends": dict(ends), "wrong": wrong}


def _on_a_disk(request: Request, place: Path, files: dict[str, str], size: int) -> dict[str, Any]:
    """What came of a run on a disk of so many bytes, and then on a larger one."""
    out = place / "out"
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", place], check=True)
    try:
        status, message = in_child(partial(_without_forecast, request, out))
        code = os.waitstatus_to_exitcode(status)
        done = code == 0 and contents(out) == files
        sentence = code == 5 and ("room" in message or "space" in message.lower()) and not out.exists()
        subprocess.run(["mount", "-o", "remount,size=256m", place], check=True)
        again, last = in_child(partial(quantize, request, out, Quiet()))
        sound = (done or sentence) and again == 0 and contents(out) == files
        return {"size": size, "code": code, "message": message, "again": last, "sound": sound}
    finally:
        subprocess.run(["umount", place], check=False)


def _without_forecast(request: Request, out: Path) -> None:
    """A run whose disk fills up while it works: the check beforehand would refuse it."""
    import qkit.workflows.quantize

    qkit.workflows.quantize.refuse_what_cannot_fit = lambda *_: None  # in this child alone
    quantize(request, out, Quiet())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=60)
    parser.add_argument("--races", type=int, default=40)
    parser.add_argument("--disks", type=int, default=20)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    chance, figures = random.Random(options.seed), {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        requests = cases(folder)
        first = replace(next(iter(requests.values())), method="rtn")
        if options.races:
            figures["races"] = races(folder, first, options.races, chance)
        if options.disks:
            figures["full disks"] = full_disks(folder, requests, options.disks)
        if options.kills:
            figures["kills"] = kills(folder, requests, options.kills, chance)
    text = json.dumps(figures, indent=1)
    print(text)
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(text + "\n")
    sys.exit(any(f["wrong"] for f in figures.values()))


if __name__ == "__main__":
    main()
