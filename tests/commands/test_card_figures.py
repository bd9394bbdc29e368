"""qkit eval --card: the figures of a result in its card, beside the words of the user."""

import shutil

import pytest
from conftest import Quiet

from qkit.verification.verify import verify
from qkit.workflows.quantize import Request, quantize


@pytest.fixture(scope="module")
def results(tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("figures")
    for scheme, size in (("w4a16", 32), ("w8a16", None)):
        quantize(Request(model=str(tiny("llama")), scheme=scheme, group_size=size), folder / scheme, Quiet())
    return folder


def test_figures_go_into_the_card_of_every_result(results, tiny, run, tmp_path):
    folder = shutil.copytree(results, tmp_path / "results")
    text, words = tmp_path / "held.txt", "# Mine\n"
    text.write_text(" ".join(f"word{i}" for i in range(400)))
    card = folder / "w4a16" / "README.md"
    card.write_text(card.read_text() + words)
    options = ("--baseline", tiny("llama"), "--text", f"held={text}", "--window", 16, "--windows", 4, "--card")
    code, _, err = run("eval", folder / "w4a16", folder / "w8a16", *options)
    assert code == 0, err
    first, second = card.read_text(), (folder / "w8a16" / "README.md").read_text()
    for found in (first, second):
        assert found.count("## Figures") == 1 and "Measured by `qkit eval`" in found and "compared with llama." in found
        assert (
            "| text | perplexity (95 % ci) | windows | baseline | change % | KL mean | KL p99 | same top-1 |" in found
        )
        assert "| held | " in found and str(tmp_path) not in found
    assert words in first and verify(folder / "w4a16").ok and verify(folder / "w8a16").notes == []
    code, _, err = run("eval", folder / "w8a16", *options[2:])  # without a baseline, in place of what was there
    again = (folder / "w8a16" / "README.md").read_text()
    assert code == 0 and again.count("## Figures") == 1 and "KL mean" not in again


def test_a_folder_of_another_tool_is_refused_before_anything_is_measured(tiny, run):
    code, _, err = run("eval", tiny("llama"), "--card")
    assert code == 3 and "not a result of qkit" in err and not (tiny("llama") / "README.md").exists()
