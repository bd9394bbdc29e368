"""A run can be killed at any moment: the same command goes on, and the bytes are those of an undisturbed run."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import Quiet
from runs import Bomb, contents, in_child, killed, killed_after

from qkit.engine.job import Job, finished_blocks
from qkit.errors import BadInput, JobConflict, UsageError
from qkit.files.safefile import save_tensors
from qkit.workflows.quantize import Request, quantize

BLOCKS = 4


@pytest.fixture(scope="module")
def request_(tiny, calib):
    """GPTQ with smoothing on four blocks: rows are carried from block to block."""
    model = tiny("llama", num_hidden_layers=BLOCKS)
    return Request(
        model=str(model),
        scheme="w4a16",
        method="smoothquant+gptq",
        group_size=32,
        calib=calib,
        samples=8,
        seqlen=32,
        seed=3,
        threads=1,
    )


@pytest.fixture(scope="module")
def undisturbed(request_, tmp_path_factory):
    """What the output is when nothing happens."""
    out = tmp_path_factory.mktemp("undisturbed") / "out"
    assert quantize(request_, out, Quiet()).ok
    return contents(out)


def stopped_in_the_middle(request: Request, out: Path) -> Path:
    """A job folder with some, not all, blocks committed."""
    work = out.with_name(out.name + ".job")
    for after in range(4, 400, 4):
        assert killed_after(request, out, after)
        if (work / "journal.jsonl").exists() and len((work / "journal.jsonl").read_bytes().splitlines()) >= 2:
            break
    assert not out.exists()
    return work


# ---- kill -9 ---------------------------------------------------------------------------------------------------


def kill_at_times(request: Request, out: Path, fractions: list[float]) -> int:
    """Kill a run after each of these fractions of its time, then let it end. Gives how many kills hit a live run."""
    began = time.monotonic()
    assert in_child(lambda: quantize(request, out.with_name("clock"), Quiet())) == 0
    whole, hits = time.monotonic() - began, 0
    for fraction in fractions:
        pid = os.fork()
        if pid == 0:
            try:
                quantize(request, out, Quiet())
            finally:
                os._exit(0)
        time.sleep(whole * fraction)
        os.kill(pid, signal.SIGKILL)
        hits += killed(os.waitpid(pid, 0)[1])
    assert quantize(request, out, Quiet()).ok
    return hits


def test_kill_at_random_moments(request_, undisturbed, tmp_path):
    chance = random.Random(0)
    hits = 0
    for i in range(4):  # two kills in a row, then the end: a resumed run is killed too
        out = tmp_path / f"out{i}"
        hits += kill_at_times(request_, out, [chance.uniform(0.05, 0.95) for _ in range(2)])
        assert contents(out) == undisturbed
    assert hits >= 4


@pytest.mark.slow
def test_kill_at_twenty_random_moments(request_, undisturbed, tmp_path):
    chance = random.Random(1)
    for i in range(20):
        out = tmp_path / f"out{i}"
        kill_at_times(request_, out, [chance.uniform(0.02, 1.0)])
        assert contents(out) == undisturbed


def killed_at_file_operation(request: Request, out: Path, number: int) -> bool:
    """Run until the ``number``-th fsync, rename, replace or unlink, and kill it right before."""

    def action() -> None:
        left = number

        def counted(real):
            def call(*args, **kwargs):
                nonlocal left
                left -= 1
                if left < 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                return real(*args, **kwargs)

            return call

        for name in ("fsync", "rename", "replace", "unlink"):
            setattr(os, name, counted(getattr(os, name)))
        quantize(request, out, Quiet())

    return killed(in_child(action))


def kill_at_operations(request, undisturbed, folder: Path, numbers) -> int:
    done = 0
    for number in numbers:
        out = folder / f"out{number}"
        if not killed_at_file_operation(request, out, number):
            assert contents(out) == undisturbed
            return done
        assert not out.exists() or contents(out) == undisturbed  # never a part of a result
        assert quantize(request, out, Quiet()).ok
        assert contents(out) == undisturbed
        shutil.rmtree(out)
        done += 1
    return done


def test_kill_at_commit_points(request_, undisturbed, tmp_path):
    assert kill_at_operations(request_, undisturbed, tmp_path, range(1, 200, 11)) >= 4


def test_kill_at_commit_points_of_a_repaired_run(request_, tmp_path):
    """Sparse parts are committed after the last block: a kill around it leaves a state to go on from."""
    request = replace(request_, method="gptq", outliers=1.0, significant=0.5)
    assert quantize(request, tmp_path / "whole", Quiet()).ok
    assert kill_at_operations(request, contents(tmp_path / "whole"), tmp_path, range(19, 45, 5)) >= 4


@pytest.mark.slow
def test_kill_at_every_commit_point(request_, undisturbed, tmp_path):
    assert kill_at_operations(request_, undisturbed, tmp_path, range(1000)) >= 30


# ---- the same bytes --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_threads_do_not_matter(threads, request_, undisturbed, tmp_path):
    assert quantize(replace(request_, threads=threads), tmp_path / "out", Quiet()).ok
    assert contents(tmp_path / "out") == undisturbed


@pytest.mark.parametrize(
    ("family", "scheme", "method", "sparse"),
    [
        ("mixtral", "nvfp4", "gptq", {}),
        ("llama", "w3a16_asym", "rotate+gptq", {"outliers": 0.5, "significant": 0.5}),
        ("opt", "fp8", "awq", {"outliers": {"*.fc1": 2.0}}),
    ],
)
def test_two_runs_are_identical(family, scheme, method, sparse, tiny, calib, tmp_path):
    found = []
    for i, threads in enumerate((1, 2)):
        given = {"calib": calib, "samples": 8, "seqlen": 32, "seed": 5, "threads": threads, **sparse}
        group = 32 if scheme.startswith("w3") else None
        quantize(
            Request(model=str(tiny(family)), scheme=scheme, method=method, group_size=group, **given),
            tmp_path / str(i),
            Quiet(),
        )
        found.append(contents(tmp_path / str(i)))
    assert found[0] == found[1]


# ---- signals ---------------------------------------------------------------------------------------------------


def arguments(request: Request, out: Path) -> list[str]:
    options = ["--scheme", request.scheme, "--method", request.method, "--group-size", request.group_size]
    options += ["--calib", request.calib, "--samples", request.samples, "--seqlen", request.seqlen]
    options += ["--model", request.model, "--seed", request.seed, "--threads", 1, "--out", out]
    return ["quantize", *map(str, options)]


def test_sigterm_stops_at_a_safe_place(request_, undisturbed, run, tmp_path):
    out = tmp_path / "out"
    program = [sys.executable, "-c", "from qkit.commands import main; main()", *arguments(request_, out)]
    process = subprocess.Popen(program, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    job = tmp_path / "out.job" / "job.json"
    deadline = time.monotonic() + 60
    while not job.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 75, said
    assert "stopped by SIGTERM" in said and "Continue with: qkit quantize --scheme w4a16" in said
    assert "Traceback" not in said and not out.exists()
    done = finished_blocks(tmp_path / "out.job")
    code, said, err = run(*arguments(request_, out))
    assert code == 0, err
    assert (f"{done} blocks were finished earlier" in said) == (done > 0)
    assert finished_blocks(tmp_path / "out.job") == 0  # it is done, and nothing would be gone on from
    assert contents(out) == undisturbed


# ---- another job, another process, damage ----------------------------------------------------------------------


def test_the_finished_command_again_is_done_at_once(request_, undisturbed, tmp_path):
    out = tmp_path / "out"
    quantize(request_, out, Quiet())
    before = {p: p.stat().st_mtime_ns for p in out.iterdir()}
    assert quantize(request_, out, Bomb(0)).ok  # any progress would be the end of this process
    assert {p: p.stat().st_mtime_ns for p in out.iterdir()} == before
    assert contents(out) == undisturbed


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"seed": 4}, "plan.seed"),
        ({"scheme": "w8a16"}, "plan.linears"),
        ({"method": "gptq"}, "plan"),
        ({"samples": 7}, "plan.calibration"),
        ({"group_size": 16}, "plan.linears"),
        ({"options": {"damp": 0.05}}, "plan.linears"),
    ],
    ids=lambda v: next(iter(v)) if isinstance(v, dict) else v,
)
def test_another_job_in_the_same_folder_is_refused(change, field, request_, tmp_path):
    work = stopped_in_the_middle(request_, tmp_path / "out")
    before = contents(work)
    with pytest.raises(JobConflict, match=rf"holds another job: {field}\S* is .* there and .* now"):
        quantize(replace(request_, **change), tmp_path / "other", Quiet(), work=work)
    assert contents(work) == before


def test_a_job_that_committed_nothing_is_replaced(tmp_path):
    work = tmp_path / "job"
    for plan in (1, 2):
        with Job.open(work, {"plan": plan}) as job:
            (work / "rows" / "0000.bin").write_bytes(b"rows that no run goes on from")
    assert json.loads((work / "job.json").read_text())["plan"] == 2
    with Job.open(work, {"plan": 2}) as job:
        job.commit(0, {}, {}, None)
    with pytest.raises(JobConflict, match="plan is 2 there and 3 now"), Job.open(work, {"plan": 3}):
        pass


def test_the_header_of_a_committed_part_is_read_once(tmp_path):
    """The export asks for it with every linear, each time for thousands of tensors where a block has many experts."""
    with Job.open(tmp_path / "job", {"plan": 1}) as job:
        for index in range(6):
            save_tensors(job.part_path(index), {"before": torch.zeros(1)})
            assert list(job.part(index)) == ["before"]
            job.commit(index, {f"x{index}": torch.zeros(index + 1)}, {}, None)
        for index in (0, 1, 5, 4, 3, 2, 0):
            found = job.part(index)
            assert {n: i.shape for n, i in found.items()} == {f"x{index}": (index + 1,)} and job.part(index) is found


def test_another_model_or_text_is_refused(request_, tiny, tmp_path):
    work = stopped_in_the_middle(request_, tmp_path / "out")
    text = tmp_path / "text.txt"
    text.write_text(request_.calib.read_text()[200:])
    with pytest.raises(JobConflict, match=r"plan\.calibration\.digest"):
        quantize(replace(request_, calib=text), tmp_path / "other", Quiet(), work=work)
    other = tiny("llama", num_hidden_layers=BLOCKS, attention_bias=True)
    with pytest.raises(JobConflict):
        quantize(replace(request_, model=str(other)), tmp_path / "other", Quiet(), work=work)


def test_a_second_process_is_refused(request_, tmp_path):
    work = tmp_path / "job"
    with (
        Job.open(work, {"plan": 1}),
        pytest.raises(JobConflict, match=rf"in use by another process \(pid {os.getpid()}"),
    ):
        quantize(request_, tmp_path / "out", Quiet(), work=work)
    assert not (tmp_path / "out").exists()


def test_the_lock_of_a_killed_process_is_free(request_, undisturbed, tmp_path):
    stopped_in_the_middle(request_, tmp_path / "out")
    assert (tmp_path / "out.job" / "lock").read_text().startswith("pid ")
    assert quantize(request_, tmp_path / "out", Quiet()).ok
    assert contents(tmp_path / "out") == undisturbed


def flip(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("where", ["first part", "last part", "rows", "job.json"])
def test_a_flipped_bit_is_never_used(where, request_, tmp_path):
    work = stopped_in_the_middle(request_, tmp_path / "out")
    parts, rows = sorted((work / "parts").glob("0*.safetensors")), sorted((work / "rows").glob("0*.bin"))
    done = len((work / "journal.jsonl").read_bytes().splitlines())
    entering = next(p for p in rows if p.name == f"{done:04d}.bin")
    path = {"first part": parts[0], "last part": parts[done - 1], "rows": entering}.get(where, work / where)
    flip(path, path.stat().st_size * 2 // 3)
    with pytest.raises((BadInput, JobConflict), match=str(tmp_path)):
        quantize(request_, tmp_path / "out", Quiet())
    assert not (tmp_path / "out").exists()


def test_a_flipped_bit_anywhere_in_the_journal_is_refused(request_, tmp_path):
    work = stopped_in_the_middle(request_, tmp_path / "out")
    journal = work / "journal.jsonl"
    good = journal.read_bytes()
    chance = random.Random(0)
    figure = good.index(b'"error": ') + len(b'"error": ') + 3
    for position in [figure, *(chance.randrange(len(good) - 1) for _ in range(8))]:
        flip(journal, position)
        with pytest.raises(BadInput, match=r"journal\.jsonl|parts"):
            quantize(request_, tmp_path / "out", Quiet())
        journal.write_bytes(good)
    assert not (tmp_path / "out").exists()


def test_a_torn_last_line_is_dropped(request_, undisturbed, tmp_path):
    work = stopped_in_the_middle(request_, tmp_path / "out")
    with (work / "journal.jsonl").open("ab") as f:
        f.write(b'{"block": 9, "linears": {"model.la')
    assert quantize(request_, tmp_path / "out", Quiet()).ok
    assert contents(tmp_path / "out") == undisturbed


def test_a_journal_with_a_gap_is_refused(request_, tmp_path):
    work = stopped_in_the_middle(request_, tmp_path / "out")
    journal = work / "journal.jsonl"
    journal.write_bytes(b"".join(journal.read_bytes().splitlines(keepends=True)[1:]))
    with pytest.raises(BadInput, match="not consecutive"):
        quantize(request_, tmp_path / "out", Quiet())


@pytest.mark.parametrize("text", ["", "[]", "{", '{"version": 99}'])
def test_a_damaged_job_file_is_refused(text, request_, tmp_path):
    work = stopped_in_the_middle(request_, tmp_path / "out")
    (work / "job.json").write_text(text)
    before = contents(work)
    with pytest.raises(BadInput, match=r"job\.json"):
        quantize(request_, tmp_path / "out", Quiet())
    assert contents(work) == before  # nothing starts afresh without a word


# ---- where the output may go -----------------------------------------------------------------------------------


def test_output_folders_that_are_refused(request_, tmp_path):
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "notes.txt").write_text("mine")
    model = Path(request_.model)
    for out in (taken, model, model / "inside", tmp_path / "file"):
        (tmp_path / "file").write_text("")
        with pytest.raises(UsageError, match=str(out)):
            quantize(request_, out, Quiet(), work=tmp_path / "job")
    with pytest.raises(UsageError, match="job folder lies inside the model folder"):
        quantize(request_, tmp_path / "out", Quiet(), work=model / "job")
    assert [p.name for p in taken.iterdir()] == ["notes.txt"]
    assert not (tmp_path / "job").exists()


def test_overwrite_replaces_once_the_new_result_is_proven(request_, undisturbed, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "old.txt").write_text("old")
    (out / "qkit.json").write_text('{"files": {"old.txt": ""}}')  # something that was made before
    assert killed_after(request_, tmp_path / "elsewhere", 5)
    pid_status = in_child(lambda: quantize(request_, out, Bomb(20), overwrite=True))
    assert killed(pid_status) and (out / "old.txt").exists()
    assert quantize(request_, out, Quiet(), overwrite=True).ok
    assert contents(out) == undisturbed


def test_files_have_the_mode_that_open_gives(request_, tmp_path):
    before = os.umask(0o027)
    try:
        quantize(request_, tmp_path / "out", Quiet())
    finally:
        os.umask(before)
    assert {
        p.name: oct(p.stat().st_mode & 0o777) for p in (tmp_path / "out").iterdir() if p.stat().st_mode & 0o777 != 0o640
    } == {}


def test_the_journal_counts_what_happened(request_, tmp_path):
    out = tmp_path / "out"
    quantize(request_, out, Quiet(), keep_job=True)
    lines = [json.loads(line) for line in (tmp_path / "out.job" / "journal.jsonl").read_text().splitlines()]
    assert [line["block"] for line in lines] == list(range(BLOCKS))
    records = [r for line in lines for r in line["linears"].values()]
    assert len(records) == 7 * BLOCKS
    assert all(
        r["tokens"] == 8 * 32 and r["fallback"] is None and 0 < r["error"] <= r["baseline_error"] for r in records
    )
    assert torch.get_num_threads() == 1
