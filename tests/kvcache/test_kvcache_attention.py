"""Attention over a packed past: in chunks, and by the kernel."""

from dataclasses import replace

import pytest
import torch
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache

import qkit
from qkit.errors import Unsupported
from qkit.kvcache.attention import PackedPast, attend
from qkit.kvcache.cache import attach, detach, make_cache, with_budgets
from qkit.kvcache.policy import parse
from qkit.kvcache.store import Plain, quantize


def dense(query, past, keys, values, mask, scaling):
    """float64, over everything unpacked."""
    k = torch.cat([*(s.dequantize(torch.float32) for s, _ in past.segments), keys.float()], dim=2).double()
    v = torch.cat([*(s.dequantize(torch.float32) for _, s in past.segments), values.float()], dim=2).double()
    group = query.shape[1] // keys.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    if mask is None:
        new, tokens = query.shape[2], k.shape[2]
        mask = torch.ones(new, tokens, dtype=torch.bool).tril(tokens - new)[None, None]
    mask = mask if mask.dtype == torch.bool else mask.double()
    return functional.scaled_dot_product_attention(query.double(), k, v, attn_mask=mask, scale=scaling)


def made_past(kind: str, batch=2, heads=2, tokens=70, dim=32):
    g = torch.Generator().manual_seed(0)
    k, v = torch.randn(batch, heads, tokens, dim, generator=g), torch.randn(batch, heads, tokens, dim, generator=g)
    if kind == "kivi":
        body = quantize(k[:, :, :64], 4, 16, "token"), quantize(v[:, :, :64], 4, 16)
        return PackedPast((body, (Plain(k[:, :, 64:]), Plain(v[:, :, 64:]))))
    sink, body = (slice(0, 1), slice(1, None))
    parts = [tuple(quantize(x[:, :, s], b, 16) for x in (k, v)) for s, b in ((sink, 16), (body, 3))]
    return PackedPast(tuple(parts))


@pytest.mark.parametrize("masked", ("causal", "bool", "added"))
@pytest.mark.parametrize("kind", ("kivi", "progressive"))
@pytest.mark.parametrize("chunk", (16, 20, 1000))
def test_chunks_give_the_attention(kind, masked, chunk):
    past, new = made_past(kind), 3
    g = torch.Generator().manual_seed(1)
    query, keys, values = (torch.randn(2, n, new, 32, generator=g) for n in (6, 2, 2))
    mask = None
    if masked != "causal":
        mask = torch.ones(2, 1, new, 73, dtype=torch.bool).tril(70)
        mask[0, :, :, :40] = False  # padding on the left: more than a chunk of it
        if masked == "added":
            mask = torch.where(mask, 0.0, torch.finfo(torch.float32).min)
    found = attend(query, past, keys, values, mask, 0.2, chunk)
    torch.testing.assert_close(found.double(), dense(query, past, keys, values, mask, 0.2), rtol=1e-4, atol=1e-5)


def test_memory_does_not_grow_with_the_past():
    """Of every tensor that is made on the way the largest is as large at four times the tokens."""

    class Largest(TorchDispatchMode):
        most = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for t in out if isinstance(out, (tuple, list)) else (out,):
                if isinstance(t, torch.Tensor):
                    self.most = max(self.most, t.numel())
            return out

    query, keys = torch.randn(1, 4, 1, 32), torch.randn(1, 2, 1, 32)
    sizes = []
    for tokens in (2048, 8192):
        x = torch.randn(1, 2, tokens, 32)
        past = PackedPast(((quantize(x, 4, 32), quantize(x, 4, 32)),))
        with Largest() as seen:
            attend(query, past, keys, keys, None, 0.2, chunk=128)
        sizes.append(seen.most)
    assert sizes[0] == sizes[1] <= 2 * 128 * 32


@pytest.mark.parametrize("name", ("pm-kvq:2", "kivi4", "int3", "rotate4"))
def test_a_model_gives_the_same_with_either_attention(name):
    model = qkit.load("tiny-llama", dtype=torch.float32)
    ids = torch.randint(1, 4000, (2, 60), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, :25] = 0
    policy = parse(name)
    policy = replace(policy, window=16, group=16) if policy.window else policy
    found = []
    for kind in ("sdpa", "qkit"):
        model.set_attn_implementation(kind)
        cache = make_cache(model, with_budgets(policy, model, 60))
        assert cache.layers[0].packed == (kind == "qkit")
        with torch.inference_mode():
            pieces = [
                model(ids[:, a:b], attention_mask=mask[:, :b], past_key_values=cache).logits
                for a, b in ((0, 40), (40, 43), *((i, i + 1) for i in range(43, 60)))
            ]
        found.append(torch.cat(pieces, dim=1)[:, 30:])
    assert (found[0] - found[1]).abs().mean() < 0.02  # a code that falls on the other side, now and then
    assert (found[0].argmax(-1) == found[1].argmax(-1)).float().mean() > 0.97


def test_attach_reads_the_past_packed():
    model = qkit.load("tiny-llama", dtype=torch.float32)
    kind = type(model)
    attach(model, parse("int8"))
    attach(model, parse("int4"))
    assert model.config._attn_implementation == "qkit" and isinstance(model, kind)
    ids = torch.arange(40, 60)[None]
    first = model.generate(ids, max_new_tokens=6, do_sample=False, pad_token_id=0, return_dict_in_generate=True)
    assert first.past_key_values.widths == [4] * 8
    mine = DynamicCache(config=model.config)
    model(ids, past_key_values=mine)
    assert mine.get_seq_length() == 20  # a cache that is given is the one that is filled
    detach(model)
    assert type(model) is kind
    model.set_attn_implementation("sdpa")
    cache = make_cache(model, parse("int4"))
    again = model.generate(ids, past_key_values=cache, max_new_tokens=6, do_sample=False, pad_token_id=0)
    assert torch.equal(first.sequences, again)


