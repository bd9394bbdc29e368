"""Former names of method options in what an earlier version left: job folders and results."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import Quiet

from qkit.errors import JobConflict
from qkit.files.record import write_record
from qkit.planning.renamed import FORMER, record_under_current_names
from qkit.planning.request import Request
from qkit.verification.verify import verify
from qkit.workflows.quantize import quantize

OLD = {name: old for old, name in FORMER.items()}


def under_former_names(record):
    """The record as the version before would have written it."""
    if isinstance(record, list):
        return [under_former_names(value) for value in record]
    if not isinstance(record, dict):
        return record
    return {OLD.get(key, key): under_former_names(value) for key, value in record.items()}


class StopsAtTheSecondBlock(Quiet):
    """Raises KeyboardInterrupt when the first block is committed."""

    def start(self, what: str, total: int) -> None:
        if what.startswith("block 2"):
            raise KeyboardInterrupt


def former_record(file: Path) -> dict:
    record = json.loads(file.read_text())
    former = under_former_names(record)
    assert former != record and record_under_current_names(former) == record
    return former


@pytest.fixture
def asked(tiny, calib) -> Request:
    options = {"steps": 2, "batch": 4, "e2e_steps": 1}
    return Request(
        model=str(tiny("llama")), scheme="w4a16", method="signround", group_size=32, calib=calib, samples=4, seqlen=16,
        threads=1, options=options,
    )  # fmt: skip


def test_a_job_of_the_version_before_goes_on(asked, tmp_path):
    out, plain = tmp_path / "out", tmp_path / "plain"
    with pytest.raises(KeyboardInterrupt):
        quantize(asked, out, StopsAtTheSecondBlock())
    assert (tmp_path / "out.job" / "journal.jsonl").exists()
    file = tmp_path / "out.job" / "job.json"
    file.write_text(json.dumps(former_record(file)))
    with pytest.raises(JobConflict, match="e2e_steps"):
        quantize(replace(asked, options={**asked.options, "e2e_steps": 2}), out, Quiet())
    assert quantize(asked, out, Quiet()).ok
    quantize(asked, plain, Quiet())
    assert (out / "model.safetensors").read_bytes() == (plain / "model.safetensors").read_bytes()


def test_a_result_of_the_version_before_is_sound(asked, tmp_path):
    out = tmp_path / "out"
    assert quantize(asked, out, Quiet()).ok
    write_record(out, former_record(out / "qkit.json"))
    assert verify(out).ok
