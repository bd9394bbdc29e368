"""OUT.partial and other names beside OUT: only what this job listed is removed, and one process works there at a time."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import Quiet, Stops, StopsAtVerify

from qkit.errors import BadInput, JobConflict
from qkit.workflows.quantize import Request, quantize


@pytest.fixture
def request_(tiny) -> Request:
    return Request(model=str(tiny("llama")), scheme="w4a16", method="rtn", group_size=32, threads=1)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.mark.parametrize("name", ["thesis.txt", "model.safetensors", "deep/er/file", ".qkit-tmp-" + "0" * 16])
def test_a_partial_folder_of_the_user_is_refused(name, request_, tmp_path):
    out, file = tmp_path / "out", tmp_path / "out.partial" / name
    file.parent.mkdir(parents=True)
    file.write_text("mine")
    with pytest.raises(JobConflict, match=r"out\.partial: it holds"):
        quantize(request_, out, Quiet())
    assert file.read_text() == "mine" and not out.exists()


def test_a_link_in_the_place_of_the_partial_folder_is_refused(request_, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "file").write_text("mine")
    (tmp_path / "out.partial").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(BadInput, match="symbolic link"):
        quantize(request_, tmp_path / "out", Quiet())
    assert contents(tmp_path / "elsewhere") == {"file": b"mine"}


def test_what_the_same_job_left_is_used_again(request_, tmp_path):
    out, partial = tmp_path / "out", tmp_path / "out.partial"
    with pytest.raises(KeyboardInterrupt):
        quantize(replace(request_), out, StopsAtVerify())
    assert (partial / "model.safetensors").exists() and not out.exists()
    (partial / (".qkit-tmp-" + "c" * 16)).write_text("half a file")
    assert quantize(request_, out, Quiet()).ok
    assert not partial.exists()


def test_a_file_of_the_user_in_what_the_same_job_left_is_kept(request_, tmp_path):
    out, partial = tmp_path / "out", tmp_path / "out.partial"
    with pytest.raises(KeyboardInterrupt):
        quantize(request_, out, StopsAtVerify())
    (partial / "notes.txt").write_text("mine")
    with pytest.raises(JobConflict, match=r"notes\.txt"):
        quantize(request_, out, Quiet())
    assert (partial / "notes.txt").read_text() == "mine"
    (partial / "notes.txt").unlink()
    assert quantize(request_, out, Quiet()).ok


def test_what_another_job_left_is_refused(request_, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        quantize(request_, out, StopsAtVerify(), work=tmp_path / "first")
    before = contents(tmp_path / "out.partial")
    with pytest.raises(JobConflict, match="another run left it"):
        quantize(request_, out, Quiet(), work=tmp_path / "second")
    assert contents(tmp_path / "out.partial") == before
    assert quantize(request_, out, Quiet(), work=tmp_path / "first").ok


def test_a_copy_of_the_partial_folder_is_not_taken_for_it(request_, tmp_path):
    """The list names the folder by its inode: another folder of that name is somebody else's."""
    out, partial = tmp_path / "out", tmp_path / "out.partial"
    with pytest.raises(KeyboardInterrupt):
        quantize(request_, out, StopsAtVerify())
    shutil.copytree(partial, tmp_path / "copy")
    partial.rename(tmp_path / "moved")
    (tmp_path / "copy").rename(partial)
    with pytest.raises(JobConflict):
        quantize(request_, out, Quiet())


def test_nothing_is_left_of_a_run_that_stops_before_the_export(request_, calib, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        quantize(replace(request_, method="gptq", calib=calib, samples=8, seqlen=32), tmp_path / "out", Stops(3))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out.job"]
