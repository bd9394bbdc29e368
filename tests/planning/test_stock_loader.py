"""What in a model's class keeps stock transformers from loading a packed result."""

import json
import sys
from pathlib import Path

import pytest

import qkit
from qkit.planning.fused_layers import engine_lines_of
from qkit.planning.request import Request
from qkit.workflows.quantize import prepare

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))

import sweep_configs

STOCK = "transformers + compressed-tensors"


def lines(folder, scheme, recipe=None):
    prepared = prepare(Request(model=str(folder), scheme=scheme, method="rtn", recipe=recipe))
    shapes = [(n, tuple(p.shape)) for n, p in prepared.structure.model.named_parameters()]
    line = next(x for x in engine_lines_of(prepared.plan, prepared.structure) if x.engine == STOCK)
    assert shapes == [(n, tuple(p.shape)) for n, p in prepared.structure.model.named_parameters()]
    return line


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("pix2struct", "looks at the weight of a linear"),  # its initializer
        ("qianfan_ocr", "joins or splits vision_model.encoder.layers.0.attn.qkv.weight"),
        ("step3p7", "joins or splits model.layers.2.moe"),  # experts that stay as they are
        ("molmo2", None),  # what it splits is packed
    ],
)
def test_plan_and_proof_say_what_stock_transformers_does(name, said, tmp_path):
    source = sweep_configs.save("image-text", name, tmp_path / "source")
    recipe = None
    if name == "step3p7":
        recipe = tmp_path / "recipe.yaml"
        recipe.write_text("rules:\n  - {match: '*.moe.experts.*', skip: they stay as they are}\n")
    planned = lines(source, "w4a16", recipe)
    assert planned.loads is (said is None)
    assert said is None or any(said in note for note in planned.notes)
    report = qkit.quantize(source, out=tmp_path / "out", scheme="w4a16", method="rtn", recipe=recipe)
    rows = [row for row in report.to_json()["engines"] if row["engine"] == STOCK]
    assert all((row["loads_as"] is None) is (said is not None) for row in rows)
    assert ("stock_refusal" in json.loads((tmp_path / "out/qkit.json").read_text())) is (said is not None)


def test_weights_that_are_not_packed_are_there_while_the_model_loads(tmp_path):
    assert lines(sweep_configs.save("image-text", "pix2struct", tmp_path), "fp8_dynamic").loads
