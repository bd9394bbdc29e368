"""--unloaded: matrices that the model's class does not load, such as heads for multi-token prediction."""

import json
import sys
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import qkit
from qkit.errors import Unsupported, UsageError
from qkit.planning.fused_layers import engine_lines_of
from qkit.planning.request import Request
from qkit.workflows.quantize import prepare

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))

import sweep_configs

FUSED = tuple(f"mtp.layers.0.{n}" for n in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"))
FUSED += tuple(f"mtp.layers.0.{n}" for n in ("mlp.gate_proj", "mlp.up_proj"))  # engines load them as one
PACKED = (*FUSED, "mtp.layers.0.mlp.down_proj", "mtp.fc")
EXPERTS = "mtp.layers.0.mlp.experts"
PLAIN = ("mtp.norm", "mtp.embed_tokens", "mtp.small_proj")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = sweep_configs.save("causal", "stablelm", tmp_path_factory.mktemp("m") / "model")
    tensors = load_file(folder / "model.safetensors")
    made = torch.Generator().manual_seed(0)
    shapes = {n: (96, 128) for n in FUSED} | {PACKED[-2]: (128, 96), PACKED[-1]: (128, 256), PLAIN[0]: (128,)}
    shapes |= {PLAIN[1]: (64, 128)}
    for name, shape in {**shapes, PLAIN[2]: (4, 128)}.items():
        tensors[f"{name}.weight"] = torch.randn(shape, generator=made).bfloat16()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_they_are_packed_and_proved_and_the_model_is_the_same(model, tmp_path, run):
    options = ("--scheme", "w4a16", "--method", "gptq", "--samples", 2, "--seqlen", 16)
    for name, more in (("without", ()), ("with", ("--unloaded", "int8"))):
        code, _, err = run("quantize", "--model", model, *options, *more, "--out", tmp_path / name)
        assert code == 0, err
    assert run("verify", tmp_path / "with")[0] == 0
    record = json.loads((tmp_path / "with" / "qkit.json").read_text())
    assert {n for n in record["linears"] if n.startswith("mtp.")} == set(PACKED)
    assert {f"{n}.weight" for n in PLAIN} <= set(record["plain"])
    assert "the model's class does not load it" in record["skipped"]["mtp.embed_tokens"]
    source, packed, without = (
        load_file(folder / "model.safetensors") for folder in (model, tmp_path / "with", tmp_path / "without")
    )
    assert all(torch.equal(packed[n], t) for n, t in without.items() if n.removesuffix(".weight") not in PACKED)
    weight, scale = source[f"{PACKED[-1]}.weight"].float(), packed[f"{PACKED[-1]}.weight_scale"].float()
    codes = packed[f"{PACKED[-1]}.weight_packed"].view(torch.uint8).reshape(weight.shape).float() - 128
    assert (codes * scale - weight).norm() < 0.02 * weight.norm()
    tokens = torch.arange(8).view(1, 8) + 10
    results = [qkit.load(tmp_path / name, dtype=torch.float32)(tokens).logits for name in ("with", "without")]
    assert torch.equal(*results)
    stock = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "with", dtype=torch.float32)
    torch.testing.assert_close(stock(tokens).logits, results[0], atol=1e-4, rtol=1e-4)


def test_experts_that_lack_their_partners_are_copied(tmp_path):
    """transformers' tables know experts by such names, wherever they are."""
    folder = sweep_configs.save("causal", "qwen3_moe", tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    lone = "mtp.layers.0.mlp.experts.0.up_proj.weight"
    save_file({**tensors, lone: torch.ones(64, 64).bfloat16()}, folder / "model.safetensors", metadata={"format": "pt"})
    qkit.quantize(folder, out=tmp_path / "out", scheme="w4a16", method="rtn")
    assert load_file(tmp_path / "out" / "model.safetensors")[lone].eq(1).all()


def test_layers_that_would_read_a_rotated_stream_are_not_left_behind(tmp_path):
    folder = sweep_configs.save("causal", "llama", tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    save_file(
        {**tensors, "mtp.fc.weight": torch.ones(64, 64).bfloat16()},
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )
    with pytest.raises(Unsupported, match=r"does not load mtp.fc.weight .* which would be fed rotated values"):
        qkit.plan(folder, scheme="w4a16", method="rotate+gptq")


def test_a_model_without_such_matrices(tmp_path):
    folder = sweep_configs.save("causal", "stablelm", tmp_path / "model")
    with pytest.raises(UsageError, match=r"--unloaded int8: .* has no matrix of a linear that its class does not load"):
        qkit.plan(folder, scheme="w4a16", unloaded="int8")
    with pytest.raises(UsageError, match="--unloaded auto: expected int2 to int8"):
        qkit.plan(folder, scheme="w4a16", unloaded="auto")


def test_experts_in_one_tensor_lie_as_those_of_the_blocks(tmp_path):
    """Where a block has such experts they are packed one by one; where none has, they are listed as skipped."""
    made, sources = torch.Generator().manual_seed(0), {}
    stack = {f"{EXPERTS}.gate_up_proj": (4, 256, 128), f"{EXPERTS}.down_proj": (4, 128, 128)}
    for kind in ("qwen3_moe", "stablelm"):
        folder = sources[kind] = sweep_configs.save("causal", kind, tmp_path / kind)
        tensors = load_file(folder / "model.safetensors")
        tensors |= {n: torch.randn(shape, generator=made).bfloat16() for n, shape in stack.items()}
        tensors["mtp.fc.weight"] = torch.ones(64, 64).bfloat16()
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    source = load_file(sources["qwen3_moe"] / "model.safetensors")
    for name, unloaded in (("plain", None), ("packed", "int8")):
        qkit.quantize(sources["qwen3_moe"], out=tmp_path / name, scheme="w4a16", method="rtn", unloaded=unloaded)
    plain, packed = (load_file(tmp_path / name / "model.safetensors") for name in ("plain", "packed"))
    assert all(torch.equal(plain[n], source[n]) for n in stack)
    weight, name = source[f"{EXPERTS}.gate_up_proj"][2, 128:].float(), f"{EXPERTS}.2.up_proj"
    codes = packed[f"{name}.weight_packed"].view(torch.uint8).reshape(weight.shape).float() - 128
    assert (codes * packed[f"{name}.weight_scale"].float() - weight).norm() < 0.02 * weight.norm()
    assert not set(stack) & packed.keys()
    skipped = json.loads((tmp_path / "plain" / "qkit.json").read_text())["skipped"]
    assert set(stack) <= skipped.keys() or f"{EXPERTS}.0.up_proj" in skipped
    qkit.quantize(sources["stablelm"], out=tmp_path / "unknown", scheme="w4a16", method="rtn", unloaded="int8")
    skipped = json.loads((tmp_path / "unknown" / "qkit.json").read_text())["skipped"]
    assert all("no block tells how the matrices lie" in skipped[n] for n in stack)
    refused = (
        "it loads all experts in one format"  # those that no loader looks at decide nothing, until they are packed
    )
    for name, several in (("plain", False), ("packed", True)):
        prepared = prepare(
            Request(model=str(sources["qwen3_moe"]), scheme="w4a16", unloaded="int8" if several else None)
        )
        lines = engine_lines_of(prepared.plan, prepared.structure)
        assert any(refused in str(line) for line in lines) is several, name
