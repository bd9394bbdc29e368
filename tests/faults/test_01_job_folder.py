"""A folder is a job folder when it is empty or says so itself; no file that qkit did not make is removed or changed."""

import json
import os
import shutil
from pathlib import Path

import pytest
from conftest import Quiet

from qkit.engine.job import Job
from qkit.errors import BadInput, QkitError, UsageError
from qkit.files.job_folder import remove_job
from qkit.sensitivity.result_cache import ResultCache
from qkit.workflows.quantize import Request, quantize


@pytest.fixture
def request_(tiny) -> Request:
    return Request(model=str(tiny("llama")), scheme="w4a16", method="rtn", group_size=32, threads=1)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def project(folder: Path) -> Path:
    """A folder of the user's with names that a job folder has, too."""
    for name in ("parts/chapter1.txt", "rows/data.csv", ".env.tmp", "source", "journal.jsonl", "lock", "job.json"):
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"{name} is the user's own")
    return folder


FOREIGN = {
    "everything": lambda folder: project(folder),
    "parts": lambda folder: (
        (folder / "parts").mkdir(parents=True) or (folder / "parts" / "chapter1.txt").write_text("t")
    ),
    "empty folders": lambda folder: (folder / "rows").mkdir(parents=True),
    "a temporary file": lambda folder: folder.mkdir() or (folder / ".env.tmp").write_text("s"),
    "a temporary file of another run": lambda folder: (
        folder.mkdir() or (folder / (".qkit-tmp-" + "0" * 16)).write_text("s")
    ),
    "a lock of another program": lambda folder: folder.mkdir() or (folder / "lock").write_text("locked by make"),
    "a journal alone": lambda folder: folder.mkdir() or (folder / "journal.jsonl").write_text("{}\n"),
    "a job.json of another program": lambda folder: folder.mkdir() or (folder / "job.json").write_text('{"name": "x"}'),
    "git": lambda folder: (folder / ".git").mkdir(parents=True) or (folder / ".git" / "HEAD").write_text("ref"),
}


@pytest.mark.parametrize("kind", FOREIGN)
@pytest.mark.parametrize("named", [True, False])
def test_a_folder_of_the_user_is_refused_untouched(kind, named, request_, tmp_path):
    work = tmp_path / "project" if named else tmp_path / "out.job"
    FOREIGN[kind](work)
    before, folders = contents(work), sorted(p for p in work.rglob("*") if p.is_dir())
    with pytest.raises((UsageError, BadInput), match=str(work)):
        quantize(request_, tmp_path / "out", Quiet(), work=work if named else None)
    assert contents(work) == before
    assert sorted(p for p in work.rglob("*") if p.is_dir()) == folders
    assert sorted(p.name for p in tmp_path.iterdir()) == [work.name]  # neither OUT nor OUT.partial


def test_the_command_of_the_report_is_refused(run, tiny, small, tmp_path):
    work = project(tmp_path / "project")
    before = contents(work)
    code, _, err = run(
        "quantize", "--model", tiny("llama"), "--scheme", "w4a16", *small, "--out", tmp_path / "o", "--work", work
    )
    assert code in (2, 3) and str(work) in err
    assert contents(work) == before


def test_folders_are_refused_before_anything_is_measured(run, tiny, small, tmp_path):
    """A profile would take minutes."""
    work = project(tmp_path / "project")
    budget = ["--model", tiny("llama"), "--bits", 4, *small]
    code, _, err = run("quantize", *budget, "--out", tmp_path / "o", "--work", work)
    assert code in (2, 3) and str(work) in err
    code, _, err = run("quantize", *budget, "--out", work)
    assert code == 2 and "not empty" in err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["project"]  # no profile beside it


def test_the_job_folder_is_not_the_output(run, tiny, small, tmp_path):
    out = tmp_path / "o"
    code, _, err = run("quantize", "--model", tiny("llama"), "--scheme", "w4a16", *small, "--out", out, "--work", out)
    assert code == 2 and "the job folder is the output folder" in err and not out.exists()


@pytest.mark.parametrize(("name", "asked"), [("requant", ["--method", "requant+rtn"]), ("profile", ["--bits", 4])])
def test_a_dangling_link_beside_the_output(name, asked, run, tiny, small, tmp_path):
    (tmp_path / f"o.{name}").symlink_to(tmp_path / "nowhere")
    scheme = [] if name == "profile" else ["--scheme", "w4a16"]
    code, _, err = run("quantize", "--model", tiny("llama"), *scheme, *asked, *small, "--out", tmp_path / "o")
    assert code == 2 and f"o.{name}" in err and "folder" in err
    assert [p.name for p in tmp_path.iterdir()] == [f"o.{name}"]


def test_an_empty_folder_is_used(request_, tmp_path):
    (tmp_path / "job").mkdir()
    assert quantize(request_, tmp_path / "out", Quiet(), work=tmp_path / "job").ok


