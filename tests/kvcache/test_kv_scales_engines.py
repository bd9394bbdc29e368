"""Scales of each head, and NVFP4 scales of a cache: what is measured, what stands in the file, and what runs with it."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import Quiet
from safetensors.torch import load_file
from test_kvcache_fp8 import changed_copy, measured, problems
from transformers import DynamicCache

import qkit
from qkit.kvcache.cache import make_cache
from qkit.kvcache.float4 import NVFP4, Float4
from qkit.kvcache.policy import parse
from qkit.kvcache.scales import RangeCache, scales_of
from qkit.tensor.activations import quantize_activations
from qkit.workflows.quantize import Request, open_structure, prepare, quantize

NAME = "model.layers.1.self_attn."


@pytest.fixture(scope="module")
def results(tiny, calib, tmp_path_factory):
    """{kv: (request, folder)}"""
    model = str(tiny("qwen2", torch.float32, num_hidden_layers=2, head_dim=16))
    made = {}
    for kv in ("fp8", "fp8_head", "nvfp4"):
        request = Request(
            model=model, scheme="w4a16", method="rtn", group_size=32, calib=calib, samples=6, seqlen=32, threads=1,
            kv=parse(kv).to_json(),
        )  # fmt: skip
        out = tmp_path_factory.mktemp("kv") / kv
        assert quantize(request, out, Quiet()).ok
        made[kv] = request, out
    return made


def scheme(out: Path) -> dict:
    return json.loads((out / "config.json").read_text())["quantization_config"]["kv_cache_scheme"]


def test_one_scale_for_each_head(results):
    (request, out), (_, whole) = results["fp8_head"], results["fp8"]
    tensors, together = (load_file(o / "model.safetensors") for o in (out, whole))
    heads = open_structure(request.model).model.config.num_key_value_heads
    assert heads > 1
    for layer in range(2):
        for side in ("k_scale", "v_scale"):
            name = f"model.layers.{layer}.self_attn.{side}"
            assert tensors[name].shape == (heads, 1, 1)
            assert len(tensors[name].unique()) == heads
            torch.testing.assert_close(tensors[name].max().view(1), together[name], rtol=0, atol=0)
    assert scheme(out)["strategy"] == "attn_head" and scheme(out)["num_bits"] == 8
    assert prepare(request).plan.packed_bytes == sum(t.nbytes for t in tensors.values())


def test_maxima_of_heads():
    cache = RangeCache()
    keys, values = torch.ones(2, 3, 4, 8), torch.zeros(2, 3, 4, 8)
    keys[0, 1, 2, 3], keys[1, 2, 0, 0], values[0, 2, 0, 0] = -7.0, 14.0, 3.5
    cache.update(keys, values, 0)
    found = cache.scales(0, torch.float32, "fp-head")
    torch.testing.assert_close(found[0], torch.tensor([1.0, 7.0, 14.0]).view(3, 1, 1) / 448)
    torch.testing.assert_close(found[1], torch.tensor([1.0, 1.0, 3.5 / 448]).view(3, 1, 1))
    found = cache.scales(0, torch.float16, "nvfp")
    assert [x.dtype for x in found] == [torch.float32] * 2
    torch.testing.assert_close(torch.cat(found), torch.tensor([2688 / 14.0, 2688 / 3.5]))


def test_nvfp4_scales_are_multipliers(results):
    request, out = results["nvfp4"]
    tensors = load_file(out / "model.safetensors")
    wanted = measured(out, request)
    for layer in range(2):
        for side in "kv":
            found = tensors[f"model.layers.{layer}.self_attn.{side}_global_scale"]
            assert found.dtype == torch.float32 and found.shape == (1,)
            amax = wanted[f"model.layers.{layer}.self_attn.{side}_scale"] * 448
            torch.testing.assert_close(found, 2688 / amax, rtol=1e-4, atol=0)
    assert {k: scheme(out)[k] for k in ("num_bits", "strategy", "group_size", "dynamic")} == {
        "num_bits": 4, "strategy": "tensor_group", "group_size": 16, "dynamic": "local"
    }  # fmt: skip
    assert prepare(request).plan.packed_bytes == sum(t.nbytes for t in tensors.values())


def test_nvfp4_as_compressed_tensors_computes_it(results):
    from compressed_tensors.quantization import QuantizationArgs, QuantizationStatus
    from compressed_tensors.quantization.lifecycle.forward import forward_quantize

    _, out = results["nvfp4"]
    module = torch.nn.Module()
    module.quantization_status = QuantizationStatus.FROZEN
    module.k_global_scale = load_file(out / "model.safetensors")[f"{NAME}k_global_scale"]
    x = torch.randn(2, 2, 5, 32, generator=torch.Generator().manual_seed(0)) * 3
    wanted = forward_quantize(module, x, "k", QuantizationArgs(**scheme(out)))
    held = Float4.of(x, module.k_global_scale)
    torch.testing.assert_close(held.dequantize(torch.float32), wanted, rtol=1e-6, atol=1e-7)
    assert held.words.nbytes + held.steps.nbytes == x.numel() // 2 + x.numel() // 16


def test_parts_of_a_packed_nvfp4_cache():
    x = torch.randn(2, 3, 6, 32, generator=torch.Generator().manual_seed(1))
    held = Float4.of(x, torch.tensor([600.0]))
    whole = held.dequantize(torch.float32)
    assert torch.equal(whole, quantize_activations(x, NVFP4, torch.tensor([600.0])))
    assert torch.equal(held.dequantize(torch.float32, 2, 5), whole[:, :, 2:5])
    assert torch.equal(held.slice(0, 2).cat(held.slice(2, 6)).dequantize(torch.float32), whole)
    assert torch.equal(held.map(lambda t: t[1:]).dequantize(torch.float32), whole[1:])


@pytest.mark.parametrize("kv", ("fp8_head", "nvfp4"))
def test_generate_reads_the_past_from_the_cache(kv, results):
    _, out = results[kv]
    model = qkit.load(out, dtype=torch.float32)
    policy = parse(kv)
    scales = scales_of(model, 2, policy.kind)
    ids = torch.randint(0, 100, (2, 9), generator=torch.Generator().manual_seed(0))
    cache = make_cache(model, policy)
    with torch.no_grad():
        model(input_ids=ids[:, :8], past_key_values=cache, use_cache=True)
        found = model(input_ids=ids[:, 8:], past_key_values=cache, use_cache=True).logits
        plain = DynamicCache()
        model(input_ids=ids[:, :8], past_key_values=plain, use_cache=True)
        for layer, pair in zip(plain.layers, scales, strict=True):
            for name, scale in zip(("keys", "values"), pair, strict=True):
                x = getattr(layer, name)
                if kv == "nvfp4":
                    x = quantize_activations(x, NVFP4, scale)
                else:
                    x = (x / scale).clamp(-448, 448).to(torch.float8_e4m3fn).float() * scale
                setattr(layer, name, x)
        wanted = model(input_ids=ids[:, 8:], past_key_values=plain, use_cache=True).logits
        exact = model(input_ids=ids, use_cache=False).logits[:, 8:]
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(found, exact, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("kv", "change", "words"),
    [
        ("fp8_head", lambda t: t.update({f"{NAME}k_scale": t[f"{NAME}k_scale"].flatten()}), "[2, 1, 1]"),
        ("fp8_head", lambda t: t.update({f"{NAME}v_scale": t[f"{NAME}v_scale"] * -1}), "expected a positive number"),
        ("fp8_head", lambda t: t.pop(f"{NAME}v_scale"), "is missing: engines take 1"),
        ("nvfp4", lambda t: t.update({f"{NAME}k_global_scale": t[f"{NAME}k_global_scale"].half()}), "expected F32 [1]"),
        ("nvfp4", lambda t: t.update({f"{NAME}k_scale": t.pop(f"{NAME}k_global_scale")}), "does not ask for"),
    ],
)
def test_scales_of_another_form(kv, change, words, results, tmp_path):
    bad = changed_copy(results[kv][1], tmp_path / "bad", change)
    assert any(words in line for line in problems(bad))


def test_a_scheme_of_another_kind(results, tmp_path):
    out = results["fp8_head"][1]
    bad = shutil.copytree(out, tmp_path / "bad")
    data = json.loads((bad / "config.json").read_text())
    data["quantization_config"]["kv_cache_scheme"]["strategy"] = "tensor"
    (bad / "config.json").write_text(json.dumps(data))
    assert any('strategy: found "tensor", expected "attn_head"' in line for line in problems(bad))


def test_what_engines_make_of_it(results, run):
    code, _, err = run("serve-command", results["nvfp4"][1])
    assert code == 3 and "it reads no NVFP4 scales of a KV cache" in err
    code, said, err = run("serve-command", results["fp8_head"][1])
    assert (
        code == 0
        and "--kv-cache-dtype fp8" in said
        and "its KV cache runs on sm90 with FlashAttention 3, sm100 with FlashAttention 4" in err
    )
    request = results["nvfp4"][0]
    options = ["--model", request.model, "--scheme", "w4a16", "--group-size", 32, "--kv", "nvfp4", "--samples", 4]
    code, said, _ = run("plan", *options, "--seqlen", 32)
    assert code == 0 and "does not load in vLLM" in said.replace("\n", " ")
