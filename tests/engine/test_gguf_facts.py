"""What is said of a result in GGUF: its card, the engines that load it, its types by names of llama.cpp, method auto."""

import json

import pytest
from conftest import Quiet

from qkit.errors import UsageError
from qkit.files.gguf_container import MODEL
from qkit.planning.fused_layers import engine_lines_of
from qkit.planning.recipe import make_recipe, trial_recipes
from qkit.system.words import megabytes
from qkit.tensor.formats import scheme
from qkit.verification.gguf_engines import gguf_rows
from qkit.verification.verify import verify
from qkit.workflows.quantize import Request, prepare, quantize

pytest.importorskip("gguf", reason="the gguf package is not installed: pip install 'qkit[gguf]'")


@pytest.fixture(scope="module")
def made(tiny, tmp_path_factory):
    """(source, result) of a model with a card"""
    import shutil

    source, out = tmp_path_factory.mktemp("source") / "model", tmp_path_factory.mktemp("out") / "out"
    shutil.copytree(tiny("llama"), source)
    (source / "README.md").write_text("---\nlicense: mit\n---\n# The original\n", encoding="utf-8")
    quantize(Request(model=str(source), scheme="q5_0"), out, Quiet())
    return source, out


def test_the_card_has_the_facts_of_the_file_behind_those_of_the_source(made):
    _, out = made
    card = (out / "README.md").read_text(encoding="utf-8")
    assert (
        card.startswith("---\nlicense: mit\nlibrary_name: gguf\ntags: [qkit, gguf, ")
        and "\n---\n# The original\n" in card
    )
    assert f", {megabytes((out / MODEL).stat().st_size)} after." in card and "- Method: rtn with" in card
    assert "| Q5_0 | q5_0 |" in card and "| 5.500 |" in card and "| Q8_0 | q8_0 |" in card
    assert "`llama-server --model model.gguf`" in card and "vLLM does not load it" in card
    assert verify(out).ok
    before = (out / "README.md").read_bytes()
    try:
        (out / "README.md").write_bytes(before.replace(b"rtn", b"gptq"))
        assert verify(out).ok and "README.md was edited" in verify(out).notes
    finally:
        (out / "README.md").write_bytes(before)


def test_a_source_without_a_card_gets_one(tiny, tmp_path):
    source, out = tiny("llama"), tmp_path / "out"
    assert not (source / "README.md").exists()
    quantize(Request(model=str(source), scheme="q8_0"), out, Quiet())
    assert "## Quantized with qkit" in (out / "README.md").read_text(encoding="utf-8") and verify(out).ok


def test_engines_are_named_by_plan_and_by_verify(made, run):
    source, out = made
    prepared = prepare(Request(model=str(source), scheme="q5_0"))
    lines = {line.engine: line.loads for line in engine_lines_of(prepared.plan, prepared.structure)}
    assert lines == {"llama.cpp": True, "transformers": True, "vLLM": False, "qkit": True}
    assert {row.engine: row.loads_as is not None for row in verify(out).engines} == lines
    code, said, _ = run("verify", out)
    assert code == 0 and "stored as GGUF" in said and "vLLM 0.32 reads no GGUF files" in said


def test_transformers_is_not_said_to_decode_nvfp4():
    rows = {row.engine: row for row in gguf_rows(["q8_0", "gguf_nvfp4"])}
    assert rows["transformers"].loads_as is None and rows["llama.cpp"].weights == "Q8_0, NVFP4"


def test_transformers_decodes_the_same_numbers(made):
    import torch
    from transformers import AutoModelForCausalLM, GgufConfig

    import qkit

    _, out = made
    decoded = AutoModelForCausalLM.from_pretrained(
        out, gguf_file=MODEL, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
    ).state_dict()
    for name, value in qkit.load(out, dtype=torch.float32).state_dict().items():
        assert torch.equal(decoded[name], value), name


def test_what_is_said_of_a_tied_head_is_said_once(tiny, run):
    source = tiny("llama", tie_word_embeddings=True)
    code, said, _ = run("plan", "--model", source, "--scheme", "q8_0")
    assert code == 0 and said.count("lm_head") == 1 and "one matrix with" not in said


@pytest.mark.parametrize("name", ["q4_k_m", "Q3_K_S", "Q3_K_L", "q2_k_xl"])
def test_names_of_mixes_are_explained(name):
    with pytest.raises(
        UsageError, match=f"'{name}': it is llama.cpp's name for a mix .* use q[234]_k for one type, or"
    ):
        scheme(name)


def test_types_are_known_in_capitals():
    assert scheme("Q4_K") is scheme("q4_k") and scheme("IQ4_XS").weights.name == "iq4_xs"


def test_auto_tries_what_gguf_can_hold(tiny, calib, tmp_path):
    recipe = make_recipe({"scheme": "q3_k", "method": "auto"}, "test")
    trials = trial_recipes(recipe, False)
    assert set(trials) == {"gptq", "gptq, compensate 0.5", "rtn"} and not any(
        "signed" in r.options for r in trials.values()
    )
    source, out = tiny("llama", num_hidden_layers=1), tmp_path / "out"
    quantize(Request(model=str(source), scheme="q4_0", method="auto", calib=calib, samples=4, seqlen=16), out, Quiet())
    linears = json.loads((out / "qkit.json").read_text())["linears"]
    assert all(x["recipe"] in trials for name, x in linears.items() if ".layers." in name)
