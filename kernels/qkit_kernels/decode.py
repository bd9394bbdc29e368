"""From words of the layout (layout.py) to numbers that a tensor core multiplies, and from stored scales to numbers.

Integers: a code OR-ed into the low bits of the float16 1024 (bfloat16 128) is the float16 1024 + code, exactly; a
subtraction of 1024 + 2^(bits - 1) + zero point, exact again, leaves the integer. One AND-OR and one subtraction make
two numbers. (Known from Kim et al., "Who Says Elephants Can't Run", arXiv 2211.10017, section 3.) E2M1, E4M3: sign,
exponent and mantissa move to their places in the wider type; what comes out is the number times a power of two that
the exponents' offsets differ by, and the caller's scale makes up for that.

PLAIN: the interpreter has no bfloat16 arithmetic and cuts where it should round to it, so 16-bit floats are added,
multiplied and rounded by way of float32 there, which gives the same numbers.

``pair_asm`` says in PTX what ``pair_plain`` says in Triton, for compilers that split the pairs (those before sm_90):
equal bit for bit.
"""

from __future__ import annotations

import triton
import triton.language as tl

SIGNS = tl.constexpr(-0x7FFF8000)  # 0x80008000


@triton.constexpr_function
def ptx(shift, mask, half, offset):
    """((word >> shift) & mask | magic) + offset on both halves of a register: $2 the word, $3 the offset twice, unless its
    bits are given."""
    magic, add = ("0x64006400", "add.rn.f16x2 t, t, o") if half else ("0x43004300", "fma.rn.bf16x2 t, t, one, o")
    source = "$3" if offset is None else f"{offset:#010x}"
    return f"""{{
.reg .b32 t, o, one;
mov.b32 one, 0x3F803F80;
mov.b32 o, {source};
shr.b32 t, $2, {shift};
lop3.b32 t, t, {mask:#010x}, {magic}, 0xEA;
{add};
mov.b32 {{$0, $1}}, t;
}}"""


@triton.jit
def halves(t, DTYPE: tl.constexpr):
    """int32 holding a pair of 16-bit floats to the two."""
    low = (t & 0xFFFF).to(tl.int16).to(DTYPE, bitcast=True)
    high = ((t >> 16) & 0xFFFF).to(tl.int16).to(DTYPE, bitcast=True)
    return low, high


@triton.jit
def wide(a, PLAIN: tl.constexpr):
    """A 16-bit float in float32."""
    if PLAIN and a.dtype == tl.bfloat16:
        return (a.to(tl.int16, bitcast=True).to(tl.int32) << 16).to(tl.float32, bitcast=True)
    return a.to(tl.float32)


@triton.jit
def narrow(a, DTYPE: tl.constexpr, PLAIN: tl.constexpr):
    """float32 rounded to DTYPE, to nearest, ties to even."""
    if PLAIN and DTYPE == tl.bfloat16:
        bits = a.to(tl.int32, bitcast=True)
        return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).to(tl.int16).to(DTYPE, bitcast=True)
    return a.to(DTYPE)


@triton.jit
def plus(a, b, PLAIN: tl.constexpr):
    """a + b, of 16-bit floats."""
    if PLAIN:
        return narrow(wide(a, PLAIN) + wide(b, PLAIN), a.dtype, PLAIN)
    return a + b


@triton.jit
def times(a, b, PLAIN: tl.constexpr):
    """a b, of 16-bit floats."""
    if PLAIN:
        return narrow(wide(a, PLAIN) * wide(b, PLAIN), a.dtype, PLAIN)
    return a * b


@triton.jit
def pair_plain(words, offset, SHIFT: tl.constexpr, MASK: tl.constexpr, PLAIN: tl.constexpr):
    """Integers of one place of a word, low and high half, in the dtype of ``offset`` (minus what is OR-ed in)."""
    MAGIC: tl.constexpr = 0x64006400 if offset.dtype == tl.float16 else 0x43004300
    low, high = halves(((words >> SHIFT) & MASK) | MAGIC, offset.dtype)
    return plus(low, offset, PLAIN), plus(high, offset, PLAIN)


@triton.jit
def pair_asm(words, offset, SHIFT: tl.constexpr, MASK: tl.constexpr, LITERAL: tl.constexpr):
    """``pair_plain`` in three instructions. LITERAL: bits of the offset, twice, where it is the same everywhere; else None."""
    HALF: tl.constexpr = offset.dtype == tl.float16
    if LITERAL is None:
        bits = offset.to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF
        words, offset_pair = tl.broadcast(words, bits | (bits << 16))
        low, high = tl.inline_asm_elementwise(
            ptx(SHIFT, MASK, HALF, None),
            "=h,=h,r,r",
            [words, offset_pair],
            (offset.dtype, offset.dtype),
            is_pure=True,
            pack=1,
        )
    else:
        # A splat as an operand would send the numbers through shared memory (seen with Triton 3.9).
        low, high = tl.inline_asm_elementwise(
            ptx(SHIFT, MASK, HALF, LITERAL), "=h,=h,r", [words], (offset.dtype, offset.dtype), is_pure=True, pack=1
        )
    return low, high


