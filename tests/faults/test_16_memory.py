"""C13: memory that runs out is one sentence, and the job goes on from what it finished, to the same bytes."""

import hashlib
import os
import resource
from pathlib import Path

import pytest
import torch
from conftest import Quiet

from qkit.errors import IOFailure
from qkit.workflows.quantize import Request, quantize

SAID = (
    "[enforce fail at alloc_cpu.cpp:127] . DefaultCPUAllocator: can't allocate memory: you tried to allocate 68 bytes."
)


@pytest.fixture
def request_(tiny, calib) -> Request:
    return Request(
        model=str(tiny("llama")),
        scheme="w4a16",
        method="gptq",
        group_size=32,
        calib=calib,
        samples=8,
        seqlen=32,
        threads=1,
    )


def contents(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.iterdir())}


@pytest.mark.parametrize("error", [RuntimeError(SAID), MemoryError(), torch.OutOfMemoryError("CUDA out of memory")])
@pytest.mark.parametrize("call", [1, 5])
def test_in_the_factorization(error, call, request_, tmp_path, monkeypatch):
    real, calls = torch.linalg.cholesky_ex, []

    def cholesky_ex(*args, **kwargs):
        calls.append(1)
        if len(calls) == call:
            raise error
        return real(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(torch.linalg, "cholesky_ex", cholesky_ex)
        with pytest.raises(IOFailure, match=r"out of memory; finished blocks are kept in .*out\.job"):
            quantize(request_, tmp_path / "out", Quiet())
    assert not (tmp_path / "out").exists()
    assert quantize(request_, tmp_path / "out", Quiet()).ok
    assert quantize(request_, tmp_path / "clean", Quiet()).ok
    assert contents(tmp_path / "out") == contents(tmp_path / "clean")


def test_other_errors_of_torch_are_not_called_memory(request_, tmp_path, monkeypatch):
    def broken(*args, **kwargs):
        raise RuntimeError("expected a square matrix")

    monkeypatch.setattr(torch.linalg, "cholesky_ex", broken)
    with pytest.raises(RuntimeError, match="square"):
        quantize(request_, tmp_path / "out", Quiet())


def test_a_limit_of_the_system(tiny, tmp_path):
    """A child whose address space ends a little above what it has."""
    request = Request(
        model=str(tiny("llama", hidden_size=512, intermediate_size=4096)),
        scheme="w4a16",
        method="rtn",
        group_size=32,
        threads=1,
    )
    assert quantize(request, tmp_path / "clean", Quiet()).ok
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        message = "no error"
        try:
            pages = int(Path("/proc/self/statm").read_text().split()[0])
            limit = pages * os.sysconf("SC_PAGE_SIZE") + (1 << 20)
            resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
            quantize(request, tmp_path / "out", Quiet())
        except BaseException as e:
            message = f"{type(e).__name__}: {e}"
        os.write(writer, message.encode()[:2000])
        os._exit(0)
    os.waitpid(pid, 0)
    message = os.read(reader, 2000).decode()
    if message != "no error":  # memory that the process had free may be enough
        assert message.startswith("IOFailure: ") and "memory" in message, message
    assert quantize(request, tmp_path / "out", Quiet()).ok
    assert contents(tmp_path / "out") == contents(tmp_path / "clean")
