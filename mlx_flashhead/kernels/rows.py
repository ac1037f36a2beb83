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

// Weight i of a little-endian stream of BITS-bit integers.
template <int BITS>
METAL_FUNC float unpack(thread const uint* words, int i) {
    int at = i * BITS / 32;
    int shift = i * BITS % 32;
    uint bits = words[at] >> shift;
    if (shift + BITS > 32) {
        bits |= words[at + 1] << (32 - shift);
    }
    return as_type<float>(0x4b000000u | (bits & (~0u >> (32 - BITS)))) - 8388608.0f;
}
"""
