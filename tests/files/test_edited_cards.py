"""The card of a result (README.md) is the user's to edit: verify accepts it, and what qkit writes into it leaves the rest."""

import shutil

import pytest
from conftest import Quiet

from qkit.files.card import FIGURES, QUANTIZATION, edited_card, rewrite_card, section, with_section, without_sections
from qkit.verification.verify import verify
from qkit.workflows.convert import convert
from qkit.workflows.quantize import Request, quantize

WORDS = "# My model\n\nWritten by hand.\n"


@pytest.fixture(scope="module")
def result(tiny, tmp_path_factory):
    out = tmp_path_factory.mktemp("card") / "out"
    quantize(Request(model=str(tiny("llama")), scheme="w4a16", group_size=32), out, Quiet())
    return out


@pytest.fixture
def out(result, tmp_path):
    return shutil.copytree(result, tmp_path / "out")


def test_an_edited_a_removed_and_an_added_card_are_noted_and_nothing_else_is_let_through(out, run, tmp_path):
    card = out / "README.md"
    assert verify(out).ok and verify(out).notes == []
    card.write_text(WORDS + card.read_text())
    code, said, _ = run("verify", out)
    assert code == 0 and said.count("note: README.md was edited") == 1
    card.unlink()
    assert verify(out).ok and verify(out).notes == ["README.md was removed"]
    card.mkdir()
    assert not verify(out).ok  # a folder could hold anything
    card.rmdir()
    card.symlink_to(tmp_path / "elsewhere")
    assert not verify(out).ok
    card.unlink()
    (out / "readme.txt").write_text("x")
    assert run("verify", out)[0] == 4
    (out / "readme.txt").unlink()
    (out / "config.json").write_text((out / "config.json").read_text() + " ")
    assert run("verify", out)[0] == 4


def test_a_card_that_the_record_does_not_know_is_noted(out):
    from qkit.files.record import packed_record, write_record

    record = packed_record(out)
    del record["files"]["README.md"]
    write_record(out, record)
    assert verify(out).ok and verify(out).notes == ["README.md was added"]


def test_sections_are_replaced_where_they_are(out):
    card = with_section(with_section(b"above", QUANTIZATION, b"one"), FIGURES, b"two\n") + b"below\n"
    assert card.startswith(b"above\n\n<!-- qkit: quantization -->\none\n<!-- /qkit: quantization -->\n")
    again = with_section(card, QUANTIZATION, b"three")
    assert again == card.replace(b"one", b"three") and section(again, FIGURES) == b"two"
    assert with_section(again, FIGURES, b"two") == again
    by_hand = again.replace(b"\n", b"\r\n")  # of an editor that ends lines so
    assert without_sections(by_hand, QUANTIZATION, FIGURES) == b"above\r\nbelow\r\n"


def test_the_record_follows_a_card_that_nobody_edited(out):
    rewrite_card(out, lambda card: with_section(card, FIGURES, b"figures"))
    assert verify(out).ok and verify(out).notes == [] and edited_card(out) is None
    (out / "README.md").write_text(WORDS)
    rewrite_card(out, lambda card: with_section(card, FIGURES, b"figures"))
    assert verify(out).notes == ["README.md was edited"] and (out / "README.md").read_text().startswith(WORDS)
    assert edited_card(out) == (out / "README.md").read_bytes()


def test_quantize_and_convert_keep_what_a_user_wrote(out, tiny, tmp_path, run):
    card, model = out / "README.md", str(tiny("llama"))
    rewrite_card(out, lambda before: with_section(before, FIGURES, b"figures of these weights"))
    head, sections = card.read_text().split("---\n")[1:]
    card.write_text(f"---\n{head}---\n{WORDS}{sections}Behind it.\n")
    edited = card.read_text()
    code, said, _ = run("quantize", "--model", model, "--scheme", "w4a16", "--group-size", 32, "--out", out)
    assert code == 0 and "already complete" in said and card.read_text() == edited
    convert(str(out), "gptq", tmp_path / "gptq", Quiet())
    moved = (tmp_path / "gptq" / "README.md").read_text()
    assert f"---\n{WORDS}" in moved and "Behind it." in moved and "figures of these weights" in moved
    run("quantize", "--model", model, "--scheme", "w8a16", "--out", out, "--overwrite")
    now = card.read_text()
    assert f"---\n{WORDS}" in now and now.endswith("Behind it.\n") and "W8A16" in now and "W4A16" not in now
    assert "figures of these weights" not in now and verify(out).ok
    run("quantize", "--model", model, "--scheme", "w4a16", "--out", out, "--overwrite")
    assert "Written by hand." in card.read_text() and verify(out).notes == ["README.md was edited"]