@triton.jit
def pair_int(
    words,
    offset,
    SHIFT: tl.constexpr,
    MASK: tl.constexpr,
    LITERAL: tl.constexpr,
    ASM: tl.constexpr,
    PLAIN: tl.constexpr,
):
    """Result of ``pair_asm`` or ``pair_plain``."""
    if ASM:
        low, high = pair_asm(words, offset, SHIFT, MASK, LITERAL)
    else:
        low, high = pair_plain(words, offset, SHIFT, MASK, PLAIN)
    return low, high


@triton.jit
def pair_int8(words, offset, J: tl.constexpr, DTYPE: tl.constexpr, PLAIN: tl.constexpr):
    """8-bit codes in bfloat16, whose mantissa is too short for the OR: by way of float32 (8388608 + code). offset: float32."""
    low = (((words >> (8 * J)) & 0xFF) | 0x4B000000).to(tl.float32, bitcast=True) + offset
    high = (((words >> (16 + 8 * J)) & 0xFF) | 0x4B000000).to(tl.float32, bitcast=True) + offset
    return narrow(low, DTYPE, PLAIN), narrow(high, DTYPE, PLAIN)


@triton.jit
def bits_fp4(words, J: tl.constexpr, DTYPE: tl.constexpr):
    """Pair J of E2M1 codes as a pair of DTYPE in an int32: the number times 2^-14 in float16, 2^-126 in bfloat16."""
    sign = (words << (12 - 4 * J)) & SIGNS
    if DTYPE == tl.float16:
        if J < 3:
            magnitude = (words << (9 - 4 * J)) & 0x0E000E00
        else:
            magnitude = (words >> 3) & 0x0E000E00
    else:
        if J < 2:
            magnitude = (words << (6 - 4 * J)) & 0x01C001C0
        else:
            magnitude = (words >> (4 * J - 6)) & 0x01C001C0
    return sign | magnitude


@triton.jit
def bits_fp8(words, J: tl.constexpr, DTYPE: tl.constexpr):
    """Pair J of E4M3 codes as a pair of DTYPE in an int32: the number times 2^-8 in float16, 2^-120 in bfloat16."""
    t = words << (8 - 8 * J)
    if DTYPE == tl.float16:
        return (t & SIGNS) | ((t >> 1) & 0x3F803F80)
    return (t & SIGNS) | ((t >> 4) & 0x07F007F0)


@triton.jit
def scaled(bits, s, ASM: tl.constexpr, PLAIN: tl.constexpr):
    """The pairs in ``bits`` (int32) times s (16-bit floats): (low, high)."""
    if ASM:
        bits, s = tl.broadcast(bits, s)
        if s.dtype == tl.float16:
            low, high = tl.inline_asm_elementwise(
                "{.reg .b32 t; mov.b32 t, {$3, $3}; mul.rn.f16x2 t, t, $2; mov.b32 {$0, $1}, t;}",
                "=h,=h,r,h", [bits, s], (s.dtype, s.dtype), is_pure=True, pack=1,
            )  # fmt: skip
        else:  # sm_80 has no product of bfloat16 alone; a fused one with -0.0 is the same
            low, high = tl.inline_asm_elementwise(
                "{.reg .b32 t, o; mov.b32 o, 0x80008000; mov.b32 t, {$3, $3}; fma.rn.bf16x2 t, t, $2, o; mov.b32 {$0, $1}, t;}",
                "=h,=h,r,h", [bits, s], (s.dtype, s.dtype), is_pure=True, pack=1,
            )  # fmt: skip
    else:
        low, high = halves(bits, s.dtype)
        low, high = times(low, s, PLAIN), times(high, s, PLAIN)
    return low, high


@triton.jit
def scales_of_bytes(four, SCALE: tl.constexpr, FACTOR: tl.constexpr, DTYPE: tl.constexpr, PLAIN: tl.constexpr):
    """int32 [.., 1], four stored scales each, to DTYPE [.., 4], such that scale x what ``bits_fp4`` or ``bits_fp8`` gives
    is the number (e8m0) or 2^-7 of it (e4m3: more would leave float16). FACTOR: ``unscaled`` of the format."""
    MASK: tl.constexpr = 0x007F007F if SCALE == "e4m3" else 0x00FF00FF
    SHIFT: tl.constexpr = (7 if DTYPE == tl.float16 else 4) + (SCALE == "e8m0") * (1 if DTYPE == tl.float16 else 3)
    s0, s2 = halves((four & MASK) << SHIFT, DTYPE)
    s1, s3 = halves(((four >> 8) & MASK) << SHIFT, DTYPE)
    s = tl.join(tl.join(s0, s2), tl.join(s1, s3)).reshape(four.shape[0], four.shape[1], 4)
    if SCALE == "e8m0":
        return times(s, tl.full([1, 1, 1], FACTOR, DTYPE), PLAIN)
    if DTYPE == tl.float16:
        return s * 32768.0
    s = times(s, tl.full([1, 1, 1], 1.329227995784916e36, DTYPE), PLAIN)  # 2^120
    return times(s, tl.full([1, 1, 1], 6.64613997892458e35, DTYPE), PLAIN)  # 2^119


def unscaled(kind: str, bits: int, half: bool) -> float:
    """The inverse of the factor of ``bits_fp4`` and ``bits_fp8``. half: in float16, else bfloat16."""
    if kind == "int":
        return 1.0
    if bits == 4:
        return 2.0**14 if half else 2.0**126
    return 2.0**8 if half else 2.0**120
