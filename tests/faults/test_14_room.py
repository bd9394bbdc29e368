"""Room on the disk: what an earlier run of the same command left counts as room, or as work that is done."""

import shutil
from collections import namedtuple
from pathlib import Path

import pytest
from conftest import Quiet, StopsAtVerify

from qkit.errors import IOFailure
from qkit.workflows.quantize import Request, prepare, quantize

Usage = namedtuple("Usage", "total used free")


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


def size_of(folder: Path) -> int:
    return sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())


def test_what_a_stopped_run_left_is_not_needed_once_more(request_, tmp_path, monkeypatch):
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        quantize(request_, out, StopsAtVerify())
    forecast = prepare(request_).forecast
    partial, job = size_of(tmp_path / "out.partial"), size_of(tmp_path / "out.job")
    needed = max(0, 1.1 * (forecast.packed_bytes + forecast.copied_bytes) - partial) + max(
        0, 1.1 * forecast.job_bytes - job
    )
    assert needed < 1.1 * (forecast.packed_bytes + forecast.copied_bytes + forecast.job_bytes) / 2
    monkeypatch.setattr(shutil, "disk_usage", lambda place: Usage(0, 0, needed - 1))
    with pytest.raises(IOFailure, match=r"more of disk and .* are free: free some space"):
        quantize(request_, out, Quiet())
    monkeypatch.setattr(shutil, "disk_usage", lambda place: Usage(0, 0, needed + 1))
    assert quantize(request_, out, Quiet()).ok


def test_a_run_from_nothing_needs_all_of_it(request_, tmp_path, monkeypatch):
    forecast = prepare(request_).forecast
    whole = int(1.1 * (forecast.packed_bytes + forecast.copied_bytes + forecast.job_bytes))
    monkeypatch.setattr(shutil, "disk_usage", lambda place: Usage(whole, 0, whole - 1))
    with pytest.raises(IOFailure, match="free some space, or use another --out or --work"):
        quantize(request_, tmp_path / "out", Quiet())
    assert list(tmp_path.iterdir()) == []


def test_a_job_folder_on_another_disk_has_room_of_its_own(request_, tmp_path, monkeypatch):
    """Each disk needs what goes to it."""
    work = Path("/dev/shm")
    if not work.is_dir() or work.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("there is no second file system here")
    forecast = prepare(request_).forecast
    free = {
        tmp_path: int(1.1 * (forecast.packed_bytes + forecast.copied_bytes)) + 1,
        work: int(1.1 * forecast.job_bytes) + 1,
    }
    monkeypatch.setattr(shutil, "disk_usage", lambda place: Usage(0, 0, free[work if place == work else tmp_path]))
    job = work / f"qkit-test-{tmp_path.name}"
    try:
        assert quantize(request_, tmp_path / "out", Quiet(), work=job).ok
    finally:
        shutil.rmtree(job, ignore_errors=True)