def test_files_of_the_user_in_a_job_folder_stay(request_, tmp_path):
    """They may lie beside those of the job: a note, a log, something that is called like a temporary file."""
    out, work = tmp_path / "out", tmp_path / "out.job"
    with Job.open(work, {"plan": 1}):
        own = [work / "notes.txt", work / ".env.tmp", work / "parts" / "chapter1.txt", work / "rows" / ".tmp-x.bin"]
        for file in own:
            file.write_text("mine")
    assert quantize(request_, out, Quiet()).ok
    assert [file.read_text() for file in own] == ["mine"] * 4
    assert not list((work / "parts").glob("*.safetensors"))
    shutil.rmtree(out)
    assert quantize(request_, out, Quiet()).ok  # a finished job begins anew beside them
    remove_job(work)
    assert set(contents(work)) == {"notes.txt", ".env.tmp", "parts/chapter1.txt", "rows/.tmp-x.bin"}


def test_what_a_killed_run_left_unfinished_is_removed(tmp_path):
    work = tmp_path / "job"
    with Job.open(work, {"plan": 1}) as job:
        job.commit(0, {}, {}, None)
    orphans = [work / folder / (".qkit-tmp-" + "a" * 16) for folder in (".", "parts", "rows")]
    for file in orphans:
        file.write_text("half a file")
    with Job.open(work, {"plan": 1}) as job:
        assert job.finished == 1
    assert not any(file.exists() for file in orphans)


LINKED = ["lock", "journal.jsonl", "job.json", "source", "export.json", "parts", "rows", "components"]


@pytest.mark.parametrize("name", [*LINKED, "parts/0000.safetensors", "rows/0001.bin"])
@pytest.mark.parametrize("hard", [False, True])
def test_links_in_a_job_folder_are_refused(name, hard, tmp_path):
    if hard and name in ("parts", "rows", "components"):
        pytest.skip("folders have no hard links")
    work, target = tmp_path / "job", tmp_path / "target"
    with Job.open(work, {"plan": 1}) as job:
        job.commit(0, {}, {}, None)
    place = work / name
    if name in ("parts", "rows", "components"):
        (target / "inside").mkdir(parents=True)
        if place.exists():
            shutil.rmtree(place)
        place.symlink_to(target)
    else:
        target.write_bytes(place.read_bytes() if place.exists() else b"the user's")
        place.unlink(missing_ok=True)
        os.link(target, place) if hard else place.symlink_to(target)
    before = contents(tmp_path)
    with pytest.raises(QkitError, match=name.rpartition("/")[2]), Job.open(work, {"plan": 2}):
        pass
    assert contents(tmp_path) == before and target.exists()


@pytest.mark.parametrize("name", ["lock", "journal.jsonl", "job.json"])
def test_a_pipe_in_a_job_folder_is_refused(name, tmp_path):
    work = tmp_path / "job"
    with Job.open(work, {"plan": 1}) as job:
        job.commit(0, {}, {}, None)
    (work / name).unlink()
    os.mkfifo(work / name)
    with pytest.raises(BadInput, match=name), Job.open(work, {"plan": 1}):
        pass


def test_a_job_says_what_it_is(tmp_path):
    with Job.open(tmp_path / "job", {"plan": 1}):
        assert json.loads((tmp_path / "job" / "job.json").read_text())["kind"] == "qkit job"


def test_a_run_killed_at_its_very_start_goes_on(tmp_path):
    """All that is there then: the lock, and the unfinished copy of job.json."""
    work = tmp_path / "job"
    work.mkdir()
    (work / "lock").write_text("pid 1 on somewhere")
    (work / (".qkit-tmp-" + "b" * 16)).write_text("{")
    with Job.open(work, {"plan": 1}):
        assert (work / "job.json").exists()
    assert not list(work.glob(".qkit-tmp-*"))


def test_overwrite_leaves_files_of_the_user(request_, tmp_path):
    out = tmp_path / "out"
    quantize(request_, out, Quiet())
    (out / "notes.txt").write_text("mine")
    before = contents(out)
    with pytest.raises(UsageError, match=r"'notes\.txt' is not on the list"):
        quantize(
            Request(model=request_.model, scheme="w8a16", method="rtn", group_size=32, threads=1),
            out,
            Quiet(),
            overwrite=True,
        )
    assert contents(out) == before


def test_requant_and_demo_remove_only_jobs(tmp_path):
    own = project(tmp_path / "t1")
    with pytest.raises((UsageError, BadInput)):
        remove_job(own)
    assert contents(own) == contents(project(tmp_path / "copy"))


# ---- folders of profiles ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["profile.json", "measured.jsonl", "notes.txt", "pareto.png"])
def test_a_profile_is_not_made_in_a_folder_of_the_user(name, run, tiny, small, tmp_path):
    folder = tmp_path / "project"
    folder.mkdir()
    (folder / name).write_text("mine")
    code, _, err = run("profile", "--model", tiny("llama"), "--candidates", "int4", *small, "--out", folder)
    assert code in (2, 3) and str(folder) in err
    assert contents(folder) == {name: b"mine"} and sorted(p.name for p in folder.iterdir()) == [name]


def test_a_link_in_the_place_of_a_ledger_is_refused(tmp_path):
    target = tmp_path / "target"
    target.write_text("")
    (tmp_path / "measured.jsonl").symlink_to(target)
    with pytest.raises(BadInput, match="symbolic link"):
        ResultCache(tmp_path / "measured.jsonl", {"model": "x"})
    assert target.read_text() == ""
