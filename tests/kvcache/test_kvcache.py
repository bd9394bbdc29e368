"""Caches of packed keys and values: budgets, what transformers asks of them, and the logits that they give."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    DynamicCache,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    OPTConfig,
    OPTForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from qkit.errors import BudgetNotMet, Unsupported, UsageError
from qkit.kvcache.cache import make_cache, with_budgets
from qkit.kvcache.grouping import channel_group
from qkit.kvcache.layer import PackedLayer
from qkit.kvcache.nested import nested
from qkit.kvcache.policy import CachePolicy, parse
from qkit.kvcache.shape import CacheShape
from qkit.kvcache.store import quantize
from qkit.runtime.speculate import speculate

PACKED = ("pm-kvq:2", "pm-kvq:8-4", "kivi2", "int8", "int4", "int3", "fp8", "rotate4", "hierarchical8")  # keys, values
NAMES = (*PACKED, "xquant4", "xquant-cl2")
SMALL = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
}


def small(kind: str, layers: int = 2):
    """A random model with short heads; large weights, so that its logits say something."""
    torch.manual_seed(0)
    sizes = {**SMALL, "num_hidden_layers": layers}
    if kind == "llama":
        model = LlamaForCausalLM(LlamaConfig(**sizes, num_key_value_heads=2, initializer_range=0.2))
    elif kind == "qwen2":
        model = Qwen2ForCausalLM(Qwen2Config(**sizes, num_key_value_heads=1, initializer_range=0.2))
        for layer in model.model.layers:
            layer.self_attn.k_proj.bias.data.normal_()
    elif kind == "heads":
        model = LlamaForCausalLM(LlamaConfig(**sizes, initializer_range=0.2))
    elif kind == "qwen3":
        model = Qwen3ForCausalLM(Qwen3Config(**sizes, num_key_value_heads=1, head_dim=16, initializer_range=0.2))
        for layer in model.model.layers:
            layer.self_attn.k_norm.weight.data.uniform_(0.5, 2)
    elif kind == "opt":
        opt = {"ffn_dim": 96, "word_embed_proj_dim": 64, "init_std": 0.2}
        model = OPTForCausalLM(OPTConfig(**{k: v for k, v in sizes.items() if k != "intermediate_size"}, **opt))
    else:
        model = GPTNeoXForCausalLM(GPTNeoXConfig(**sizes, initializer_range=0.2))
    return model.eval()


class HalfCache(DynamicCache):
    """Keys and values of the past rounded to float16."""

    def update(self, keys, values, layer, *args, **kwargs):
        past = self.get_seq_length(layer)
        k, v = super().update(keys, values, layer)
        k[:, :, :past], v[:, :, :past] = k[:, :, :past].half().float(), v[:, :, :past].half().float()
        return k, v


def policy_for(name: str, model, length: int = 200) -> CachePolicy:
    """A policy with short windows, so that a short text fills them."""
    p = parse(name)
    if p.kind in ("kivi", "hierarchical", "xquant", "xquant-cl"):
        return replace(p, group=8, window=16, keep=min(p.keep, 16))
    return with_budgets(replace(p, window=8), model, length) if p.kind == "progressive" else p


def tokens(batch: int, length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(1, 64, (batch, length), generator=torch.Generator().manual_seed(seed))


# ---- layers ----------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_a_layer_is_never_above_its_budget(data):
    """Whatever is appended: bytes within the budget and as computed, width never growing, sink and newest tokens at 16 bits,
    tokens that do not fit refused without a change."""
    batch, heads, dim = (
        data.draw(st.integers(1, 3)),
        data.draw(st.sampled_from([1, 2])),
        data.draw(st.sampled_from([16, 24])),
    )
    policy = replace(
        parse("pm-kvq:2"), group=8, sink=data.draw(st.integers(0, 3)), window=data.draw(st.sampled_from([0, 1, 4, 8]))
    )
    budget = data.draw(st.integers(200, 40_000))
    layer = PackedLayer(policy, budget)
    seen = []
    for new in data.draw(st.lists(st.sampled_from([1, 1, 1, 2, 7, 40]), min_size=1, max_size=12)):
        x = torch.randn(batch, heads, new, dim)
        before = (layer.nbytes, layer.get_seq_length(), layer.width)
        try:
            layer.update(x, x + 1)
        except BudgetNotMet:
            assert before == (layer.nbytes, layer.get_seq_length(), layer.width)
            counts = layer._places(new)
            assert layer.bytes_at(2, *counts) > batch * budget
            continue
        assert layer.nbytes <= batch * budget == layer.limit
        sizes = [0 if s is None else s[0].tokens for s in (layer.sink, layer.body, layer.recent)]
        assert layer.nbytes == layer.bytes_at(layer.width, *sizes)
        assert layer.nbytes == sum(t.numel() * t.element_size() for p in layer.segments for s in p for t in s.tensors)
        assert layer.get_seq_length() == before[1] + new
        assert sizes[0] == min(policy.sink, layer.get_seq_length()) and sizes[2] < max(policy.window, 1)
        for kept in (layer.sink, layer.recent):
            assert kept is None or kept[0].bits == kept[1].bits == 16
        assert layer.body is None or layer.body[0].bits == layer.width
        seen.append(layer.width)
    assert seen == sorted(seen, reverse=True)


def test_a_long_prefill_is_halved_until_it_fits():
    policy = replace(parse("pm-kvq:2"), window=8)
    layer = PackedLayer(policy, budget=2 * 1000 * (4 + 4) + 3000)
    layer.update(torch.randn(1, 1, 1000, 16), torch.randn(1, 1, 1000, 16))
    assert layer.width == 2 and layer.nbytes <= layer.budget


def test_progressive_costs_nothing_in_the_end_and_is_better_before():
    """Final codes are those of one rounding of the 16-bit codes; on the way the mean error is no larger than theirs."""
    g = torch.Generator().manual_seed(0)
    keys, values = (torch.randn(1, 2, 120, 32, generator=g) for _ in range(2))
    policy = replace(parse("pm-kvq:2"), sink=0, window=8)
    heads = CacheShape(1, 2, 32)
    layer = PackedLayer(policy, heads.bytes_at(policy, 2, 120))
    worst = PackedLayer(replace(parse("int2"), group=32))
    for t in range(120):
        layer.update(keys[:, :, t : t + 1], values[:, :, t : t + 1])
        worst.update(keys[:, :, t : t + 1], values[:, :, t : t + 1])
        if layer.body is None:
            continue
        n = layer.body[0].tokens
        errors = [(x.body[0].dequantize(torch.float32, 0, n) - keys[:, :, :n]).square().mean() for x in (layer, worst)]
        assert errors[0] <= errors[1] * (1.005 if layer.width == 2 else 0.5)
    assert layer.width == 2
    direct = quantize(keys, 16, 32).codes()[:, :, :n].double() * 3 / 65535
    assert torch.equal(layer.body[0].codes().double(), direct.round())


def test_the_transform_of_rotate_spreads_outliers():
    x = torch.randn(1, 1, 64, 64)
    x[..., 5] *= 50
    errors = []
    for name in ("int4", "rotate4"):
        layer = PackedLayer(parse(name))
        layer.update(x, x)
        errors.append(float((layer.read()[0] - x)[..., :5].norm()))
    assert errors[1] < 0.5 * errors[0]


@pytest.mark.parametrize("name", PACKED)
def test_crop_keeps_the_older_tokens(name):
    x = torch.randn(1, 2, 75, 16)
    heads = small("llama")
    whole = PackedLayer(policy_for(name, heads), budget=None)
    whole.update(x, -x)
    before = whole.read()
    for left in (74, 61, 33, 32, 17, 1, 0):
        layer = PackedLayer(whole.policy, None)
        layer.update(x, -x)
        layer.crop(left - 75)
        assert layer.get_seq_length() == left
        if left:
            torch.testing.assert_close(layer.read()[0], before[0][:, :, :left])
            layer.update(x[:, :, left:], -x[:, :, left:])
            assert layer.get_seq_length() == 75
            assert (layer.read()[1] - before[1]).abs().mean() < (0.2 if whole.width < 8 else 0.005)
    with pytest.raises(UsageError, match="negative"):
        layer.crop(3)


def test_choosing_sequences():
    x = torch.randn(3, 2, 40, 16)
    layer = PackedLayer(replace(parse("kivi4"), group=8, window=16))
    layer.update(x, x)
    before = layer.read()[0]
    layer.reorder_cache(torch.tensor([2, 2, 0]))
    assert torch.equal(layer.read()[0], before[[2, 2, 0]])
    layer.batch_select_indices(torch.tensor([2]))
    layer.batch_repeat_interleave(2)
    assert torch.equal(layer.read()[0], before[[0, 0]]) and layer.batch_size == 2
    layer.offload()
    layer.prefetch()
    layer.reset()
    assert layer.get_seq_length() == 0 and layer.nbytes == 0


# ---- models ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ("llama", "qwen2", "opt", "neox"))
def test_sixteen_bits_leave_the_logits(kind):
    """Grouped-query and multi-head attention, biases: a body that is never halved changes the logits ten times less than keys
    and values in float16 do, and by less than 1e-4 of their size."""
    model = small(kind)
    ids = tokens(2, 60)
    cache, half = make_cache(model, policy_for("pm-kvq:8", model, 400)), HalfCache(config=model.config)
    with torch.inference_mode():
        expected = model(ids, use_cache=False).logits
        found, rounded = (
            torch.cat(
                [model(part, past_key_values=c).logits for part in (ids[:, :20], *ids[:, 20:].split(1, dim=1))], dim=1
            )
            for c in (cache, half)
        )
    assert cache.widths == [16, 16]
    errors = [float((x - expected).norm() / expected.norm()) for x in (found, rounded)]
    assert errors[0] < 1e-4 and errors[0] < 0.1 * errors[1]


@pytest.mark.parametrize("kind", ("llama", "qwen2", "opt", "neox"))
@pytest.mark.parametrize("name", NAMES)
def test_generate_gives_its_own_teacher_forced_logits(kind, name):
    """Four sequences padded on the left; the logits of generate are those of feeding its tokens one by one."""
    model = small(kind, 5 if name == "xquant-cl2" else 2)  # of more than three layers some have two bits
    if kind == "neox" and name.startswith("xquant"):
        with pytest.raises(Unsupported, match="no k_proj and v_proj of its own"):
            make_cache(model, parse(name))
        return
    ids = tokens(4, 30)
    mask = torch.ones_like(ids)
    for row, pads in enumerate((0, 3, 9, 20)):
        ids[row, :pads], mask[row, :pads] = 0, 0
    policy = policy_for(name, model, 60)
    cache = make_cache(model, policy)
    out = model.generate(
        ids, attention_mask=mask, past_key_values=cache, max_new_tokens=25, do_sample=False, pad_token_id=0,
        output_logits=True, return_dict_in_generate=True, eos_token_id=None,
    )  # fmt: skip
    made = out.sequences
    assert made.shape == (4, 55) and cache.get_seq_length() == 54
    again = make_cache(model, policy)
    place = (mask.cumsum(1) - 1).clamp_min(0)
    with torch.inference_mode():
        logits = model(ids, attention_mask=mask, position_ids=place, past_key_values=again).logits[:, -1]
        for i, seen in enumerate(out.logits):
            torch.testing.assert_close(logits, seen, rtol=1e-4, atol=1e-4)
            mask = torch.cat([mask, torch.ones(4, 1, dtype=mask.dtype)], dim=1)
            place = mask.sum(1, keepdim=True) - 1
            token = made[:, 30 + i : 31 + i]
            logits = model(token, attention_mask=mask, position_ids=place, past_key_values=again).logits[:, -1]
    if policy.budgets:
        assert all(layer.nbytes <= 4 * b for layer, b in zip(cache.layers, policy.budgets, strict=True))
        assert cache.widths[0] < 16


def test_beams_and_reuse():
    model = small("llama")
    ids = tokens(1, 12)
    beams = model.generate(
        ids, past_key_values=make_cache(model, parse("int8")), num_beams=3, max_new_tokens=10, do_sample=False,
        pad_token_id=0, eos_token_id=None,
    )  # fmt: skip
    plain = model.generate(
        ids,
        past_key_values=DynamicCache(),
        num_beams=3,
        max_new_tokens=10,
        do_sample=False,
        pad_token_id=0,
        eos_token_id=None,
    )
    assert beams.shape == plain.shape == (1, 22)
    cache = make_cache(model, parse("int8"))
    first = model.generate(
        ids, past_key_values=cache, max_new_tokens=5, do_sample=False, pad_token_id=0, eos_token_id=None
    )
    more = model.generate(
        first, past_key_values=cache, max_new_tokens=5, do_sample=False, pad_token_id=0, eos_token_id=None
    )
    assert torch.equal(more[:, :17], first) and cache.get_seq_length() == 21


def test_memory_at_the_shape_of_a_large_model():
    """One layer of Llama-3-8B at 32k tokens, filled directly: measured bytes against float16."""
    policy = parse("pm-kvq:2")
    plain = 2 * 8 * 32768 * 128 * 2
    for width, most in ((4, 0.29), (2, 0.17)):
        layer = PackedLayer(policy, CacheShape(32, 8, 128).bytes_at(policy, width, 32768))
        x = torch.randn(1, 8, 32768, 128, generator=torch.Generator().manual_seed(0)).half()
        layer.update(x, x)
        assert layer.width == width and layer.nbytes <= most * plain
        assert layer.nbytes == sum(t.numel() * t.element_size() for p in layer.segments for s in p for t in s.tensors)


@pytest.mark.parametrize("kept", ("xquant", "xquant-cl"))
@pytest.mark.parametrize("kind", ("llama", "qwen2", "opt", "heads", "qwen3"))
def test_keys_and_values_are_made_again_from_inputs(kind, kept):
    """At 16 bits an xquant cache gives the logits of a plain one, for sequences padded on the left and after a crop."""
    model = small(kind, 4)
    ids, mask = tokens(3, 50), torch.ones(3, 50, dtype=torch.int64)
    mask[1, :7], mask[2, :18] = 0, 0
    place = (mask.cumsum(1) - 1).clamp_min(0)
    cache = make_cache(model, CachePolicy(kind=kept, widths=(16,), group=8, window=16))
    whole = ("opt", "heads") if kept == "xquant" else ("opt", "heads", "llama")  # as many numbers as keys and values
    assert (cache.layers[0].source.latent is None) == (kind in whole)
    found = []
    with torch.inference_mode():
        for c in (DynamicCache(config=model.config), cache):
            parts = [(0, 20), (20, 33), *((i, i + 1) for i in range(33, 44)), (40, 50)]
            logits = []
            for a, b in parts:
                c.crop(a - c.get_seq_length())
                given = {"attention_mask": mask[:, :b], "position_ids": place[:, a:b], "past_key_values": c}
                logits.append(model(ids[:, a:b], **given).logits)
            found.append(torch.cat(logits, dim=1)[:, 18:])
    assert float((found[0] - found[1]).norm() / found[0].norm()) < 1e-3
    width = 64 if kind in ("opt", "heads") else 2 * 16 * (2 if kind == "llama" else 1)
    per = (2 + 4 / 8) * width  # bytes of a token
    assert cache.nbytes <= 4 * 3 * 50 * per * 1.1
    with pytest.raises(UsageError, match="belongs to the model"):
        small(kind)(ids, past_key_values=cache)


# ---- drafts ----------------------------------------------------------------------------------------------------


def test_one_store_has_two_views():
    """8 bits: within a step's sixteenth (a code of 8 is cut off); 4 bits: half a step; two planes of 4 bits each."""
    x = torch.randn(1, 2, 64, 32, generator=torch.Generator().manual_seed(0))
    for axis in ("channel", "token"):
        q = nested(x, 16, axis)
        steps = (q.upper.span.float() / 15).repeat_interleave(16, 3 if axis == "channel" else 2)
        assert bool(((q.dequantize(torch.float32) - x).abs() <= steps / 16 * 1.01 + 1e-6).all())
        assert bool(((q.upper.dequantize(torch.float32) - x).abs() <= steps / 2 * 1.01 + 1e-6).all())
        assert q.lower.nbytes == q.upper.words.nbytes == x.numel() // 2
        joined = q.slice(0, 16).cat(q.slice(16, 64))
        assert torch.equal(joined.dequantize(torch.float32), q.dequantize(torch.float32))
        assert torch.equal(q.dequantize(torch.float32, 16, 40), q.dequantize(torch.float32)[:, :, 16:40])


