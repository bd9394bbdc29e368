"""Mutated input files against qkit: nothing but an error of qkit may come out, soon, in little memory, and no wrong success.

    python tools/fuzz.py --count 100000 --seed 1 --json reports/reliability/fuzz.json

Nine kinds of inputs are mutated, one file at a time (``mutations``), and read by the code that the commands run, in children
of this process with a limit on their memory. Counted as failures: ``fault`` (an exception that is no QkitError), ``hang`` (no
answer in 10 s), ``memory`` (more than 1 GB beyond what the libraries take), ``crash`` (the child died), ``wrong`` (a success
that a check of the result contradicts). The same seed gives the same inputs: ``--only KIND:NUMBER`` runs one of them again.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import json
import os
import random
import resource
import select
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["HF_HUB_OFFLINE"] = "1"
sys.path.insert(0, str(Path(__file__).parent))

import fuzz_targets
import torch
import transformers

from qkit.errors import QkitError

SECONDS, BYTES = 10, 1 << 30
BATCH = 400
FAILURES = ("fault", "hang", "memory", "crash", "wrong")


@dataclass
class Outcome:
    """What became of one input. text: the message of the error; place: where an exception came from."""

    kind: str
    number: int
    what: str
    text: str = ""
    place: str = ""


def attempt(target: fuzz_targets.Target, seed: int, number: int) -> Outcome:
    """Mutate one file of the target's folder, run the code on it, put the file back."""
    rng = random.Random(f"{seed}:{target.kind}:{number}")
    file, data, run = target.mutant(rng)
    original = file.read_bytes()
    file.write_bytes(data)
    try:
        problem = run()
        return Outcome(target.kind, number, "wrong" if problem else "success", problem or "")
    except QkitError as error:
        what = "memory" if out_of_memory(error) else "refused"
        return Outcome(target.kind, number, what, f"{type(error).__name__}: {error}"[:400])
    except Exception as error:  # what is looked for
        what = "memory" if out_of_memory(error) else "fault"
        frames = traceback.extract_tb(error.__traceback__)
        own = next((f for f in reversed(frames) if "/qkit/" in f.filename), frames[-1])
        place = f"{Path(own.filename).name}:{own.lineno} {own.name}"
        return Outcome(target.kind, number, what, f"{type(error).__name__}: {error}"[:300], place)
    finally:
        file.write_bytes(original)
        target.clean()


def out_of_memory(error: BaseException | None) -> bool:
    """Whether the limit on memory is behind an error."""
    while error is not None:
        if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM):
            return True
        if isinstance(error, RuntimeError) and "can't allocate memory" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False


def in_child(target: fuzz_targets.Target, seed: int, numbers: range, report: Callable[[Outcome], None]) -> None:
    """The inputs of these numbers, in processes that end with a hang or a crash and are begun anew behind it."""
    at = numbers.start
    while at < numbers.stop:
        read, write = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(read)
            serve(target, seed, range(at, numbers.stop), write)
        os.close(write)
        buffer, last = b"", None
        while True:
            ready = select.select([read], [], [], SECONDS)[0]
            if not ready:
                last = "hang"
                os.kill(child, signal.SIGKILL)
                break
            chunk = os.read(read, 1 << 16)
            if not chunk:
                break
            *lines, buffer = (buffer + chunk).split(b"\n")
            for line in lines:
                report(Outcome(*json.loads(line)))
                at += 1
        os.close(read)
        status = os.waitpid(child, 0)[1]
        target.restore()
        if at < numbers.stop:
            report(Outcome(target.kind, at, last or "crash", "" if last else f"ended with status {status}"))
            at += 1


def serve(target: fuzz_targets.Target, seed: int, numbers: range, write: int) -> None:
    """What a child does: a line of JSON per input."""
    mapped = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_AS, (mapped + BYTES, mapped + BYTES))
    silent = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):
        os.dup2(silent, stream)
    code = 0
    try:
        for number in numbers:
            found = attempt(target, seed, number)
            os.write(
                write, json.dumps([found.kind, found.number, found.what, found.text, found.place]).encode() + b"\n"
            )
    except BaseException:
        code = 1
    os._exit(code)


def campaign(count: int, seed: int, folder: Path, kinds: list[str], show: Callable[[str], None]) -> dict[str, Any]:
    """``count`` inputs over all kinds, and what became of them."""
    began, per_kind, failures, messages = time.monotonic(), {}, [], Counter[str]()
    targets = fuzz_targets.make(folder, kinds)
    each, rest = divmod(count, len(targets))
    for i, target in enumerate(targets):
        outcomes: Counter[str] = Counter()
        start = time.monotonic()

        def report(found: Outcome, outcomes: Counter[str] = outcomes) -> None:
            outcomes[found.what] += 1
            if found.what in FAILURES:
                failures.append(found)
                if len(failures) <= 400:
                    show(f"{found.what} {found.kind}:{found.number} {found.place} {found.text}")

        for first in range(0, each + (i < rest), BATCH):
            in_child(target, seed, range(first, min(first + BATCH, each + (i < rest))), report)
        took = time.monotonic() - start
        per_kind[target.kind] = {"inputs": sum(outcomes.values()), **outcomes, "seconds": round(took, 1)}
        show(f"{target.kind}: {per_kind[target.kind]}")
    messages.update(f"{f.what} {f.kind} {f.place} {f.text[:70]}" for f in failures)
    return {
        "seed": seed,
        "inputs": count,
        "failures": len(failures),
        "kinds": per_kind,
        "seconds": round(time.monotonic() - began, 1),
        "places": dict(messages.most_common(200)),
        "examples": [vars(f) for f in failures[:200]],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--kinds", default=",".join(fuzz_targets.KINDS))
    parser.add_argument("--json", type=Path)
    parser.add_argument("--only", help="KIND:NUMBER, run here with its traceback")
    given = parser.parse_args()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    root = "/dev/shm" if os.path.isdir("/dev/shm") else None
    folder = Path(tempfile.mkdtemp(prefix="qkit-fuzz-", dir=root))
    try:
        if given.only:
            kind, _, number = given.only.partition(":")
            once(fuzz_targets.make(folder, [kind])[0], given.seed, int(number))
            return
        found = campaign(given.count, given.seed, folder, given.kinds.split(","), lambda text: print(text, flush=True))
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    if given.json is not None:
        given.json.parent.mkdir(parents=True, exist_ok=True)
        given.json.write_text(json.dumps(found, indent=1) + "\n")
    print(f"{found['inputs']} inputs, {found['failures']} failures, {found['seconds']} s")
    sys.exit(1 if found["failures"] else 0)


def once(target: fuzz_targets.Target, seed: int, number: int) -> None:
    """One input again, with the mutated file's start and the traceback."""
    file, data, run = target.mutant(random.Random(f"{seed}:{target.kind}:{number}"))
    print(file, len(data), data[:1500])
    file.write_bytes(data)
    with contextlib.suppress(KeyboardInterrupt):
        print("result:", run())


if __name__ == "__main__":
    main()
