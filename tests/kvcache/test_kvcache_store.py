"""The packed store of KV caches: codes, halving, groups."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qkit.kvcache.policy import WIDTHS
from qkit.kvcache.store import HALF, Packed, Plain, halve_codes, narrowed, pack, quantize, unpack


@pytest.mark.parametrize("bits", (16, 8, 4))
def test_halving_is_rounding_for_every_code(bits):
    """PM-KVQ's equivalent right shift is round(code / (2^b + 1)), keeps 0 and the largest code, and is monotone."""
    codes = torch.arange(1 << bits, dtype=torch.int32)
    b = bits // 2
    found = halve_codes(codes, bits)
    assert torch.equal(found.double(), (codes.double() / (2**b + 1)).round())
    assert found[0] == 0 and found[-1] == (1 << b) - 1 and bool((found.diff() >= 0).all())


@pytest.mark.parametrize("bits", (8, 4, 2))
def test_a_chain_of_halvings_is_one_rounding_for_every_code(bits):
    codes = torch.arange(1 << 16, dtype=torch.int32)
    direct = (codes.double() * ((1 << bits) - 1) / 65535).round()
    at, found = 16, codes
    while at > bits:
        found, at = halve_codes(found, at), HALF[at]
    assert torch.equal(found.double(), direct)


@pytest.mark.parametrize("bits", (1, 2, 4, 8, 16))
def test_packing_keeps_every_code(bits):
    codes = torch.randint(0, 1 << bits, (2, 3, 5, 48), dtype=torch.int32)
    codes[0, 0, 0] = (1 << bits) - 1
    words = pack(codes, bits)
    assert words.dtype == torch.int16 and words.shape == (2, 3, 5, 48 * bits // 16)
    assert torch.equal(unpack(words, bits), codes)


def test_the_first_code_is_in_the_highest_bits():
    assert pack(torch.tensor([1, 2, 3, 0], dtype=torch.int32), 4).item() == 0x1230
    assert pack(torch.tensor([255, 1], dtype=torch.int32), 8).item() == 0xFF01 - 65536


@pytest.mark.parametrize("bits", (16, 8, 4))
def test_halving_packed_words(bits):
    """All 65,536 codes of 16 bits; random ones of fewer."""
    codes = torch.arange(65536, dtype=torch.int32) if bits == 16 else torch.randint(0, 1 << bits, (65536,)).int()
    codes = codes.view(1, 2, 256, 128)
    ones = torch.ones(1, 2, 256, 1).half()
    q = Packed(words=pack(codes, bits), low=ones, span=ones, bits=bits, group=128)
    found = q.halved()
    assert found.bits == bits // 2
    assert torch.equal(found.words, pack(halve_codes(codes, bits), bits // 2))
    assert found.low is q.low and found.span is q.span  # nothing of a group changes


@pytest.mark.parametrize("axis", ("channel", "token"))
@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("scale", (1e-3, 1.0, 1e4))
def test_numbers_come_back_within_half_a_step(bits, axis, scale):
    x = torch.randn(2, 3, 32, 64, generator=torch.Generator().manual_seed(bits)) * scale
    x[0, 0, :16, :16] = x[0, 0, 0, 0]  # a group without range
    x = x.clamp(-32752, 32752)
    q = quantize(x, bits, 16, axis)
    dim = 3 if axis == "channel" else 2
    grouped = x.unflatten(dim, (-1, 16))
    span = grouped.amax(dim + 1, keepdim=True) - grouped.amin(dim + 1, keepdim=True)
    error = (q.dequantize(torch.float32).unflatten(dim, (-1, 16)) - grouped).abs()
    # The outward rounding to float16 widens a group by 2^-10 of its largest magnitude at either end.
    wider = span + grouped.abs().amax(dim + 1, keepdim=True) * 2.0**-9 + 2.0**-23
    assert bool((error <= 0.501 * wider / ((1 << bits) - 1) + 1e-6 * scale).all())


def test_what_float16_cannot_hold_counts_as_its_largest():
    q = quantize(torch.tensor([1e6, -1e6, 0.0, 70000.0] * 4).view(1, 1, 1, 16), 8, 16)
    assert bool(q.dequantize(torch.float32).isfinite().all()) and bool(q.span.isfinite().all())


@given(st.integers(0, 2**32 - 1), st.sampled_from([8, 4, 2]), st.floats(1e-6, 1e3))
def test_the_halved_is_as_good_as_the_direct(seed, bits, scale):
    """Against x itself: halved 16-bit codes are within half a step (and half a 16-bit one) of it; no floor on the step eats
    the range of small numbers."""
    x = torch.randn(1, 1, 8, 32, generator=torch.Generator().manual_seed(seed)) * scale
    found, direct = (q.dequantize(torch.float32) for q in (narrowed(quantize(x, 16, 32), bits), quantize(x, bits, 32)))
    assert float((found - x).norm()) <= 1.02 * float((direct - x).norm()) + 1e-7


@pytest.mark.parametrize("axis", ("channel", "token"))
@pytest.mark.parametrize("bits", (3, 4))
def test_parts_and_joins(bits, axis):
    x = torch.randn(2, 2, 48, 32)
    q = quantize(x, bits, 16, axis)
    whole = q.dequantize(torch.float32)
    joined = q.slice(0, 16).cat(q.slice(16, 48))
    assert torch.equal(joined.dequantize(torch.float32), whole) and joined.tokens == 48
    assert torch.equal(q.dequantize(torch.float32, 16, 37), whole[:, :, 16:37])
    assert torch.equal(q.map(lambda t: t[[1]]).dequantize(torch.float32), whole[[1]])
    own = sum(t.untyped_storage().nbytes() for t in q.slice(16, 32).tensors)
    assert own == sum(t.numel() * t.element_size() for t in q.tensors) // 3  # a part does not hold on to the whole


def test_plain_tokens_have_the_same_interface():
    x = torch.randn(1, 2, 6, 8)
    p = Plain(x).slice(0, 2).cat(Plain(x).slice(2, 6))
    assert torch.equal(p.dequantize(torch.float32), x) and p.tokens == 6
    assert torch.equal(p.map(lambda t: t * 2).dequantize(torch.float32, 1, 3), 2 * x[:, :, 1:3])


def test_long_caches_are_unpacked_in_parts(monkeypatch):
    monkeypatch.setattr("qkit.kvcache.store.CHUNK", 20)
    x = torch.randn(1, 1, 64, 16)
    for axis in ("channel", "token"):
        q = quantize(x, 4, 16, axis)
        parts = torch.cat([q.dequantize(torch.float32, i, i + 16) for i in range(0, 64, 16)], dim=2)
        assert torch.equal(q.dequantize(torch.float32), parts)
    q = quantize(x, 16, 16)
    assert torch.equal(q.halved().codes(), halve_codes(q.codes(), 16))
