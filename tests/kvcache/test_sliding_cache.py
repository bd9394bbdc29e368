"""KV caches for engines of models whose layers look back on a window of tokens."""

import json
from pathlib import Path

import pytest
import torch
from conftest import Quiet
from safetensors.torch import load_file
from test_kvcache_fp8 import measured, problems
from transformers.cache_utils import DynamicSlidingWindowLayer

import qkit
from qkit.errors import Unsupported
from qkit.kvcache.policy import CacheRequest, parse
from qkit.kvcache.read_back import held
from qkit.kvcache.shape import CacheShape
from qkit.kvcache.sliding import SlidingLayer
from qkit.workflows.kv_cache import cache_choices, cache_of_widths
from qkit.workflows.quantize import Request, quantize

FP8 = parse("fp8")


@pytest.mark.parametrize("pieces", [(3, 1, 1, 1, 1, 1), (12, 1, 1), (2, 7, 9, 1), (8, 8, 1)])
def test_the_layer_holds_what_that_of_transformers_holds(pieces):
    window, scales = 8, (0.01, 0.02)
    x = torch.randn(2, 2, sum(pieces), 16, generator=torch.Generator().manual_seed(0))
    found, wanted = SlidingLayer(FP8, window, scales), DynamicSlidingWindowLayer(window)
    at = 0
    for n in pieces:
        assert found.get_mask_sizes(n) == wanted.get_mask_sizes(n)
        new = x[:, :, at : at + n], -x[:, :, at : at + n]
        pairs = zip(found.update(*new), wanted.update(*new), scales, strict=True)
        at += n
        for mine, theirs, scale in pairs:
            assert torch.equal(mine[:, :, -n:], theirs[:, :, -n:])  # the new ones as they are
            torch.testing.assert_close(mine[:, :, :-n], held(theirs[:, :, :-n], scale), rtol=0, atol=1e-6)
        assert found.get_seq_length() == wanted.get_seq_length() == at
        assert found.nbytes == 2 * 2 * 2 * min(at, window - 1) * 16
    with pytest.raises(Unsupported, match="holds 7 tokens"):
        found.crop(-1)
    found.reset()
    assert found.get_seq_length() == 0 and found.read() is None


def test_crop_before_the_window_is_full():
    layer = SlidingLayer(FP8, 8, (1.0, 1.0))
    layer.update(torch.ones(1, 1, 5, 16), torch.ones(1, 1, 5, 16))
    layer.crop(-2)
    assert layer.get_seq_length() == 3 and layer.get_mask_sizes(1) == (4, 0)


@pytest.mark.parametrize(
    ("family", "fields"), [("mistral", {}), ("qwen2", {"use_sliding_window": True, "max_window_layers": 1})]
)
def test_scales_are_of_all_tokens_that_pass_through_the_window(family, fields, tiny, calib, tmp_path):
    model = str(tiny(family, torch.float32, sliding_window=8, **fields))
    request = Request(
        model=model, scheme="w4a16", method="rtn", group_size=32, calib=calib, samples=4, seqlen=32, threads=1,
        kv=FP8.to_json(),
    )  # fmt: skip
    out = tmp_path / "out"
    assert quantize(request, out, Quiet()).ok
    tensors = load_file(out / "model.safetensors")
    scales = {n: t for n, t in tensors.items() if n.endswith(("k_scale", "v_scale"))}
    torch.testing.assert_close(scales, measured(out, request), rtol=1e-4, atol=0)
    packed = qkit.load(out, dtype=torch.float32)
    ids = torch.randint(5, 100, (1, 20), generator=torch.Generator().manual_seed(0))
    made = packed.generate(ids, max_new_tokens=10, min_new_tokens=10, do_sample=False, return_dict_in_generate=True)
    cache = made.get("cache", made.get("past_key_values"))
    kinds = [isinstance(layer, SlidingLayer) for layer in cache.layers]
    assert any(kinds) and all(kinds) == (family == "mistral")
    assert {layer.body[0].tokens for layer in cache.layers if layer.is_sliding} == {7}


def test_bytes_count_the_window(tiny):
    model = tiny("mistral", torch.bfloat16, sliding_window=8)
    config = json.loads((Path(model) / "config.json").read_text())
    open_ = cache_choices(Request(model=str(model), scheme="w4a16", samples=4), CacheRequest("fp8", None, 64))
    plan = cache_of_widths(open_, (8,) * config["num_hidden_layers"])
    numbers = config["num_hidden_layers"] * 2 * config["num_key_value_heads"] * open_.heads.head_dim
    assert (plan.bytes, plan.plain_bytes) == (8 * numbers, 8 * numbers * 2)
    with pytest.raises(Unsupported, match="sliding_attention, and only full attention"):
        cache_choices(Request(model=str(model), scheme="w4a16", samples=4), CacheRequest("int8", None, 64))


def test_layers_that_share_their_cache_are_refused(tiny):
    import transformers

    config = transformers.Gemma3nTextConfig(num_hidden_layers=10, num_kv_shared_layers=5)
    with pytest.raises(Unsupported, match="keys and values that layers share"):
        CacheShape.of(config, windows=True)
    config = transformers.Qwen2Config(num_hidden_layers=3, use_sliding_window=False, sliding_window=16)
    assert CacheShape.of(config).windows == (None,) * 3
    config = transformers.Qwen2Config(
        num_hidden_layers=3, use_sliding_window=True, sliding_window=16, max_window_layers=1
    )
    assert CacheShape.of(config, windows=True).windows == (None, 16, 16)
    config = transformers.GptOssConfig(num_hidden_layers=4, sliding_window=128)
    assert CacheShape.of(config, windows=True).tokens_of(1000) == [128, 1000, 128, 1000]


def test_a_model_with_a_tower_has_scales_in_its_language_model_alone(tiny, calib, tmp_path):
    request = Request(
        model=str(tiny("gemma3", torch.float32)), scheme="w4a16", method="rtn", group_size=32, calib=calib, samples=4,
        seqlen=32, threads=1, kv=FP8.to_json(),
    )  # fmt: skip
    out = tmp_path / "out"
    assert quantize(request, out, Quiet()).ok and not problems(out)