@pytest.mark.parametrize("kind", ("llama", "opt"))
def test_drafts_change_nothing(kind):
    """Greedy tokens with drafts are those without, and what is not accepted leaves no trace in the cache."""
    model, ids = small(kind), tokens(1, 40)
    policy = replace(parse("hierarchical8"), group=8, window=8, keep=8)
    alone = speculate(model, ids, 60, draft=0, policy=policy)
    found = [speculate(model, ids, 60, draft=n, policy=policy) for n in (1, 3, 6)]
    assert alone.tokens.shape == (1, 100) and alone.drafted == 0 and alone.passes == 60
    for f in found:
        assert torch.equal(f.tokens, alone.tokens) and 0 < f.accepted < f.drafted and f.passes < 60
    layer = PackedLayer(policy)
    x = torch.randn(1, 2, 40, 16)
    layer.update(x, x)
    body, recent = layer.body, layer.recent
    assert layer.room == 40 // 8 * 8 + 7 - 40 and recent[0].tokens == 8
    for t in range(3):
        layer.update(x[:, :, t : t + 1], x[:, :, t : t + 1])
    layer.crop(-3)
    assert layer.body[0] is body[0] and all(
        torch.equal(a.data, b.data) for a, b in zip(layer.recent, recent, strict=True)
    )
    with pytest.raises(UsageError, match="one sequence"):
        speculate(model, tokens(2, 5), 3)


