"""Codes to bytes and back: golden vectors of the format, an independent packer, and every width."""

import numpy as np
import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from qkit.tensor.packing import pack_bits, pack_nibbles, packed_words, unpack_bits, unpack_nibbles

BITS = range(1, 9)


def slow_words(codes: np.ndarray, bits: int) -> list[list[int]]:
    """A row as one integer: code i at bit i * bits, cut into 32-bit words."""
    rows = []
    for row in codes:
        number = sum((int(c) + (1 << (bits - 1))) << (i * bits) for i, c in enumerate(row))
        rows.append([(number >> (32 * w)) & 0xFFFFFFFF for w in range(-(-len(row) * bits // 32))])
    return rows


def as_unsigned(words: torch.Tensor) -> list[list[int]]:
    return (words.to(torch.int64) & 0xFFFFFFFF).tolist()


def test_golden_int4():
    words = pack_bits(torch.tensor([[-8, -7, 0, 7, 1, 2, 3, -1]], dtype=torch.int8), 4)
    assert words.dtype == torch.int32
    assert as_unsigned(words) == [[0x7BA9F810]]


def test_golden_int3():
    words = pack_bits(torch.tensor([[(i % 8) - 4 for i in range(32)]], dtype=torch.int8), 3)
    assert as_unsigned(words) == [[0x88FAC688, 0xC688FAC6, 0xFAC688FA]]


def test_golden_nibbles():
    codes = torch.tensor([[0x1, 0xA, 0x7, 0x8]], dtype=torch.uint8)  # 0.5, -1, 6, -0
    assert pack_nibbles(codes).tolist() == [[0xA1, 0x87]]


@settings(deadline=None, max_examples=200)
@given(bits=st.sampled_from(BITS), data=st.data())
def test_any_codes_survive(bits, data):
    shape = data.draw(st.tuples(st.integers(1, 4), st.integers(1, 80)))
    low = -(1 << (bits - 1))
    codes = data.draw(hnp.arrays(np.int8, shape, elements=st.integers(low, -low - 1)))
    words = pack_bits(torch.from_numpy(codes), bits)
    assert words.shape == (shape[0], packed_words(shape[1], bits))
    assert as_unsigned(words) == slow_words(codes, bits)
    assert torch.equal(unpack_bits(words, bits, shape[1]), torch.from_numpy(codes))


@pytest.mark.parametrize("columns", [1, 7, 31, 32, 33, 96, 127])
@pytest.mark.parametrize("bits", BITS)
def test_equals_compressed_tensors(bits, columns):
    low = -(1 << (bits - 1))
    codes = torch.randint(low, -low, (5, columns), dtype=torch.int8, generator=torch.Generator().manual_seed(bits))
    words = pack_bits(codes, bits)
    assert torch.equal(words, pack_to_int32(codes, bits))
    assert torch.equal(unpack_from_int32(words, bits, codes.shape), codes)


@given(
    hnp.arrays(
        np.uint8, st.tuples(st.integers(1, 4), st.integers(1, 40).map(lambda n: 2 * n)), elements=st.integers(0, 15)
    )
)
def test_any_nibbles_survive(codes):
    assert torch.equal(unpack_nibbles(pack_nibbles(torch.from_numpy(codes))), torch.from_numpy(codes))


def test_every_eight_codes_of_three_bits():
    """8 codes are 3 bytes, 3 n / 8 in all, and all 2^24 words come back."""
    for start in range(0, 1 << 24, 1 << 21):
        words = torch.arange(start, start + (1 << 21))
        codes = torch.stack([(words >> (3 * i)) & 7 for i in range(8)], 1).view(-1, 32) - 4
        packed = pack_bits(codes.to(torch.int8), 3)
        assert packed.nbytes == 3 * codes.numel() // 8
        assert torch.equal(unpack_bits(packed, 3, 32), codes.to(torch.int8))
