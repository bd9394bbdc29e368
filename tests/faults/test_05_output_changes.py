"""Point 5: whatever is changed in an output folder, verify exits with 4 and names it; of the card alone it makes a note."""

import json
import shutil

import pytest
from output_changes import changes, survivors
from output_kinds import KINDS, make

from qkit.verification.verify import verify


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    """A W4A16 folder with side files and a policy for the KV cache."""
    return make("w4a16 with a packed cache", tmp_path_factory.mktemp("changes"))


def test_a_folder_as_written_is_sound(out):
    report = verify(out)
    assert report.ok and report.notes == [] and report.checks["files"] > 0


@pytest.mark.parametrize("first", range(2))
def test_a_sample_of_all_changes(out, tmp_path, first):
    tried, sound, elsewhere = survivors(out, tmp_path / "work", 12, first)
    assert tried > 50 and sound == [] and elsewhere == []


def test_what_is_not_found_is_the_text_of_the_card(out, tmp_path):
    """A link, a folder or a pipe in its place is found as that of any other file."""
    found = {}
    for change in (c for c in changes(out) if c.name.startswith("README.md: ")):
        shutil.rmtree(tmp_path / "work", ignore_errors=True)
        shutil.copytree(out, tmp_path / "work" / "out")
        change.make(tmp_path / "work" / "out")
        report = verify(tmp_path / "work" / "out")
        found[change.name.partition(": ")[2]] = report.ok
        assert not report.ok or any("README.md" in note for note in report.notes)
    assert {name for name, ok in found.items() if not ok} == {"renamed", "made a link", "made a folder", "made a pipe"}
    assert {"emptied", "cut", "longer", "removed"} <= found.keys()


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_all_changes(kind, tmp_path):
    """As tools/mutate_output.py, whose figures are in reports/reliability/output_changes.json."""
    tried, sound, elsewhere = survivors(make(kind, tmp_path / "kind"), tmp_path / "work")
    assert tried > 400 and sound == [] and elsewhere == []


def changed(out, to, name, **fields):
    shutil.copytree(out, to)
    data = json.loads((to / name).read_text())
    (to / name).write_text(json.dumps({**data, **fields}, indent=2, sort_keys=True) + "\n")
    return to


def test_the_sentence_says_field_found_and_expected(out, tmp_path, run):
    changed(out, tmp_path / "out", "config.json", num_hidden_layers=7)
    code, _, err = run("verify", tmp_path / "out")
    assert code == 4 and "config.json: num_hidden_layers: found 7, expected 1" in err
    changed(out, tmp_path / "code", "config.json", auto_map={"AutoModel": "evil.Evil"})
    code, _, err = run("verify", tmp_path / "code")
    assert code == 4 and "config.json: auto_map: found" in err and "expected no such field" in err


def test_files_are_named(out, tmp_path, run):
    for name, part in (("tokenizer.json", "is listed in qkit.json and is not in the folder"), ("LICENSE", "LICENSE")):
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        shutil.copytree(out, tmp_path / "out")
        (tmp_path / "out" / name).unlink()
        code, _, err = run("verify", tmp_path / "out")
        assert code == 4 and name in err and part in err
    shutil.copytree(out, tmp_path / "more")
    (tmp_path / "more" / "notes").mkdir()
    (tmp_path / "more" / "notes" / "mine.txt").write_text("x")
    code, said, err = run("verify", tmp_path / "more")
    assert code == 4 and "notes/mine.txt: is not listed in qkit.json" in said + err


def test_a_record_without_its_sums_is_not_taken_for_an_old_one(out, tmp_path):
    for dropped in ("files", "config", "sum"):
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        shutil.copytree(out, tmp_path / "out")
        record = json.loads((out / "qkit.json").read_text())
        del record[dropped]
        (tmp_path / "out" / "qkit.json").write_text(json.dumps({**record, "format_version": 1}))
        assert any(dropped in problem.where for problem in verify(tmp_path / "out").problems)


def test_the_mark_of_a_rejected_result_is_no_unknown_file(out, tmp_path, run):
    shutil.copytree(out, tmp_path / "out")
    (tmp_path / "out" / "qkit-rejected.json").write_text('{"made_by": "qkit check"}')
    code, said, _ = run("verify", tmp_path / "out")
    assert code == 0 and "rejected this result" in said
