"""Two commands with one OUT and two job folders: one clear refusal, exit code 6."""

import fcntl
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import Quiet

from qkit.engine.partial_output import Partial, partial_path
from qkit.errors import JobConflict
from qkit.workflows.quantize import Request, quantize


@pytest.fixture
def request_(tiny) -> Request:
    return Request(model=str(tiny("llama")), scheme="w4a16", method="rtn", group_size=32, threads=1)


def test_two_commands_with_one_out_and_two_job_folders(request_, tmp_path):
    out = tmp_path / "out"
    with Partial.claim(out, tmp_path / "first") as held:
        assert held.path == partial_path(out)
        with pytest.raises(JobConflict, match="in use by another process that writes to"):
            quantize(request_, out, Quiet(), work=tmp_path / "second")
    assert quantize(request_, out, Quiet(), work=tmp_path / "second").ok


def test_a_claim_of_a_folder_that_got_its_final_name_is_made_anew(request_, tmp_path, monkeypatch):
    """The other process renames its folder between our open and our lock."""
    out, real = tmp_path / "out", fcntl.flock
    renamed = []

    def flock(handle, operation):
        if not renamed and Path(f"/proc/self/fd/{handle}").resolve().name == "out.partial":
            renamed.append(os.rename(tmp_path / "out.partial", tmp_path / "theirs"))
        return real(handle, operation)

    monkeypatch.setattr(fcntl, "flock", flock)
    assert quantize(request_, out, Quiet()).ok
    assert renamed and list((tmp_path / "theirs").iterdir()) == []


def test_races_of_two_processes(request_, tmp_path):
    """Each ends well, or with one sentence and exit code 6 (or 2, where the other was done before)."""
    out = tmp_path / "out"
    command = [
        sys.executable,
        "-c",
        "from qkit.commands import main; main()",
        "quantize",
        "--model",
        request_.model,
    ]
    command += ["--scheme", "w4a16", "--group-size", "32", "--threads", "1", "--out", str(out)]
    running = [
        subprocess.Popen(
            [*command, "--work", f"{out}.job{i}"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for i in range(2)
    ]
    ended = [(process.communicate()[1], process.returncode) for process in running]
    assert 0 in [code for _, code in ended]
    for said, code in ended:
        assert code in (0, 2, 6) and "fault of qkit" not in said and "Traceback" not in said, said
    assert (out / "qkit.json").exists() and not partial_path(out).exists()
