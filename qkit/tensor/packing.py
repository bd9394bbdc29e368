"""Codes <-> bytes: pack and unpack side by side.

Two layouts, both row by row and little-endian, so that a row can be read on its own:
  * ``pack_bits``: b-bit codes as one dense bit stream in 32-bit words. Element i of a row occupies bits
    [i*b, (i+1)*b) of the row, least significant bit first; the last word is filled with zeros. A signed
    code q is stored as q + 2^(b-1). This is the ``pack-quantized`` layout of compressed-tensors 0.20
    (1 to 8 bits, no padding inside a row).
  * ``pack_nibbles``: 4-bit E2M1 codes two to a byte, the even column in the low nibble.
"""

from __future__ import annotations

import torch
from torch import Tensor


def packed_words(columns: int, bits: int) -> int:
    """How many 32-bit words a row of ``columns`` codes of ``bits`` bits takes."""
    return -(-columns * bits // 32)


def pack_bits(codes: Tensor, bits: int) -> Tensor:
    """Signed codes, int8 [rows, columns], to int32 words [rows, ceil(columns * bits / 32)]."""
    rows, columns = codes.shape
    if 8 % bits == 0:  # whole codes per byte: far faster than going through 64-bit words
        unsigned8 = (codes + (1 << (bits - 1)) if bits < 8 else codes ^ -128).view(torch.uint8)
        unsigned8 = torch.nn.functional.pad(unsigned8, (0, packed_words(columns, bits) * 32 // bits - columns))
        lanes = unsigned8.unflatten(1, (-1, 8 // bits)).unbind(-1)
        packed: Tensor = lanes[0].contiguous()
        for i, lane in enumerate(lanes[1:], 1):
            packed |= lane << (i * bits)
        return packed.view(torch.int32)
    chunks = -(-columns // 32)
    unsigned = torch.zeros(rows, chunks * 32, dtype=torch.int64)
    unsigned[:, :columns] = codes.to(torch.int64) + (1 << (bits - 1))
    unsigned = unsigned.view(rows, chunks, 32)
    # 32 codes fill exactly ``bits`` words; 64-bit arithmetic keeps the part that spills into the next word.
    words = torch.zeros(rows, chunks, bits + 1, dtype=torch.int64)
    for i in range(32):
        word, shift = divmod(i * bits, 32)
        shifted = unsigned[:, :, i] << shift
        words[:, :, word] |= shifted & 0xFFFFFFFF
        words[:, :, word + 1] |= shifted >> 32
    flat = words[:, :, :bits].reshape(rows, chunks * bits)[:, : packed_words(columns, bits)]
    return torch.where(flat >= 1 << 31, flat - (1 << 32), flat).to(torch.int32)


def unpack_bits(words: Tensor, bits: int, columns: int) -> Tensor:
    """The inverse of ``pack_bits``: int32 [rows, words] to signed codes int8 [rows, columns]."""
    rows = words.shape[0]
    if 8 % bits == 0:
        # A copy: a transposed column counts as contiguous, yet its strides are not those that a view needs.
        packed = words.clone(memory_format=torch.contiguous_format).view(torch.uint8)
        lanes = [(packed >> (i * bits)) & ((1 << bits) - 1) for i in range(8 // bits)]
        unsigned = torch.stack(lanes, dim=-1).flatten(1)[:, :columns].view(torch.int8)
        return unsigned - (1 << (bits - 1)) if bits < 8 else unsigned ^ -128
    chunks = -(-columns // 32)
    padded = torch.zeros(rows, chunks * bits + 1, dtype=torch.int64, device=words.device)
    padded[:, : words.shape[1]] = words.to(torch.int64) & 0xFFFFFFFF
    padded[:, chunks * bits :] = 0
    codes = torch.empty(rows, chunks, 32, dtype=torch.int8, device=words.device)
    grid = padded[:, : chunks * bits].reshape(rows, chunks, bits)
    mask, offset = (1 << bits) - 1, 1 << (bits - 1)
    for i in range(32):
        word, shift = divmod(i * bits, 32)
        value = grid[:, :, word] >> shift
        if shift + bits > 32:
            value = value | (grid[:, :, word + 1] << (32 - shift))
        codes[:, :, i] = ((value & mask) - offset).to(torch.int8)
    return codes.reshape(rows, chunks * 32)[:, :columns].contiguous()


def pack_nibbles(codes: Tensor) -> Tensor:
    """4-bit codes, uint8 [rows, columns] with columns even, to bytes [rows, columns / 2]."""
    return codes[:, 0::2] | (codes[:, 1::2] << 4)


def unpack_nibbles(packed: Tensor) -> Tensor:
    """The inverse of ``pack_nibbles``: uint8 [rows, n] to 4-bit codes uint8 [rows, 2 n]."""
    return torch.stack((packed & 0xF, packed >> 4), dim=-1).flatten(1)
