"""Fixtures that several test files share: a short calibration text, and tiny models made once a session."""

import gc
import json
import os
import socket
from pathlib import Path

os.environ.setdefault("TRITON_INTERPRET", "1")  # before the first import of triton: no GPU is asked for here
# Before the first import of torch: bounds and equalities are those of one arithmetic, on CPUs with AMX too. Without the second,
# sums of float32 depend on where in memory a matrix lies.
os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_BF16")
os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")

import pytest
import qkit_data
import tiny_models
import tiny_vlms
import torch
import transformers

from qkit.commands import main
from qkit.workflows.api import quantize

torch.set_num_threads(1)
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()


def pytest_collection_finish() -> None:
    """What was imported stays: the garbage collector need not look at half a million objects again and again."""
    gc.collect()
    gc.freeze()


def pytest_sessionfinish() -> None:
    """Libraries report what is not freed at the end."""
    gc.unfreeze()


class Quiet:
    """A progress listener that says nothing."""

    def start(self, what: str, total: int) -> None: ...

    def step(self, amount: int = 1) -> None: ...


class Stops(Quiet):
    """Raises KeyboardInterrupt when so many phases have begun."""

    def __init__(self, after: int) -> None:
        self.left = after

    def start(self, what: str, total: int) -> None:
        self.left -= 1
        if self.left < 0:
            raise KeyboardInterrupt


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory):
    """The user's cache folder is not written to."""
    before = os.environ.get("XDG_CACHE_HOME")
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("cache"))
    yield
    if before is None:
        del os.environ["XDG_CACHE_HOME"]
    else:
        os.environ["XDG_CACHE_HOME"] = before


class StopsAtVerify(Quiet):
    """Raises KeyboardInterrupt when the export is complete and not yet verified."""

    def __init__(self) -> None:
        self.exporting = False

    def start(self, what: str, total: int) -> None:
        self.exporting = what.startswith("export")

    def step(self, amount: int = 1) -> None:
        if self.exporting:
            raise KeyboardInterrupt


@pytest.fixture(scope="session")
def quiet():
    return Quiet()


@pytest.fixture(scope="session")
def calib(tmp_path_factory) -> Path:
    """A text of some 1500 tokens."""
    path = tmp_path_factory.mktemp("text") / "calib.txt"
    path.write_text(qkit_data.text_path("calibration").read_text(encoding="utf-8")[:6000], encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """``tiny(family, dtype=torch.bfloat16, **changes)``: the folder of a tiny model; not to be written to."""
    made: dict[tuple, Path] = {}

    def get(family: str, dtype: torch.dtype = torch.bfloat16, **changes) -> Path:
        key = (family, dtype, repr(sorted(changes.items())))
        if key not in made:
            folder = tmp_path_factory.mktemp("models") / family
            made[key] = tiny_models.make(family, folder, dtype, **changes)
        return made[key]

    return get


@pytest.fixture(scope="session")
def vlm(tmp_path_factory):
    """``vlm(family)``: the folder of a tiny vision-language model; ``processor``: of LLaVA, with one."""
    made = {}

    def get(family: str, processor: bool = False):
        if (family, processor) not in made:
            path = tiny_vlms.make(family, tmp_path_factory.mktemp("vlms") / family)
            if processor:
                tiny_vlms.add_processor(path)
            made[family, processor] = path
        return made[family, processor]

    return get


@pytest.fixture
def no_network(monkeypatch):
    """Any attempt to connect fails the test."""

    def refuse(*args, **kwargs):
        raise AssertionError(f"a connection was tried: {args}")

    for name in ("connect", "connect_ex", "sendto"):
        monkeypatch.setattr(socket.socket, name, refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.fixture
def run(capsys, monkeypatch):
    """``run(*arguments)``: (exit code, stdout, stderr) of a command."""
    monkeypatch.setenv("COLUMNS", "200")

    def go(*arguments) -> tuple[int, str, str]:
        code = 0
        try:
            main([str(a) for a in arguments])
        except SystemExit as e:
            code = e.code or 0
        out, err = capsys.readouterr()
        assert "Traceback" not in out + err
        return code, out, err

    return go


@pytest.fixture
def small(calib):
    """Options that keep a run short."""
    return ["--calib", calib, "--samples", 8, "--seqlen", 32, "--threads", 1]


@pytest.fixture(scope="session")
def plain_model(tmp_path_factory) -> Path:
    """A model to diagnose files of: wide enough for super-blocks, with weights enough for statements about most of them."""
    folder = tmp_path_factory.mktemp("plain") / "model"
    tiny_models.make("llama", folder, hidden_size=256, intermediate_size=256, num_hidden_layers=2)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 0}))
    return folder


@pytest.fixture(scope="session")
def made(tmp_path_factory, plain_model):
    """The folder of a result, made once for each set of options: made("q4_k", kv="nvfp4")."""
    work, results = tmp_path_factory.mktemp("made"), {}

    def make(scheme: str, **options) -> Path:
        key = scheme, *sorted(options.items())
        if key not in results:
            out = work / "-".join(map(str, [scheme, *options.values()]))
            quantize(model=str(plain_model), scheme=scheme, out=str(out), **options)
            results[key] = out
        return results[key]

    return make