def test_padding_that_sees_nothing_stays_finite():
    """A prompt in pieces, of which one sequence's first are padding alone."""
    model = qkit.load("tiny-llama", dtype=torch.float32)
    model.set_attn_implementation("qkit")
    ids, mask = torch.arange(40, 80).repeat(2, 1), torch.ones(2, 40, dtype=torch.int64)
    mask[0, :30] = 0
    place = (mask.cumsum(1) - 1).clamp_min(0)
    cache, logits = make_cache(model, parse("int8")), None
    with torch.inference_mode():
        for i in range(0, 40, 8):
            given = {"attention_mask": mask[:, : i + 8], "position_ids": place[:, i : i + 8], "past_key_values": cache}
            logits = model(ids[:, i : i + 8], **given).logits
        alone = model(ids[:1, 30:], use_cache=False).logits
    assert bool(logits.isfinite().all())
    assert (logits[0].argmax(-1) == alone[0, -8:].argmax(-1)).float().mean() > 0.8


def test_a_past_that_is_not_read_is_noticed():
    model = qkit.load("tiny-llama", dtype=torch.float32)
    model.set_attn_implementation("qkit")
    cache = make_cache(model, parse("int8"))
    model.set_attn_implementation("sdpa")
    ids = torch.arange(40, 60)[None]
    model(ids, past_key_values=cache)
    model(ids[:, :1], past_key_values=cache)
    with pytest.raises(Unsupported, match="did not read the packed past"):
        model(ids[:, :1], past_key_values=cache)


# ---- the kernel, run by Triton's interpreter ---------------------------------------------------------------------

triton = pytest.importorskip("triton")


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16), ids=str)
@pytest.mark.parametrize("bits", (2, 4, 8))
@pytest.mark.parametrize(
    ("tokens", "group", "dim", "masked"), [(65, 1, 64, False), (300, 4, 128, True), (600, 8, 128, False)]
)
def test_the_kernel_is_the_reference(bits, tokens, group, dim, masked, dtype):
    from qkit_kernels import kv

    g = torch.Generator().manual_seed(bits)
    k, v = torch.randn(2, 2, tokens, dim, generator=g), torch.randn(2, 2, tokens, dim, generator=g) + 0.5
    packed = [quantize(x, bits, dim) for x in (k, v)]
    q = (torch.randn(2, 2, group, dim, generator=g) * dim**-0.5).to(dtype)
    mask = None
    if masked:
        mask = torch.zeros(2, tokens)
        mask[0, : tokens // 2] = -torch.inf
    held = [kv.Tokens(p.words, p.low[..., 0], p.span[..., 0], bits) for p in packed]
    most, total, sums = kv.decode(q, *held, mask)
    keys, values = (p.dequantize(torch.float32).double() for p in packed)
    scores = q.double() @ keys.transpose(2, 3) + (0.0 if mask is None else mask[:, None, None].double())
    expected = scores.softmax(-1) @ values
    found = (sums / total[..., None]).double()
    plain = (scores.softmax(-1).to(dtype).double() @ values.to(dtype).double()).to(dtype).double()
    assert (found - expected).norm() <= 2 * (plain - expected).norm() + 1e-6
    torch.testing.assert_close(most.double(), scores.amax(-1), rtol=1e-2, atol=1e-2)
    again = kv.decode(q, *held, mask)
    assert all(torch.equal(a, b) for a, b in zip((most, total, sums), again, strict=True))


@pytest.mark.parametrize("masked", (False, True))
def test_the_kernel_and_the_chunks_share_a_past(masked, monkeypatch):
    """Sink and newest tokens in plain torch, the body by the kernel."""
    g = torch.Generator().manual_seed(0)
    k, v = torch.randn(2, 2, 90, 64, generator=g), torch.randn(2, 2, 90, 64, generator=g)
    cuts = ((0, 1, 16), (1, 81, 4), (81, 90, 16))
    past = PackedPast(tuple((quantize(k[:, :, a:b], w, 64), quantize(v[:, :, a:b], w, 64)) for a, b, w in cuts))
    query, keys, values = (torch.randn(2, n, 1, 64, generator=g).half() for n in (6, 2, 2))
    mask = None
    if masked:
        mask = torch.ones(2, 1, 1, 91, dtype=torch.bool)
        mask[1, ..., :30] = False
    expected = attend(query, past, keys, values, mask, 0.125)
    called = []
    monkeypatch.setattr("qkit.kvcache.attention._on_gpu", lambda t: not called.append(1))
    found = attend(query, past, keys, values, mask, 0.125)
    assert len(called) == 3 and not torch.equal(found, expected)
    torch.testing.assert_close(found, expected, rtol=5e-3, atol=5e-3)


def test_caches_that_the_kernel_does_not_read():
    from qkit_kernels import kv

    assert kv.supported(2, 128, 128) and not kv.supported(3, 128, 128) and not kv.supported(4, 128, 64)
    assert not kv.supported(4, 80, 80)
    t = kv.Tokens(torch.zeros(1, 1, 4, 15, dtype=torch.int16), torch.zeros(1, 1, 4), torch.zeros(1, 1, 4), 4)
    with pytest.raises(ValueError, match="expected 2, 4 or 8 bits"):
        kv.decode(torch.zeros(1, 1, 1, 60).half(), t, t)
