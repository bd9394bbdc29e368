"""Point 17: a result for any engine, with two formats where engines load layers as one, is packed, proven and loaded right."""

import json

import pytest
import torch
from conftest import Quiet
from decompressed import reference_model
from tiny_models import logits, relative, tokens

import qkit
from qkit.verification.verify import verify
from qkit.workflows.quantize import Request, quantize

ATTENTION = "{match: '*.k_proj', scheme: w8a16}"
CASES = {
    "rtn": ("llama", "rtn", [ATTENTION]),
    "gptq and scales": ("llama", "awq+gptq", [ATTENTION, "{match: '*.up_proj', scheme: fp8_dynamic}"]),
    "skip": ("llama", "gptq", ["{match: '*.v_proj', skip: it matters}"]),
    "learned": ("llama", "signround", [ATTENTION]),
    "rotated": ("llama", "rotate+gptq", [ATTENTION]),
    "down of experts": ("mixtral", "gptq", ["{match: '*.w2', scheme: w8a16}"]),
    "gate of experts": ("qwen3_moe", "gptq", ["{match: '*.experts.*.gate_proj', scheme: fp8}"]),
}


@pytest.mark.parametrize("case", CASES)
def test_a_result_for_any_engine_computes_what_its_file_says(case, tiny, tmp_path, calib):
    family, method, rules = CASES[case]
    recipe, out = tmp_path / "recipe.yaml", tmp_path / "out"
    listed = "".join(f"  - {rule}\n" for rule in rules)
    recipe.write_text(
        f"scheme: w4a16\ngroup_size: 32\nmethod: {method}\nengine: any\nrules:\n{listed}", encoding="utf-8"
    )
    asked = Request(model=str(tiny(family)), recipe=recipe, calib=calib, samples=8, seqlen=32, threads=1)
    assert quantize(asked, out, Quiet()).problems == []
    x, original = tokens(2, 24), tiny(family)
    wanted = logits(reference_model(out, original), x)
    found = logits(qkit.load(out, dtype=torch.float32), x)
    if family == "llama":
        assert relative(found, wanted) < 1e-5
    else:  # a token between two routes may take the other
        assert float(((found - wanted).norm(dim=-1) / wanted.norm(dim=-1)).median()) < 1e-3
    untouched = logits(qkit.load(original, dtype=torch.float32), x)
    assert relative(found, untouched) < 0.5


def test_verify_knows_that_it_was_asked_for(tiny, tmp_path):
    recipe, out = tmp_path / "recipe.yaml", tmp_path / "out"
    recipe.write_text(f"scheme: w4a16\ngroup_size: 32\nengine: any\nrules: [{ATTENTION}]\n", encoding="utf-8")
    quantize(Request(model=str(tiny("llama")), recipe=recipe), out, Quiet())
    assert verify(out).problems == []
    record = json.loads((out / "qkit.json").read_text())
    assert not any(name.endswith("k_proj") for group in record["fused"] for name in group)
    del record["recipe"]["engine"]
    (out / "qkit.json").write_text(json.dumps(record))
    said = {problem.what for problem in verify(out).problems}
    assert "the weight formats differ" in said
