"""Point 6: what plan and verify say of engines is what stock transformers does, and it is said before the work."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import transformers
from conftest import Quiet
from safetensors.torch import load_file
from tiny_models import FAMILIES, logits, relative, tokens

import qkit
from qkit.planning.fused_layers import engine_lines_of
from qkit.verification.model_engines import engine_lines
from qkit.verification.verify import verify
from qkit.workflows.quantize import Request, prepare, quantize

STOCK = "transformers + compressed-tensors"
X = tokens(2, 24)
WIDE = {"hidden_size": 128, "num_attention_heads": 2, "num_hidden_layers": 2, "vocab_size": 4096}
OTHERS = {
    "falcon": (transformers.FalconConfig, {**WIDE, "ffn_hidden_size": 256, "alibi": False, "bias": False}),
    "gpt_bigcode": (
        transformers.GPTBigCodeConfig,
        {"vocab_size": 4096, "n_embd": 128, "n_layer": 2, "n_head": 2, "n_inner": 256, "n_positions": 128},
    ),
    "nanochat": (
        transformers.NanoChatConfig,
        {**WIDE, "intermediate_size": 256, "num_key_value_heads": 2, "max_position_embeddings": 128},
    ),
}
MOE = {"hidden_size": 128, "moe_intermediate_size": 256, "head_dim": 64}
# name: (family, changes of its config, scheme or recipe, whether stock transformers loads it and agrees)
CASES = {
    "falcon w4a16": ("falcon", {}, "w4a16", False),
    "falcon w8a8": ("falcon", {}, "w8a8", True),
    "bigcode w4a16": ("gpt_bigcode", {}, "w4a16", False),
    "bigcode w8a8": ("gpt_bigcode", {}, "w8a8", True),
    "nanochat w4a16": ("nanochat", {}, "w4a16", False),
    "nanochat mxfp4a16": ("nanochat", {}, "mxfp4a16", False),
    "nanochat mxfp8a16": ("nanochat", {}, "mxfp8a16", True),
    "experts w4a16": ("qwen3_moe", MOE, "w4a16", True),
    "experts w4a8": ("qwen3_moe", MOE, "w4a8", True),
    "experts w8a8": ("qwen3_moe", MOE, "w8a8", False),
    "experts nvfp4a16": ("qwen3_moe", MOE, "nvfp4a16", False),
    "experts mxfp4a16": ("qwen3_moe", MOE, "mxfp4a16", True),
    "experts mxfp8a16": ("qwen3_moe", MOE, "mxfp8a16", False),
    "experts fp8_block": ("qwen3_moe", {**MOE, "head_dim": 128}, "fp8_block", False),
    "experts of another group": ("qwen3_moe", {**MOE, "moe_intermediate_size": 96}, "w4a16", True),
    "attention of another scheme": ("mixtral", {}, "rules: [{match: '*.self_attn.*', scheme: w8a16}]", True),
    "experts of another scheme": ("mixtral", {}, "rules: [{match: '*.experts.*', scheme: w3a16}]", True),
    "layers of several": ("mixtral", {}, "rules: [{match: '*.layers.0.*.experts.*', scheme: w8a16}]", False),
    "layers without": ("mixtral", {}, "rules: [{match: '*.layers.0.*.experts.*', skip: they matter}]", False),
    "experts torn": ("mixtral", {}, "engine: any\nrules: [{match: '*.w2', scheme: w8a16}]", False),
    "attention torn": ("llama", {}, "engine: any\nrules: [{match: '*.k_proj', scheme: w8a16}]", True),
}


class Made:
    """folder: of the packed checkpoint; lines: what the plan said of engines; error: of stock transformers, or None"""

    def __init__(self, folder, lines) -> None:
        self.folder, self.lines = folder, lines
        self.error: str | None = None

    def line(self, engine):
        (found,) = [x for x in self.lines if x.engine == engine]
        return found


@pytest.fixture(scope="module")
def made(tmp_path_factory, tiny):
    """{name: what became of a case}, loaded by one process that never imports qkit."""
    root = tmp_path_factory.mktemp("engines")
    found = {}
    with pytest.MonkeyPatch.context() as patch:
        for family, declared in OTHERS.items():
            patch.setitem(FAMILIES, family, declared)
        for name, (family, changes, asked, _) in CASES.items():
            out, model = root / name.replace(" ", "-"), tiny(family, **changes)
            if "rules" in asked:
                recipe = root / "recipe.yaml"
                recipe.write_text(f"scheme: w4a16\ngroup_size: 32\n{asked}\n", encoding="utf-8")
                request = Request(model=str(model), recipe=recipe, threads=1)
            else:
                request = Request(model=str(model), scheme=asked, threads=1)
            prepared = prepare(request)
            assert quantize(request, out, Quiet(), prepared=prepared).problems == []
            found[name] = Made(out, engine_lines_of(prepared.plan, prepared.structure))
    jobs = root / "jobs.json"
    loads = [[str(x.folder), "bfloat16"] for x in found.values()]
    jobs.write_text(json.dumps({"tokens": X.tolist(), "loads": loads}))
    script = Path(__file__).parents[1] / "stock_load.py"
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    command = [sys.executable, "-I", str(script), str(jobs)]
    run = subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    errors = json.loads(Path(f"{jobs}.out").read_text())
    for x in found.values():
        x.error = errors[f"{x.folder}|bfloat16"]
    return found


@pytest.mark.parametrize("name", CASES)
def test_what_is_said_of_stock_transformers_is_so(name, made):
    x, (family, _, _, loads) = made[name], CASES[name]
    assert x.line(STOCK).loads == loads, x.line(STOCK)
    if x.error is not None:
        assert not loads, x.error
        return
    mine, stock = logits(qkit.load(x.folder), X), load_file(f"{x.folder}.bfloat16.safetensors")["logits"]
    moe = family in ("mixtral", "qwen3_moe")  # a token between two routes may take the other
    away = float(((stock - mine).norm(dim=-1) / mine.norm(dim=-1)).median()) if moe else relative(stock, mine)
    assert (away < 0.04) == loads, f"{away:.3f} away"


@pytest.mark.parametrize("name", CASES)
def test_verify_says_the_same_as_plan(name, made):
    x = made[name]
    said = [(line.engine, line.loads) for line in engine_lines(verify(x.folder).engines)]
    assert said == [(line.engine, line.loads) for line in x.lines]


@pytest.mark.parametrize(
    ("name", "loads", "note"),
    [
        ("experts w4a16", True, "experts have no kernel for CPUs"),
        ("experts w4a8", False, "its kernel for experts of these formats is for CPUs alone"),
        ("experts torn", False, "runs the experts of a layer as one product"),
        ("attention torn", False, "it loads q_proj, k_proj, v_proj of model.layers.0.self_attn as one"),
        ("layers of several", True, "tensor-parallel rank"),
        ("nanochat mxfp4a16", True, "quantizes them too on Blackwell"),
    ],
)
def test_what_is_said_of_vllm(name, loads, note, made):
    line = made[name].line("vLLM")
    assert line.loads == loads and note in str(line)


def test_fp8_blocks_that_end_within_a_fused_part(tiny, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("scheme: fp8_block\nengine: any\n", encoding="utf-8")
    found = prepare(Request(model=str(tiny("llama", hidden_size=128, intermediate_size=256)), recipe=recipe))
    line = next(x for x in engine_lines_of(found.plan, found.structure) if x.engine == "vLLM")
    assert not line.loads and "k_proj as one with v_proj" in str(line)


def test_limits_are_printed_before_the_work(run, tiny, tmp_path):
    options = ("--model", tiny("llama"), "--scheme", "w3a16")
    code, out, _ = run("plan", *options, "--json", tmp_path / "plan.json")
    lines = [line for line in out.splitlines() if line.startswith("the result ")]
    assert code == 0 and [re.split(r": | \[", line)[0] for line in lines] == [
        "the result loads in vLLM",
        f"the result loads in {STOCK}",
        "the result loads in qkit",
    ]
    assert (
        "with Humming" in lines[0]
        and "no kernel for CPUs" in lines[0]
        and "compressed-tensors release newer" in lines[1]
    )
    engines = json.loads((tmp_path / "plan.json").read_text())["engines"]
    assert [(e["engine"], e["loads"]) for e in engines] == [("vLLM", True), (STOCK, True), ("qkit", True)]
    code, out, _ = run("quantize", *options, "--out", tmp_path / "out")
    assert code == 0 and all(out.index(line) < out.index("verified with") for line in lines)
    assert "loads in vLLM: CompressedTensorsWNA16" in out


def test_an_engine_that_refuses_one_of_several_formats_refuses_the_result(run, tiny, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("scheme: w4a16\nrules: [{match: '*.down_proj', scheme: w3a16_asym}]\n", encoding="utf-8")
    code, out, _ = run("quantize", "--model", tiny("llama"), "--recipe", recipe, "--out", tmp_path / "out")
    assert code == 0 and f"the result does not load in {STOCK}" in out
    assert f"\nloads in {STOCK}" not in out and "\nloads in qkit" in out


def test_the_consequence_of_any_engine_is_said_once(run, tiny, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"scheme: w4a16\ngroup_size: 32\n{CASES['attention torn'][2]}\n", encoding="utf-8")
    code, out, _ = run("plan", "--model", tiny("llama"), "--recipe", recipe)
    assert code == 0 and out.count("their formats differ") == 1
