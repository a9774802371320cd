"""Device functions that more than one Triton kernel calls."""

from __future__ import annotations

from fxq import numerics
from fxq.kernels.jit import Block, Pointer, Scalar, constant, constexpr, jit, tl

POISON = constant(numerics.POISON - 2**32)
POISON_WIDTH = constant(numerics.POISON_WIDTH)
POISON_LEAST = constant(numerics.POISON_LEAST)


@jit
def inverse_root(x: Scalar) -> Scalar:
    """``1 / sqrt(x)``, NaN where squares of finite numbers have overflown."""
    return tl.where(x < float("inf"), tl.rsqrt(x), float("nan"))


@jit
def poison_code(columns: Block) -> Block:
    """int8 that a row that is not finite holds at the columns below 32, see fxq.numerics.poison."""
    bits = tl.full((), POISON, tl.int32) >> (columns & 31)
    return tl.where((bits & 1) == 1, 127, -128).to(tl.int8)


@jit
def poison(q: Block, columns: Block, broken: Block, K: Scalar) -> Block:
    """The int8 tile with the mark where ``broken`` says so; the shapes broadcast."""
    return tl.where(broken & (columns < POISON_WIDTH) & (K >= POISON_LEAST), poison_code(columns), q)


@jit
def poisoned(q_rows: Pointer, K: Scalar) -> Block:
    """Whether the int8 rows of K channels are marked."""
    columns = tl.arange(0, POISON_WIDTH)
    inside = columns < K
    # [rows, POISON_WIDTH] bytes of the head of each row; a row narrower than the mark is compared as far as it goes.
    head = tl.load(q_rows[:, None] + columns[None, :], mask=inside[None, :], other=0)
    # Marked where no channel differs: [rows].
    other = (head != poison_code(columns)[None, :]) & inside[None, :]
    return (tl.max(other.to(tl.int32), 1) == 0) & (K >= POISON_LEAST)


@jit
def round_to_int32(x: Block, PTX: constexpr) -> Block:
    """Nearest int32; floor(x + 0.5) would move integers above 2**23."""
    if PTX:
        result = tl.inline_asm_elementwise("cvt.rni.s32.f32 $0, $1;", "=r,f", [x], dtype=tl.int32, is_pure=True, pack=1)
    else:
        below = tl.floor(x)
        result = below.to(tl.int32) + (x - below >= 0.5).to(tl.int32)
    return result


@jit
def to_int8(x: Block, inverse: Block, zero: Block, LOW: constexpr, HIGH: constexpr) -> Block:
    """``clip(round(x * inverse) + zero, LOW, HIGH)``, half to even, as fxq.numerics.quantize_input; NaN is LOW."""
    # The clamp stands between product and sum: they cannot contract to one FMA, which would round differently.
    low = (LOW - zero).to(tl.float32)
    scaled = x * inverse
    scaled = tl.where(scaled > low, scaled, low)
    scaled = tl.minimum(scaled, (HIGH - zero).to(tl.float32))
    # Adding 1.5 * 2**23 rounds half to even and leaves the integer in the low bits of the mantissa.
    return ((scaled + 12582912.0).to(tl.int32, bitcast=True) + zero).to(tl.int8)
