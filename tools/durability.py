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
from dataclasses import replace
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

from qkit.errors import QkitError
from qkit.export.partial import partial_path
from qkit.pipeline import Request, quantize

FILE_OPERATIONS = ("fsync", "rename", "replace", "unlink", "mkdir", "rmdir", "open")
FP8_CACHE = {"kind": "fp", "name": "fp8"}


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
        ("llama", "w4a16", "signround", 32, {"options": {"steps": 4, "whole": 4}, "written": 4}),
        ("llama", "w4a16", "auto", 32, {}),
        ("llama", "w3a16", "gptq", 32, {"rank": 4}),
        ("llama", "mxfp4", "rtn", None, {}),
        ("mixtral", "w4a16", "gptq", 32, {}),
        ("qwen3_moe", "nvfp4", "gptq", None, {}),
        ("opt", "fp8", "awq", None, {}),
        ("gpt_neox", "w4a16_asym", "rtn", 32, {}),
    ]
    found = {f"{m} {s} {x}": Request(models[m], s, x, g, **{**text, **more}) for m, s, x, g, more in wanted}
    found["llava w4a16 gptq"] = Request(str(vlm), "w4a16", "gptq", 32, samples=4, threads=1)
    return found


def contents(folder: Path) -> dict[str, str]:
    return {
        str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in sorted(folder.rglob("*"))
        if p.is_file()
    }


