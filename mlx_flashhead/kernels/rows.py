"""Rows of a table in cluster order: how kernels read and score them."""

from __future__ import annotations

from typing import NamedTuple

import mlx.core as mx

from . import backend


class Rows(NamedTuple):
    """Hidden states ``[B, D]`` and the table of rows ``[C, m, ...]`` that a kernel
    scores, as :func:`mlx_flashhead.kernels.probe_logits` takes them.

    Attributes:
        x: The hidden states.
        weight, scales, biases: The table; scales are ``None`` for rows that are not
            quantized.
        bits: Of a weight, quantized or not.
        group_size: Weights per scale.
        n_rows: How many rows are real.
        bias: Bias of each row, floating ``[C, m]``; ``None`` for none.
    """

    x: mx.array
    weight: mx.array
    scales: mx.array | None
    biases: mx.array | None
    bits: int
    group_size: int
    n_rows: int
    bias: mx.array | None = None

    @property
    def inputs(self) -> list[mx.array]:
        """What stands for the names in ``INPUTS``; the states stand for what there is
        not."""
        arrays = (self.x, self.weight, self.scales, self.biases, self.bias)
        return [self.x if a is None else a for a in arrays]

    @property
    def template(self) -> backend.Template:
        """What is known of them when a kernel is compiled."""
        return [
            ("T", self.x.dtype),
            ("D", self.x.shape[1]),
            ("M", self.weight.shape[1]),
            ("BITS", self.bits),
            ("GROUP_SIZE", self.group_size),
            ("QUANTIZED", self.scales is not None),
            ("BIASED", self.bias is not None),
        ]

    def __str__(self) -> str:
        """The same in words, dtypes included."""
        form = "rows"
        if self.scales is not None:
            form = f"{self.bits} bits in groups of {self.group_size}"
            form += f", scales {backend.short(self.scales.dtype)}"
        if self.bias is not None:
            form += f", bias {backend.short(self.bias.dtype)}"
        _, m = self.weight.shape[:2]
        return f"{backend.short(self.x.dtype)}, {form}, D {self.x.shape[1]}, m {m}"


INPUTS = ["x", "weight", "scales", "biases", "bias"]

