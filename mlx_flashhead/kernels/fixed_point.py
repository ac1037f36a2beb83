"""Probabilities as integers, the same on every back-end.

The distance of a logit from the largest, in powers of two, becomes a fixed-point number
with 26 fractional bits, and 2^-distance a 64-bit mass by integer arithmetic alone.
Integer sums do not depend on the order of addition, so filters cut at the same
candidate wherever they are computed. The functions here and the text for the
kernels (``METAL``) are one definition in two languages.
"""

import math

import mlx.core as mx
import numpy as np

FRACTION = 26
LOG2E = float(np.float32(math.log2(math.e) * 2**FRACTION))
LARGEST = 4294967040.0  # the largest float below 2^32
# Minimax coefficients of (1 - 2^-t) / t on [0, 1], in units of 2^-32, signs
# alternating: 2^-t within 4e-9 with the rounding of integers.
EXP2 = (0xB1721605, 0x3D7F581B, 0x0E34A46B, 0x0273C7F8, 0x00538ABA, 0x0007251B)
# The tail may weigh up to 2^22 times the best candidate.
TAIL_BITS = 22
_TAIL_SHIFT = float(np.float32(TAIL_BITS * math.log(2)))


def fixed_point(x: mx.array) -> mx.array:
    """float32 to uint32, the largest for what is beyond."""
    return mx.minimum(x, LARGEST).astype(mx.uint32)


def levels_below(top: mx.array, value: mx.array, scale: mx.array | float) -> mx.array:
    """How far below the top a value is, times ``scale``, which converts to powers of
    two in fixed point."""
    return fixed_point(mx.where(value == top, 0, top - value) * scale)


def tail_levels(behind: mx.array) -> mx.array:
    """The same for the log-mass of the tail, ``behind`` the largest logit in nats."""
    x = behind + _TAIL_SHIFT
    return fixed_point(mx.where(x > 0, x, 0) * LOG2E)


def exp2_negative(x: mx.array, up: int) -> mx.array:
    """``2^(32 + up - x / 2^26)``, uint64, for uint32 x."""
    x = x.astype(mx.uint64)
    low = 0xFFFFFFFF
    t = (x << 6) & low
    v = mx.array(EXP2[-1], dtype=mx.uint64)
    for c in reversed((low, *EXP2[:-1])):
        v = mx.array(c, dtype=mx.uint64) - (t * v >> 32)
    return (v << up) >> (x >> FRACTION)


METAL = (
    f"""
constexpr constant float LARGEST = {LARGEST:.1f}f;
constexpr constant float LOG2E = {LOG2E:.1f}f;  // log2(e) in fixed point
constexpr constant float TAIL_SHIFT = {_TAIL_SHIFT!r}f;
constexpr constant int TAIL_BITS = {TAIL_BITS};
constexpr constant uint EXP2[] = {{{", ".join(f"{c:#010x}u" for c in EXP2)}}};
"""
    + """
METAL_FUNC uint fixed_point(float x) {
    return uint(x < LARGEST ? x : LARGEST);
}

// How far below the top a value is, times scale, which converts to powers of two in
// fixed point. A product of a difference: nothing that could be fused.
METAL_FUNC uint levels_below(float top, float value, float scale) {
    return fixed_point((value == top ? 0.0f : top - value) * scale);
}

METAL_FUNC uint tail_levels(float behind) {
    float x = behind + TAIL_SHIFT;
    return fixed_point((x > 0.0f ? x : 0.0f) * LOG2E);
}

// 2^(32 + up - x / 2^26), by integer arithmetic.
METAL_FUNC ulong exp2_negative(uint x, int up) {
    uint t = x << 6;  // the fraction
    uint v = EXP2[5];
#pragma unroll
    for (int i = 4; i >= 0; i--) {
        v = EXP2[i] - mulhi(t, v);
    }
    return (ulong(~0u - mulhi(t, v)) << up) >> (x >> 26);
}
"""
)