def in_child(action: Callable[[], object]) -> tuple[int, str]:
    """(wait status, what an error said) of a forked child."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(reader)
        code, said = 1, ""
        try:
            action()
            code = 0
        except QkitError as e:
            code, said = e.exit_code, str(e)
        except BaseException as e:
            code, said = 99, f"{type(e).__name__}: {e}"
        os.write(writer, said.encode()[:4000])
        os._exit(code)
    os.close(writer)
    said = b""
    while piece := os.read(reader, 4096):
        said += piece
    os.close(reader)
    return os.waitpid(pid, 0)[1], said.decode(errors="replace")


def counting(request: Request, out: Path, number: int, counted: Any = None) -> None:
    """Quantize; end as by kill -9 right before the ``number``-th file operation that changes something."""
    left = number

    def wrapped(real: Callable[..., Any], name: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal left
            writes = name != "open" or (
                len(args) > 1 and isinstance(args[1], int) and args[1] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
            )
            if writes:
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


def kills(folder: Path, requests: dict[str, Request], count: int, chance: random.Random) -> dict[str, Any]:
    """``count`` kills, spread over the requests in turn."""
    known: dict[str, tuple[dict[str, str], int, float]] = {}
    hits, wrong, rows = 0, [], Counter[str]()
    for number in range(count):
        name = list(requests)[number % len(requests)]
        request = requests[name]
        if name not in known:
            reader, writer = os.pipe()
            began = time.monotonic()
            status, said = in_child(
                lambda r=request: counting(r, folder / "clean" / name.replace(" ", "-"), 10**9, writer)
            )
            assert status == 0, (name, said)
            known[name] = (
                contents(folder / "clean" / name.replace(" ", "-")),
                int(os.read(reader, 20)),
                time.monotonic() - began,
            )
        expected, operations, seconds = known[name]
        out = folder / "killed" / f"{number}"
        if number % 2:
            status, said = in_child(lambda: counting(request, out, chance.randint(1, operations)))
        else:
            pid = os.fork()
            if pid == 0:
                quantize(request, out, Quiet())
                os._exit(0)
            time.sleep(seconds * chance.uniform(0.05, 0.95))
            os.kill(pid, signal.SIGKILL)
            status, said = os.waitpid(pid, 0)[1], ""
        hits += killed(status)
        before = out.exists() and contents(out) != expected
        status, said = in_child(lambda: quantize(request, out, Quiet()))
        if status or before or contents(out) != expected or partial_path(out).exists():
            wrong.append({"case": name, "number": number, "said": said})
        rows[name] += 1
        print(
            f"kill {number + 1}/{count}: {name}: {'ok' if not wrong or wrong[-1]['number'] != number else wrong[-1]}",
            flush=True,
        )
    return {"kills": count, "hit a live run": hits, "cases": dict(rows), "wrong": wrong}


def races(folder: Path, request: Request, count: int, chance: random.Random) -> dict[str, Any]:
    """Two children with one OUT and two job folders, begun up to half a run apart."""
    began = time.monotonic()
    assert in_child(lambda: quantize(request, folder / "race-clean", Quiet()))[0] == 0
    expected, seconds = contents(folder / "race-clean"), time.monotonic() - began
    ends, wrong = Counter[str](), []
    for number in range(count):
        out, files, pids = folder / "races" / str(number), [], []
        for i in range(2):
            files.append(folder / f"race-{number}-{i}.txt")
            pid = os.fork()
            if pid == 0:
                code, said = 0, ""
                try:
                    quantize(request, out, Quiet(), work=Path(f"{out}.job{i}"))
                except QkitError as e:
                    code, said = e.exit_code, str(e)
                except BaseException as e:
                    code, said = 99, f"{type(e).__name__}: {e}"
                files[i].write_text(said)
                os._exit(code)
            pids.append(pid)
            time.sleep(chance.uniform(0, seconds / 2) if number % 4 else 0)
        codes = sorted(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids)
        ends[str(codes)] += 1
        said = [f.read_text() for f in files]
        sound = codes[0] == 0 and codes[1] in (0, 2, 6) and contents(out) == expected and not partial_path(out).exists()
        if not sound or any("fault of qkit" in s for s in said):
            wrong.append({"number": number, "codes": codes, "said": said})
        print(f"race {number + 1}/{count}: exit codes {codes}", flush=True)
    return {"races": count, "exit codes": dict(ends), "wrong": wrong}


def full_disks(folder: Path, requests: dict[str, Request], count: int) -> dict[str, Any]:
    """Runs on a disk of ``count`` sizes between nothing and enough, and the same command once there is room."""
    wrong, said_by = [], Counter[str]()
    for number in range(count):
        name = list(requests)[number % 3]
        request, place = requests[name], folder / f"disk{number}"
        clean = folder / "clean-disk" / name.replace(" ", "-")
        if not clean.exists():
            assert in_child(lambda r=request, c=clean: quantize(r, c, Quiet(), keep_job=True))[0] == 0
        needed = sum(p.stat().st_size for p in (*clean.rglob("*"), *Path(f"{clean}.job").rglob("*")) if p.is_file())
        place.mkdir()
        size = 64 * 1024 + int(needed * number / (count - 1))
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", place], check=True)
        try:
            unchecked = lambda r=request: _without_forecast(r, place / "out")  # noqa: E731
            status, said = in_child(unchecked)
            code = os.waitstatus_to_exitcode(status)
            done = code == 0 and contents(place / "out") == contents(clean)
            sentence = code == 5 and ("room" in said or "space" in said.lower()) and not (place / "out").exists()
            subprocess.run(["mount", "-o", "remount,size=256m", place], check=True)
            again, last = in_child(lambda: quantize(request, place / "out", Quiet()))
            if not (done or sentence) or again or contents(place / "out") != contents(clean):
                wrong.append({"case": name, "size": size, "code": code, "said": said, "again": last})
            said_by[f"exit {code}"] += 1
            print(f"disk {number + 1}/{count}: {size} bytes, exit {code}: {said[:100]}", flush=True)
        finally:
            subprocess.run(["umount", place], check=False)
    return {"disks": count, "ends": dict(said_by), "wrong": wrong}


def _without_forecast(request: Request, out: Path) -> None:
    """A run whose disk fills up while it works: the check beforehand would refuse it."""
    import qkit.pipeline

    qkit.pipeline.refuse_what_cannot_fit = lambda *_: None  # in this child alone
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