METAL = """
METAL_FUNC constexpr int unit_size(int bits) {
    return bits < 8 ? 32 : 128 / bits;
}

template <int N>
METAL_FUNC void load_words(const device uint* from, thread uint* to) {
    if (N % 4 == 0) {
#pragma unroll
        for (int i = 0; i < N; i += 4) {
            uint4 v = *(const device uint4*)(from + i);
            to[i] = v.x;
            to[i + 1] = v.y;
            to[i + 2] = v.z;
            to[i + 3] = v.w;
        }
    } else if (N % 2 == 0) {
#pragma unroll
        for (int i = 0; i < N; i += 2) {
            uint2 v = *(const device uint2*)(from + i);
            to[i] = v.x;
            to[i + 1] = v.y;
        }
    } else {
#pragma unroll
        for (int i = 0; i < N; i++) {
            to[i] = from[i];
        }
    }
}

// Element i of words that hold values of type T.
template <typename T>
METAL_FUNC float element(thread const uint* words, int i) {
    return float(as_type<T>(ushort(words[i / 2] >> (16 * (i % 2)))));
}
template <>
METAL_FUNC float element<float>(thread const uint* words, int i) {
    return as_type<float>(words[i]);
}

template <typename T, int N>
METAL_FUNC void load_floats(const device uint* from, int unit, thread float* to) {
    constexpr int WORDS = N * sizeof(T) / 4;
    static_assert(WORDS * 4 == int(N * sizeof(T)), "whole words");
    uint words[WORDS];
    load_words<WORDS>(from + unit * WORDS, words);
#pragma unroll
    for (int i = 0; i < N; i++) {
        to[i] = element<T>(words, i);
    }
}

// The mantissa of 2^23 takes weights of 4 and 8 bits where they stand in a word, if
// that is below bit 23; the others are shifted by as much for all. A shift takes an
// Apple GPU as long as four additions. By so many bits weight i stands too high then.
template <int BITS>
METAL_FUNC constexpr int lift(int i) {
    constexpr int LOW = BITS > 8 ? 32 : 23 / BITS * BITS;
    return 32 % BITS == 0 ? i * BITS % 32 % LOW : 0;
}

// Weight i of a little-endian stream of BITS-bit integers, times 2^lift: its bits or-ed
// into the mantissa of 2^23, which is exact.
template <int BITS>
METAL_FUNC float unpack(thread const uint* words, int i) {
    int at = i * BITS / 32;
    int shift = i * BITS % 32 - lift<BITS>(i);
    uint bits = words[at] >> shift;
    if (shift + BITS > 32) {
        bits |= words[at + 1] << (32 - shift);
    }
    uint mask = (~0u >> (32 - BITS)) << lift<BITS>(i);
    return as_type<float>(0x4b000000u | (bits & mask)) - 8388608.0f;
}

// Products of a state with ROWS rows of a table, whose numbers are given. LANES lanes
// share a row and read it side by side, 16 bytes or more each; all of them get its sum.
// A lane keeps its ROWS rows in flight and uses the state for all of them. What is
// indexed by a loop's counter is an array in registers only if the loop is unrolled, so
// all loops over ROWS, UNIT and WORDS say that they are.
//
// Lanes that share a scale read it at the same address, which the memory serves once.
// To read it in one of them and shuffle would take the same load, which all lanes issue
// together, and a shuffle more.
template <
    typename T, int D, int BITS, int GROUP_SIZE, bool QUANTIZED, int ROWS, int LANES,
    typename S>
METAL_FUNC void score_rows(
    const device uint* state, const device uint* table, S scales, S biases,
    thread const uint* numbers, uint lane, thread float* sums) {
    constexpr int UNIT = unit_size(BITS);  // weights that a lane reads at a time
    constexpr int WORDS = UNIT * BITS / 32;
    constexpr int UNITS = D / UNIT;
    static_assert(D % UNIT == 0, "a row is whole units");
    static_assert(UNIT * BITS == 32 * WORDS, "a unit is whole words");
    static_assert(!QUANTIZED || (D % GROUP_SIZE == 0 && GROUP_SIZE % UNIT == 0),
                  "a unit has one scale");
    static_assert(!QUANTIZED || BITS <= 8, "weights fit the mantissa of 2^23");
    static_assert(LANES <= 32 && (LANES & (LANES - 1)) == 0, "lanes are a power of 2");
    // Where the rows and their groups begin.
    const device uint* row_words[ROWS];
    uint row_groups[ROWS];
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
        row_words[r] = table + size_t(numbers[r]) * (UNITS * WORDS);
        row_groups[r] = numbers[r] * (D / GROUP_SIZE);
        sums[r] = 0.0f;
    }
    for (int unit = lane; unit < UNITS; unit += LANES) {
        float v[UNIT];
        load_floats<T, UNIT>(state, unit, v);
        uint w[ROWS][WORDS];
#pragma unroll
        for (int r = 0; r < ROWS; r++) {
            load_words<WORDS>(row_words[r] + unit * WORDS, w[r]);
        }
        if (QUANTIZED) {
            int group = unit * UNIT / GROUP_SIZE;
            float sum = 0.0f;
#pragma unroll
            for (int i = 0; i < UNIT; i++) {
                sum += v[i];
                v[i] *= 1.0f / (1 << lift<BITS>(i));
            }
#pragma unroll
            for (int r = 0; r < ROWS; r++) {
                float dot = 0.0f;
#pragma unroll
                for (int i = 0; i < UNIT; i++) {
                    dot += v[i] * unpack<BITS>(w[r], i);
                }
                uint at = row_groups[r] + group;
                sums[r] += load(scales, at) * dot + load(biases, at) * sum;
            }
        } else {
#pragma unroll
            for (int r = 0; r < ROWS; r++) {
#pragma unroll
                for (int i = 0; i < UNIT; i++) {
                    sums[r] += v[i] * element<T>(w[r], i);
                }
            }
        }
    }
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
#pragma unroll
        for (int m = 1; m < LANES; m *= 2) {
            sums[r] += simd_shuffle_xor(sums[r], ushort(m));
        }
    }
}
"""
