"""The card of a result: how it was quantized and how it is loaded, behind what the source says of itself."""

import json
import re
import shutil

import pytest
from conftest import Quiet

from qkit.engine.card import result_card
from qkit.files.locate import find_model
from qkit.verification.verify import verify
from qkit.workflows.convert import convert
from qkit.workflows.quantize import Request, prepare, quantize

HEAD = "---\nlicense: mit\nbase_model:\n- someone/else\ntags: [x]\n---\n"
OURS = "tags: [x, qkit, compressed-tensors, w4a16, 4-bit]\nlibrary_name: transformers\npipeline_tag: text-generation\n"


@pytest.fixture(scope="module")
def made(tiny, tmp_path_factory):
    """(source, result) of a model with a card"""
    source, out = tmp_path_factory.mktemp("source") / "model", tmp_path_factory.mktemp("out") / "out"
    shutil.copytree(tiny("llama"), source)
    (source / "README.md").write_text(f"{HEAD}# The original\n", encoding="utf-8")
    request = Request(model=str(source), scheme="w4a16", method="gptq", options={"damp": 0.02}, samples=4, seqlen=16)
    quantize(request, out, Quiet())
    return source, out


def test_the_card_says_how_the_result_was_made_and_how_it_is_loaded(made):
    source, out = made
    card = (out / "README.md").read_text(encoding="utf-8")
    head = f"{HEAD.replace('tags: [x]', OURS.rstrip())}# The original\n"
    assert card.startswith(head) and card.count("## Quantized with qkit") == 1
    record = json.loads((out / "qkit.json").read_text())
    assert re.search(r"\| W4A16 \| int4, group \d+ \| 16 bits \| gptq \| `\w+_proj`", card)
    assert "- Method: gptq with " in card and "`damp=0.02`" in card
    assert "- Calibration: 4 samples of 16 tokens of embedded calibration text." in card
    assert all(f"`{name}`" in card and reason in card for name, reason in record["skipped"].items())
    assert "- vLLM: `vllm serve FOLDER` (" in card and '`AutoModelForCausalLM.from_pretrained("FOLDER")`' in card
    assert str(source) not in card and str(out) not in card
    assert verify(out).ok


def test_the_card_has_the_command_of_the_recipe(made):
    out = made[1]
    card, recipe = (out / "README.md").read_text(encoding="utf-8"), (out / "recipe.yaml").read_text()
    command = next(line.strip() for line in card.splitlines() if line.startswith("    qkit quantize "))
    assert command == "qkit quantize --model MODEL --recipe recipe.yaml --out OUT" and f"#   {command}\n" in recipe


def test_a_card_is_not_written_twice(made):
    prepared = prepare(Request(model=str(made[0]), scheme="w8a16", method="rtn"))
    once = result_card(b"# A card", prepared.plan, prepared.structure, 5, "qkit")
    assert result_card(once, prepared.plan, prepared.structure, 5, "qkit") == once and b"# A card" in once


def test_a_model_of_the_hub_is_named_as_the_base(made, tmp_path):
    snapshot = tmp_path / "models--owner--name" / "snapshots" / ("0" * 40)
    shutil.copytree(made[0], snapshot)
    quantize(Request(model=str(snapshot), scheme="w8a16", method="rtn"), tmp_path / "out", Quiet())
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    ours = OURS.replace("4-bit", "8-bit").replace("w4a16", "w8a16")
    head = f"---\nlicense: mit\nbase_model: owner/name\nbase_model_relation: quantized\n{ours}---\n# The original\n"
    assert card.startswith(head) and "qkit quantize --model owner/name --recipe recipe.yaml" in card


def test_a_converted_result_keeps_how_it_was_quantized_and_not_how_it_is_loaded(made, tmp_path):
    convert(str(made[1]), "gptq", tmp_path / "gptq", Quiet())
    card = (tmp_path / "gptq" / "README.md").read_text(encoding="utf-8")
    assert (
        "- Method: gptq with " in card and "How to load it:" not in card and card.count("<!-- qkit: quantization") == 1
    )
    assert "tags: [x, qkit, w4a16, 4-bit, gptq]\n" in card
    assert "Written in the layout gptq by qkit" in card and "(`qkit convert`)" in card and verify(tmp_path / "gptq").ok


def test_the_reference_pipeline_has_a_card_beside_its_index(tmp_path):
    pytest.importorskip("diffusers")
    quantize(Request(model=str(find_model("tiny-video")), scheme="w8a16", method="rtn"), tmp_path / "out", Quiet())
    assert "`DiffusionPipeline.from_pretrained(" in (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert not (tmp_path / "out" / "transformer" / "README.md").exists() and verify(tmp_path / "out").ok


def test_the_card_of_a_result_for_mlx_names_its_server(tiny):
    prepared = prepare(Request(model=str(tiny("llama")), scheme="w4a16", method="rtn", export="mlx", group_size=32))
    card = result_card(b"", prepared.plan, prepared.structure, 5, "qkit").decode()
    assert "library_name: mlx\n" in card and "- mlx" not in card.partition("---\n")[2].partition("---")[0]
    assert "- mlx-lm: `mlx_lm.server --model FOLDER`" in card and "- vLLM does not load it" in card
