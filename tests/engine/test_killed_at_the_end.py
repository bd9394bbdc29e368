"""The same command after a kill behind its last step: the result has its name, and the job folder still has parts."""

import json

import pytest
from conftest import Quiet

from qkit.workflows.quantize import Request, quantize


def listed(folder):
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file() and p.name != "lock")


@pytest.mark.parametrize("marked", [False, True], ids=["before the mark", "before the parts are removed"])
def test_what_a_killed_command_left_goes_with_the_next_one(marked, tiny, tmp_path):
    request = Request(model=str(tiny("llama")), scheme="w4a16", method="rtn")
    quantize(request, tmp_path / "whole", Quiet())
    out, job = tmp_path / "out", tmp_path / "out.job"
    quantize(request, out, Quiet(), keep_job=True)  # what is there when the last step was not reached
    if marked:
        file = job / "job.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), "finished": True}))
    (job / "parts" / ".qkit-tmp-0123456789abcdef").touch()
    (job / "notes.txt").touch()
    before = {p.name: p.read_bytes() for p in out.iterdir()}
    assert any((job / "parts").iterdir())
    quantize(request, out, Quiet())
    assert listed(job) == sorted([*listed(tmp_path / "whole.job"), "notes.txt"])
    assert json.loads((job / "job.json").read_text())["finished"] is True
    assert before == {p.name: p.read_bytes() for p in out.iterdir()}
    assert before == {p.name: p.read_bytes() for p in (tmp_path / "whole").iterdir()}


def test_the_folder_of_another_job_stays_as_it_is(tiny, tmp_path):
    model, out, other = str(tiny("llama")), tmp_path / "out", tmp_path / "other"
    quantize(Request(model=model, scheme="w4a16", method="rtn"), out, Quiet(), work=tmp_path / "gone")
    quantize(Request(model=model, scheme="w8a16", method="rtn"), other, Quiet(), keep_job=True)
    before = listed(tmp_path / "other.job")
    quantize(Request(model=model, scheme="w4a16", method="rtn"), out, Quiet(), work=tmp_path / "other.job")
    assert listed(tmp_path / "other.job") == before and any("parts" in name for name in before)