# ---- policies --------------------------------------------------------------------------------------------------


def test_names_of_policies():
    assert parse("PM-KVQ:4-2") == parse("progressive:2-4") and parse("pm-kvq:4-2").widths == (4, 2)
    assert parse("kivi2").kind == "kivi" and parse("int8").widths == (8,) and parse("rtn:3").widths == (3,)
    p = replace(parse("pm-kvq:4-2"), budgets=(3, 4), length=9)
    assert CachePolicy.from_json(p.to_json()) == p


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("nonsense", "expected one kind with its bits, such as pm-kvq:4-2"),
        ("kivi", "kv policy 'kivi'"),
        ("pm-kvq:3", "expected some of 8, 4, 2"),
        ("int5", "int5: 5 bits; expected some of"),
        ("int4-2", "only pm-kvq chooses"),
        ("hierarchical4", "write hierarchical8"),
    ],
)
def test_policies_that_there_are_not(text, words):
    with pytest.raises(UsageError) as e:
        parse(text)
    assert words in str(e.value)


def test_what_does_not_suit_a_model_is_refused():
    model = small("llama")
    with pytest.raises(UsageError, match="has no budget"):
        make_cache(model, parse("pm-kvq:2"))
    with pytest.raises(UsageError, match="nothing is left to pack"):
        with_budgets(parse("pm-kvq:2"), model, 129)
    with pytest.raises(UsageError, match="budgets for 3 layers and the model has 2"):
        make_cache(model, replace(parse("pm-kvq:2"), budgets=(1, 2, 3)))
    odd = LlamaConfig(**{**SMALL, "head_dim": 20})
    with pytest.raises(UsageError, match="heads of 20 channels; expected a multiple of 8"):
        make_cache(odd, parse("int4"))
    with pytest.raises(UsageError, match="expected a multiple of 16"):
        make_cache(LlamaConfig(**{**SMALL, "head_dim": 24}), parse("int3"))
    with pytest.raises(Unsupported, match="sliding_attention"):
        make_cache(MistralConfig(**SMALL, num_key_value_heads=2, sliding_window=32), parse("int4"))
    with pytest.raises(Unsupported, match="latent attention"):
        make_cache(LlamaConfig(**SMALL, kv_lora_rank=16), parse("int4"))
    cache = make_cache(model, replace(parse("pm-kvq:2"), budgets=(20000, 3000), window=8))
    with torch.inference_mode():
        model(tokens(1, 40), past_key_values=cache)
        with pytest.raises(BudgetNotMet, match="at 2 bits, 1 at a time, and its budget is 3000"):
            model(tokens(1, 300), past_key_values=cache)
    assert [layer.get_seq_length() for layer in cache.layers] == [40, 40]  # the first layer had room
    with pytest.raises(UsageError, match="heads of 20 channels"):
        with_budgets(parse("pm-kvq:2"), odd, 400)


@pytest.mark.parametrize("name", ("int4", "kivi4", "hierarchical8", "xquant4", "xquant-cl4"))
@pytest.mark.parametrize("kind", ("llama", "heads", "qwen2"))
def test_bytes_of_a_cache_are_known_before(kind, name):
    """In 16-bit arithmetic, at every length: what bytes_at says is the most on the way."""
    model = small(kind).bfloat16()
    policy = replace(policy_for(name, model), group=32, window=32)
    heads = CacheShape.of(model)
    cache, most = make_cache(model, policy), 0
    with torch.inference_mode():
        for i in range(60):
            model(tokens(1, 1, i), past_key_values=cache)
            most = max(most, cache.layers[0].nbytes)
            assert heads.bytes_at(policy, policy.widths[0], i + 1) == pytest.approx(most, abs=4 * 8)


def test_groups_of_channels():
    assert [channel_group(n, 128) for n in (32, 64, 80, 128, 256, 192)] == [32, 64, 80, 128, 128, 96]
