"""The token among what was retrieved, chosen or drawn in one launch.

Gumbel noise makes the draw (see :mod:`mlx_flashhead.sampling.coupled`, which has it in
plain MLX for whatever the kernel does not do): among the log-masses of clusters, exact
where probed and estimated elsewhere, then among the rows of the one that wins. The
token is the draft of exact decoding and what approximate decoding gives. Filters cut by
integers (fixed_point.py), but noise and the masses of what is not probed are floats, so
back-ends may draw differently where two values are equal up to rounding.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import NamedTuple, cast

import mlx.core as mx
import numpy as np

from . import backend, filters, fixed_point
from ._prelude import BINS, LARGE_GROUP, SMALL_GROUP
from .probe_logits import _HEADER as _ROWS
from .probe_logits import _reference as _scores

# Of a float32, the bits that a dtype does not have.
_DROPPED = {mx.float32: 0, mx.float16: 13, mx.bfloat16: 16}

_HEADER = (
    f"constexpr constant int COARSE = {filters.COARSE};\n"
    + """
// Inclusive sum over the lanes.
METAL_FUNC ulong simd_scan(ulong v, uint simd_lid) {
    for (ushort d = 1; d < 32; d *= 2) {
        uint low = simd_shuffle_up(uint(v), d);
        uint high = simd_shuffle_up(uint(v >> 32), d);
        v += simd_lid >= d ? ulong(high) << 32 | low : 0;
    }
    return v;
}

// Word i of the size words of mx.random.bits with a key: Threefry 2x32 with 20 rounds
// (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011), which makes
// two words at once, half of the size apart.
METAL_FUNC uint random_word(uint key0, uint key1, uint i, uint size) {
    uint n = (size + 1) / 2;
    uint partner = i + n < size ? i + n : 0;
    uint keys[3] = {key0, key1, key0 ^ key1 ^ 0x1bd11bdau};
    const int rotations[8] = {13, 15, 26, 6, 17, 29, 16, 24};
    uint a = (i < n ? i : i - n) + keys[0];
    uint b = (i < n ? partner : i) + keys[1];
    for (uint round = 0; round < 20; round++) {
        int r = rotations[round % 8];
        a += b;
        b = (b << r | b >> (32 - r)) ^ a;
        if (round % 4 == 3) {
            uint block = round / 4 + 1;
            a += keys[block % 3];
            b += keys[(block + 1) % 3] + block;
        }
    }
    return i < n ? a : b;
}

// To the nearest of fewer bits, ties to even.
template <int DROPPED>
METAL_FUNC float rounded(float x) {
    if (DROPPED == 0) {
        return x;
    }
    uint bits = as_type<uint>(x);
    bits += ((1u << DROPPED) >> 1) - 1 + ((bits >> DROPPED) & 1);
    return as_type<float>(bits >> DROPPED << DROPPED);
}

// What the model makes of a logit of its head; -inf, which is padding, stays.
template <bool CAPPED>
METAL_FUNC float transformed(float x, float scale, float cap) {
    if (!(x > -INFINITY)) {
        return -INFINITY;
    }
    x = x * scale;
    return CAPPED ? cap * precise::tanh(x / cap) : x;
}

// A logit as the model rounds it.
template <int DROPPED, bool CAPPED, typename P>
METAL_FUNC float shaped(P logits, size_t i, float scale, float cap) {
    float value = rounded<DROPPED>(load(logits, i));
    return rounded<DROPPED>(transformed<CAPPED>(value, scale, cap));
}

// Number i of mx.random.gumbel((size,), key).
METAL_FUNC float gumbel(uint key0, uint key1, uint i, uint size) {
    float u = float(random_word(key0, key1, i, size)) / 4294967296.0f;
    u = u < 0.99999994f ? u : 0.99999994f;
    return -precise::log(-precise::log(u));
}
"""
)

_CHOICE = """
// The best value of a threadgroup and its place, the lowest of equals; every thread
// calls it and gets both.
template <int THREADS>
METAL_FUNC void find_best(
    thread float& best, thread uint& at, threadgroup float* bests,
    threadgroup uint* ats, uint simd_lid, uint simd_gid) {
    float top = simd_max(best);
    at = simd_min(best == top ? at : ~0u);
    if (simd_lid == 0) {
        bests[simd_gid] = top;
        ats[simd_gid] = at;
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    float mine = simd_lid < THREADS / 32 ? bests[simd_lid] : -INFINITY;
    uint place = simd_lid < THREADS / 32 ? ats[simd_lid] : ~0u;
    best = simd_max(mine);
    at = simd_min(mine == best ? place : ~0u);
    threadgroup_barrier(mem_flags::mem_threadgroup);
}
"""

_HEADER_ALL = fixed_point.METAL + BINS + _ROWS + _HEADER + _CHOICE

_GREEDY = """
    uint lid = thread_position_in_threadgroup.x;
    uint simd_lid = thread_index_in_simdgroup;
    uint simd_gid = simdgroup_index_in_threadgroup;
    uint row = threadgroup_position_in_grid.y;
    uint n_probes = probes_shape[1];
    uint n = n_probes * M;
    float scale = as_type<float>(settings[0]);
    float cap = as_type<float>(settings[1]);
    threadgroup float bests[32];
    threadgroup uint ats[32];

    // NaN never compares, so it never wins.
    float best = -INFINITY;
    uint token = ~0u;
    for (uint i = lid; i < n; i += THREADS) {
        float value = shaped<DROPPED, CAPPED>(
            logits, size_t(row) * n + i, scale, cap);
        if (value >= best) {
            size_t cluster = probes[size_t(row) * n_probes + i / M];
            uint other = token_ids[cluster * M + i % M];
            token = value > best || other < token ? other : token;
            best = value;
        }
    }
    find_best<THREADS>(best, token, bests, ats, simd_lid, simd_gid);
    if (lid == 0) {
        tokens[row] = token;
    }
"""

_SAMPLED = """
    constexpr int SIMDGROUPS = THREADS / 32;
    uint lid = thread_position_in_threadgroup.x;
    uint simd_lid = thread_index_in_simdgroup;
    uint simd_gid = simdgroup_index_in_threadgroup;
    uint row = threadgroup_position_in_grid.y;
    uint P = probes_shape[1];
    size_t base = size_t(row) * P * M;
    float temperature = as_type<float>(settings[0]);
    float scale = as_type<float>(settings[1]);
    float cap = as_type<float>(settings[2]);
    uint limit = settings[3];

    threadgroup atomic_uint bins[TOP_P || TOP_K ? BINS : 1];
    threadgroup atomic_uint probed[(C + 31) / 32];
    threadgroup uint sums[32];
    threadgroup uint bin_at[3];
    threadgroup float bests[32];
    threadgroup uint ats[32];
    threadgroup ulong totals[32];
    threadgroup ulong inverse[1];
    threadgroup uint words[4];
    threadgroup float scored[M];

    if (lid < 4) {
        words[lid] = random_word(keys[2 * row], keys[2 * row + 1], lid, 6);
    }
    for (uint i = lid; i < (C + 31) / 32; i += THREADS) {
        atomic_store_explicit(&probed[i], 0u, memory_order_relaxed);
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    for (uint q = lid; q < P; q += THREADS) {
        uint c = probes[size_t(row) * P + q];
        atomic_fetch_or_explicit(
            &probed[c / 32], 1u << (c % 32), memory_order_relaxed);
    }
    float top = -INFINITY;
    for (uint i = lid; i < P * M; i += THREADS) {
        float value = shaped<DROPPED, CAPPED>(logits, base + i, scale, cap);
        top = value > top ? value : top;
    }
    top = simd_max(top);
    if (simd_lid == 0) {
        bests[simd_gid] = top;
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    top = simd_max(simd_lid < SIMDGROUPS ? bests[simd_lid] : -INFINITY);
    threadgroup_barrier(mem_flags::mem_threadgroup);

    // How far from the top a candidate may be: min-p, then top-p and top-k.
    bool tail_kept = TAIL && limit == ~0u && !TOP_K;
    if (TOP_P) {
        ulong sum = 0;
        for (uint i = lid; i < P * M; i += THREADS) {
            float value = shaped<DROPPED, CAPPED>(logits, base + i, scale, cap);
            sum += exp2_negative(levels_below(top, value, LOG2E), 0);
        }
        sum = simd_scan(sum, simd_lid);
        // The mass of what is not probed, relative to the best token's.
        float rest = 0.0f;
        if (TAIL_COUNTS) {
            for (uint c = lid; c < C; c += THREADS) {
                uint word = atomic_load_explicit(&probed[c / 32], memory_order_relaxed);
                if (!(word >> (c % 32) & 1)) {
                    float mass = transformed<CAPPED>(
                        load(centroid_logits, size_t(row) * C + c), scale, cap);
                    mass = mass + load(at_one, c) - top;
                    rest += precise::exp(mass < 60.0f ? mass : 60.0f);
                }
            }
            rest = simd_sum(rest);
        }
        if (simd_lid == 31) {
            totals[simd_gid] = sum;
            bests[simd_gid] = rest;
        }
        threadgroup_barrier(mem_flags::mem_threadgroup);
        if (simd_gid == 0) {
            sum = simd_lid < SIMDGROUPS ? totals[simd_lid] : ulong(0);
            sum = simd_scan(sum, simd_lid);
            rest = simd_sum(simd_lid < SIMDGROUPS ? bests[simd_lid] : 0.0f);
            if (simd_lid == 31) {
                if (TAIL_COUNTS) {
                    sum += exp2_negative(tail_levels(-precise::log(rest)), TAIL_BITS);
                }
                inverse[0] = (ulong(1) << 63) / sum;
            }
        }
    }
    for (int rule = 0; rule < 2; rule++) {
        if (rule == 0 ? !TOP_P : !TOP_K) {
            continue;
        }
        uint cut = 0;
        uint remaining = settings[4 + rule];
        for (int digit = 0; digit < 2; digit++) {
            clear_bins<THREADS>(bins, lid);
            threadgroup_barrier(mem_flags::mem_threadgroup);
            for (uint i = lid; i < P * M; i += THREADS) {
                float value = shaped<DROPPED, CAPPED>(logits, base + i, scale, cap);
                uint levels = levels_below(top, value, LOG2E);
                uint far = levels >> COARSE;
                // A candidate counts its share of the mass, in units of 2^-31, for
                // top-p and itself for top-k.
                uint count = 1;
                if (rule == 0) {
                    count = uint((exp2_negative(levels, 0) * inverse[0]) >> 32);
                }
                if (count > 0 && (digit == 0 || far >> 11 == cut)) {
                    uint bin = digit == 0 ? far >> 11 : far & 2047;
                    atomic_fetch_add_explicit(&bins[bin], count, memory_order_relaxed);
                }
            }
            find_bin<THREADS>(bins, sums, bin_at, remaining, lid, simd_lid, simd_gid);
            cut = cut << 11 | bin_at[0];
            remaining -= bin_at[1];
            tail_kept = tail_kept && bin_at[2] == 0;
        }
        limit = min(limit, cut << COARSE | ((1u << COARSE) - 1));
    }

    // The cluster: a thread has one that is probed, or many that are not.
    float best = -INFINITY;
    uint cluster = ~0u;
    for (uint q = lid; q < P; q += THREADS) {
        float high = -INFINITY;
        for (uint r = 0; r < M; r++) {
            float value = shaped<DROPPED, CAPPED>(
                logits, base + q * M + r, scale, cap);
            bool kept = levels_below(top, value, LOG2E) <= limit;
            high = kept && value > high ? value : high;
        }
        float mass = 0.0f;
        for (uint r = 0; r < M; r++) {
            float value = shaped<DROPPED, CAPPED>(
                logits, base + q * M + r, scale, cap);
            bool kept = levels_below(top, value, LOG2E) <= limit;
            float share = precise::exp((value - high) / temperature);
            mass += kept && high > -INFINITY ? share : 0.0f;
        }
        uint c = probes[size_t(row) * P + q];
        float value = high / temperature + precise::log(mass)
            + gumbel(words[0], words[1], c, C);
        if (value > best || (value == best && c < cluster)) {
            best = value;
            cluster = c;
        }
    }
    if (tail_kept) {
        for (uint c = lid; c < C; c += THREADS) {
            uint word = atomic_load_explicit(&probed[c / 32], memory_order_relaxed);
            if (!(word >> (c % 32) & 1)) {
                float value = transformed<CAPPED>(
                    load(centroid_logits, size_t(row) * C + c), scale, cap);
                value = value / temperature + load(heated, c)
                    + gumbel(words[0], words[1], c, C);
                if (value > best || (value == best && c < cluster)) {
                    best = value;
                    cluster = c;
                }
            }
        }
    }
    find_best<THREADS>(best, cluster, bests, ats, simd_lid, simd_gid);
    cluster = cluster < C ? cluster : 0;
    uint q = ~0u;
    for (uint i = lid; i < P; i += THREADS) {
        q = probes[size_t(row) * P + i] == cluster && i < q ? i : q;
    }
    q = simd_min(q);
    if (simd_lid == 0) {
        ats[simd_gid] = q;
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    q = simd_min(simd_lid < SIMDGROUPS ? ats[simd_lid] : ~0u);

    // Its logits: those that there are, or those of the rows, scored here.
    if (TAIL && q == ~0u) {
        constexpr int UNIT = unit_size(BITS);
        constexpr int WORDS = UNIT * BITS / 32;
        constexpr int UNITS = D / UNIT;
        const device uint* from = (const device uint*)weight;
        const device uint* x_words = (const device uint*)(x + size_t(row) * D);
        for (uint r = simd_gid; r < M; r += SIMDGROUPS) {
            uint at = cluster * M + r;
            bool real = at < settings[6];
            at = real ? at : 0;
            float sum = 0.0f;
            for (uint unit = simd_lid; unit < UNITS; unit += 32) {
                float v[UNIT];
                uint w[WORDS];
                load_floats<T, UNIT>(x_words, unit, v);
                load_words<WORDS>(from + (size_t(at) * UNITS + unit) * WORDS, w);
                float dot = 0.0f;
                float all = 0.0f;
#pragma unroll
                for (int i = 0; i < UNIT; i++) {
                    dot += v[i] * (QUANTIZED ? unpack<BITS>(w, i) : element<T>(w, i));
                    all += v[i];
                }
                if (QUANTIZED) {
                    size_t g = size_t(at) * (D / GROUP_SIZE) + unit * UNIT / GROUP_SIZE;
                    dot = load(scales, g) * dot + load(biases, g) * all;
                }
                sum += dot;
            }
            sum = simd_sum(sum);
            if (simd_lid == 0) {
                scored[r] = real ? transformed<CAPPED>(sum, scale, cap) : -INFINITY;
            }
        }
    } else {
        for (uint r = lid; r < M; r += THREADS) {
            float value = shaped<DROPPED, CAPPED>(
                logits, base + q * M + r, scale, cap);
            bool kept = levels_below(top, value, LOG2E) <= limit;
            scored[r] = kept ? value : -INFINITY;
        }
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    best = -INFINITY;
    uint chosen = ~0u;
    for (uint r = lid; r < M; r += THREADS) {
        float value = scored[r] / temperature + gumbel(words[2], words[3], r, M);
        if (value > best) {
            best = value;
            chosen = r;
        }
    }
    find_best<THREADS>(best, chosen, bests, ats, simd_lid, simd_gid);
    if (lid == 0) {
        tokens[row] = token_ids[size_t(cluster) * M + (chosen < M ? chosen : 0)];
    }
"""


_NAMES = ["logits", "probes", "token_ids", "settings"]

_greedy = backend.Kernel("draft_greedy", _NAMES, ["tokens"], _GREEDY, _HEADER_ALL)
_sampled = backend.Kernel(
    "draft_sampled",
    [
        *(*_NAMES, "keys", "centroid_logits", "heated", "at_one"),
        *("x", "weight", "scales", "biases"),
    ],
    ["tokens"],
    _SAMPLED,
    _HEADER_ALL,
)


class Noise(NamedTuple):
    """Noise of k positions, float32: Gumbel numbers of clusters ``[k, C]`` and of a
    cluster's rows ``[k, m]``, and uniform ones ``[k]``."""

    clusters: mx.array
    rows: mx.array
    coins: mx.array

    @classmethod
    def make(cls, n_clusters: int, cluster_size: int, keys: mx.array) -> Noise:
        """The noise of keys, uint32 ``[k, 2]``: that of each depends on it alone."""

        def of_one(key: mx.array) -> tuple[mx.array, ...]:
            parts = mx.random.split(key, 3)
            return (
                mx.random.gumbel((n_clusters,), key=parts[0]),
                mx.random.gumbel((cluster_size,), key=parts[1]),
                mx.random.uniform(key=parts[2]),
            )

        # One generation for all keys, where one for each would be as many launches.
        return cls(*mx.vmap(of_one)(keys))


@dataclass(frozen=True)
class Shaping:
    """What becomes of a logit of the head before the model chooses.

    Attributes:
        rounding: The dtype that the model computes its logits in.
        scale: Factor of the logits.
        softcap: What bounds them afterwards, ``None`` for nothing.
    """

    rounding: mx.Dtype = mx.float32
    scale: float = 1.0
    softcap: float | None = None

    def transformed(self, logits: mx.array) -> mx.array:
        """The model's logits, of float32 ones; ``-inf``, which is padding, stays."""
        x = logits * self.scale
        if self.softcap is not None:
            x = self.softcap * mx.tanh(x / self.softcap)
        return mx.where(logits > -mx.inf, x, -mx.inf)

    def __call__(self, logits: mx.array) -> mx.array:
        """The model's logits as it rounds them, float32."""
        rounded = self.transformed(_rounded(logits, self.rounding))
        return _rounded(rounded, self.rounding)

    @property
    def words(self) -> list[int]:
        """Scale and cap for a kernel."""
        return [_bits(self.scale), _bits(self.softcap or 0.0)]

    @property
    def template(self) -> backend.Template:
        """The same that is known when a kernel is compiled."""
        return [
            ("DROPPED", _DROPPED[self.rounding]),
            ("CAPPED", self.softcap is not None),
        ]


class Rows(NamedTuple):
    """Hidden states ``[B, D]`` and the table of rows ``[C, m, ...]`` that a kernel
    scores, as :func:`mlx_flashhead.kernels.probe_logits` takes them."""

    x: mx.array
    weight: mx.array
    scales: mx.array | None
    biases: mx.array | None
    bits: int
    group_size: int
    n_rows: int


class Tail(NamedTuple):
    """What is known of clusters that are not probed.

    Attributes:
        centroid_logits: Logit of each centroid, ``[B, C]``, floating.
        heated: What turns such a logit, the model's, over the temperature into the
            cluster's log-mass there, float32 ``[C]``.
        at_one: The same at temperature 1, for filters.
        score: Exact logits ``[B, 1, m]`` of the rows of clusters ``[B, 1]``.
        rows: The table that these come from; ``None`` where a kernel cannot read it.
        empty: Whether there are none.
    """

    centroid_logits: mx.array
    heated: mx.array
    at_one: mx.array
    score: Callable[[mx.array], mx.array]
    rows: Rows | None
    empty: bool = False


@dataclass(frozen=True)
class Law:
    """How a draft is drawn.

    Attributes:
        temperature: Above 0.
        rules: The filters; ``None`` for none.
        xtc_probability: How often XTC drops the likeliest.
    """

    temperature: float = 1.0
    rules: filters.Rules | None = None
    xtc_probability: float = 0.0

    @property
    def drops_tail(self) -> bool:
        """Whether only probed tokens can come."""
        return self.rules is not None and (self.rules.top_k > 0 or self.rules.min_p > 0)

    @property
    def has_kernel(self) -> bool:
        """Whether the kernel has these filters."""
        few = self.rules is None or self.rules.min_tokens_to_keep == 1
        return few and self.xtc_probability == 0


def draft_greedy(
    logits: mx.array, probes: mx.array, token_ids: mx.array, shaping: Shaping
) -> mx.array:
    """The probed token with the largest logit as the model rounds it; of equals, the
    one of the lowest id.

    Args:
        logits: Exact logits of the head, float32 ``[B, p * m]``; ``-inf`` for padding.
        probes: Probed clusters, uint32 ``[B, p]``. One may stand there again, its
            logits then ``-inf``.
        token_ids: Token of each row, uint32 ``[C, m]``.
        shaping: What the model makes of logits.

    Returns:
        mx.array: Tokens, uint32 ``[B]``.
    """
    if not len(logits):
        return mx.zeros((0,), dtype=mx.uint32)
    m = token_ids.shape[1]
    most = _most(None, logits.shape[1], len(token_ids))
    dtype = str(shaping.rounding).split(".")[-1]
    capped = "capped, " * (shaping.softcap is not None)
    variant = f"draft_greedy({dtype}, {capped}m {m}, up to {most} threads)"
    check = partial(_check_greedy, m, shaping)
    threads = backend.largest_group(variant, most, check)
    if threads:
        return _launch_greedy(logits, probes, token_ids, shaping, threads)
    return _reference_greedy(logits, probes, token_ids, shaping)


def _reference_greedy(
    logits: mx.array, probes: mx.array, token_ids: mx.array, shaping: Shaping
) -> mx.array:
    """:func:`draft_greedy` in plain MLX."""
    ids = token_ids[probes].reshape(logits.shape)
    return lowest(shaping(logits), ids)


def lowest(logits: mx.array, ids: mx.array) -> mx.array:
    """The lowest of the ids, ``[n]`` or ``[k, n]``, with the largest of ``logits [k,
    n]``, uint32 ``[k]``."""
    best = logits == logits.max(axis=-1, keepdims=True)
    none = mx.array(0xFFFFFFFF, mx.uint32)
    return mx.where(best, ids.astype(mx.uint32), none).min(axis=-1)


def draft_sampled(
    logits: mx.array,
    probes: mx.array,
    token_ids: mx.array,
    shaping: Shaping,
    keys: mx.array,
    law: Law,
    tail: Tail,
    exempt: mx.array | None = None,
) -> mx.array:
    """The token that the noise of a key draws, by what is known of the clusters.

    Args:
        logits, probes, token_ids, shaping: As for :func:`draft_greedy`.
        keys: Key of each row's noise, uint32 ``[B, 2]``.
        law: How to draw.
        tail: What is known of clusters that are not probed.
        exempt: Candidates that XTC never drops, bool ``[B, p * m]``.

    Returns:
        mx.array: Tokens, uint32 ``[B]``.
    """
    if not len(logits):
        return mx.zeros((0,), dtype=mx.uint32)
    m = token_ids.shape[1]
    most = _most(law, logits.shape[1], len(token_ids))
    if law.has_kernel and tail.rows is not None:
        options = _options(law, logits.shape[1], tail)
        names = [str(shaping.rounding), str(tail.centroid_logits.dtype)]
        names += [n for n, on in options.items() if on]
        names += [f"{len(token_ids)} clusters of {m}"]
        if options["TAIL"]:
            rows = tail.rows
            kind = rows.scales.dtype if rows.scales is not None else rows.x.dtype
            names.append(f"{rows.bits} bits of {rows.x.shape[1]}, {kind}")
            names.append(f"groups of {rows.group_size}, {rows.x.dtype}")
        names.append(f"up to {most} threads")
        variant = f"draft_sampled({', '.join(names)})".replace("mlx.core.", "")
        check = partial(_check_sampled, m, shaping, law, tail)
        threads = backend.largest_group(variant, most, check)
        if threads:
            return _launch_sampled(
                logits, probes, token_ids, shaping, keys, law, tail, threads
            )
    return _reference(logits, probes, token_ids, shaping, keys, law, tail, exempt)


def _reference(
    logits: mx.array,
    probes: mx.array,
    token_ids: mx.array,
    shaping: Shaping,
    keys: mx.array,
    law: Law,
    tail: Tail,
    exempt: mx.array | None = None,
) -> mx.array:
    """:func:`draft_sampled` in plain MLX."""
    b, p = probes.shape
    n_clusters, m = token_ids.shape
    temperature = law.temperature
    noise = Noise.make(n_clusters, m, keys)
    values = shaping(logits)
    of_centroids = shaping.transformed(tail.centroid_logits.astype(mx.float32))
    every = of_centroids / temperature + tail.heated
    if law.rules is not None:
        at_one = mx.put_along_axis(
            of_centroids + tail.at_one, probes, mx.array(-mx.inf), axis=1
        )
        rest = mx.logsumexp(at_one, axis=-1)
        q = law.xtc_probability
        drops = noise.coins <= q if q > 0 else None
        values, tail_kept = filters.filtered(values, law.rules, rest, drops, exempt)
        every = mx.where(tail_kept[:, None], every, -mx.inf)
    if law.drops_tail or tail.empty:
        every = mx.full(every.shape, -mx.inf)
    heated = values.reshape(b, p, m) / temperature
    # A cluster may stand twice, but then its rows count once.
    every = mx.put_along_axis(every, probes, mx.array(-mx.inf), axis=1)
    every = every.at[mx.arange(b)[:, None], probes].maximum(
        mx.logsumexp(heated, axis=-1)
    )
    cluster = mx.argmax(every + noise.clusters, axis=-1)
    of_cluster = probes == cluster[:, None]
    rows = mx.where(of_cluster[..., None], heated, -mx.inf).max(axis=1)
    if not (law.drops_tail or tail.empty):
        # The winner may be a cluster that was not probed: its rows are scored as well.
        scored = tail.score(cluster[:, None].astype(mx.uint32))[:, 0]
        scored = shaping.transformed(scored) / temperature
        rows = mx.where(of_cluster.any(axis=-1, keepdims=True), rows, scored)
    return token_ids[cluster, mx.argmax(rows + noise.rows, axis=-1)]


def _rounded(x: mx.array, dtype: mx.Dtype) -> mx.array:
    return x if dtype == mx.float32 else x.astype(dtype).astype(mx.float32)


def _bits(x: float) -> int:
    return int(np.float32(x).view(np.uint32))


def _most(law: Law | None, n_candidates: int, n_clusters: int) -> int:
    """Threads of a group that takes so much; ``None`` is the greedy choice."""
    if law is None:
        return LARGE_GROUP if n_candidates > 4096 else SMALL_GROUP
    return LARGE_GROUP if max(n_candidates, n_clusters) > 2048 else SMALL_GROUP


def _options(law: Law, n_candidates: int, tail: Tail) -> dict[str, bool]:
    rules = law.rules or filters.Rules()
    return {
        "TOP_P": rules.top_p < 1,
        "TOP_K": 0 < rules.top_k < n_candidates,
        "TAIL": not (law.drops_tail or tail.empty),
        "TAIL_COUNTS": rules.top_p < 1 and not tail.empty,
    }


@lru_cache(maxsize=256)
def _settings(words: tuple[int, ...]) -> mx.array:
    # Fewer than 8 words are no device buffer in Metal.
    return mx.array([*words, *([0] * (8 - len(words)))], dtype=mx.uint32)


def _launch_greedy(
    logits: mx.array,
    probes: mx.array,
    token_ids: mx.array,
    shaping: Shaping,
    threads: int,
) -> mx.array:
    return _greedy(
        [logits, probes, token_ids, _settings(tuple(shaping.words))],
        template=[("M", token_ids.shape[1]), *shaping.template],
        groups=(1, len(logits)),
        threads=threads,
        outputs=[((len(logits),), mx.uint32)],
    )[0]


def _launch_sampled(
    logits: mx.array,
    probes: mx.array,
    token_ids: mx.array,
    shaping: Shaping,
    keys: mx.array,
    law: Law,
    tail: Tail,
    threads: int,
) -> mx.array:
    rules, rows = law.rules or filters.Rules(), tail.rows
    assert rows is not None  # or there is no kernel
    options = _options(law, logits.shape[1], tail)
    words = [_bits(law.temperature), *shaping.words, rules.limit, rules.share]
    words += [rules.top_k, rows.n_rows]
    return _sampled(
        [
            *(logits, probes, token_ids, _settings(tuple(words)), keys),
            *(tail.centroid_logits, tail.heated, tail.at_one),
            *(rows.x, rows.weight),
            rows.x if rows.scales is None else rows.scales,
            rows.x if rows.biases is None else rows.biases,
        ],
        template=[
            ("T", rows.x.dtype),
            ("C", len(token_ids)),
            ("M", token_ids.shape[1]),
            ("D", rows.x.shape[1]),
            ("BITS", rows.bits),
            ("GROUP_SIZE", rows.group_size),
            ("QUANTIZED", rows.scales is not None),
            *shaping.template,
            *options.items(),
        ],
        groups=(1, len(logits)),
        threads=threads,
        outputs=[((len(logits),), mx.uint32)],
    )[0]


class Case(NamedTuple):
    """Inputs of a launch: how a draft is drawn, ``None`` for the best; how many rows a
    cluster has, how many clusters are probed and how many there are; the size of hidden
    states; bits (0: not quantized) and group size of the table; dtypes of states and
    scales; to what logits are rounded, and their cap."""

    law: Law | None
    m: int
    p: int
    C: int
    D: int = 64
    bits: int = 8
    group_size: int = 64
    dtype: mx.Dtype = mx.float32
    scales: mx.Dtype | None = None
    rounding: mx.Dtype = mx.float32
    softcap: float | None = None


_F16, _BF16, _F32 = mx.float16, mx.bfloat16, mx.float32
_LAWS = (
    Law(0.8),
    Law(0.7, filters.Rules(top_p=0.9)),
    Law(1.1, filters.Rules(min_p=0.05)),
    Law(0.9, filters.Rules(top_k=7)),
    Law(0.9, filters.Rules(top_p=0.97, min_p=0.01, top_k=60)),
)
# What tests, the doctor and the check on a GPU run.
CASES = (
    Case(None, 16, 5, 9),
    Case(None, 16, 40, 50, rounding=_BF16),
    Case(None, 7, 33, 60, rounding=_F16, softcap=30.0),
    Case(None, 16, 300, 400, rounding=_BF16, softcap=30.0),
    *(
        table._replace(law=law)
        for law in _LAWS
        for table in (
            Case(None, 16, 6, 25),
            Case(None, 16, 20, 40, 96, 8, 32, _BF16, _F16),
            Case(None, 5, 12, 33, 640, 4, 64, _BF16, _BF16, _BF16, 30.0),
            Case(None, 16, 9, 9, 64, 6, 64, _F16, _F16, _F16),
            Case(None, 16, 130, 400, 64, 0, 32, _BF16, None, _BF16),
        )
    ),
)


def largest(case: Case) -> int:
    """Threads per threadgroup, if so many fit."""
    return _most(case.law, case.p * case.m, case.C)


def check(case: Case, threads: int) -> None:
    """Raise unless the kernel matches its reference in this case."""
    shaping = Shaping(case.rounding, 1.0, case.softcap)
    if case.law is None:
        _check_greedy(case.m, shaping, threads, (case.p, case.C))
        return
    x, centroid_logits = mx.zeros((1, case.D), case.dtype), mx.zeros((1, 1), case.dtype)
    scales = mx.zeros((1,), case.scales or case.dtype) if case.bits else None
    bits = case.bits or 8 * case.dtype.size
    rows = Rows(x, x, scales, scales, bits, case.group_size, case.C * case.m)
    like = Tail(
        centroid_logits, x, x, lambda clusters: clusters, rows, case.p == case.C
    )
    _check_sampled(case.m, shaping, case.law, like, threads, (case.p, case.C))


def _check_greedy(
    m: int, shaping: Shaping, threads: int, sizes: tuple[int, int] | None = None
) -> None:
    p, c = sizes or (-(-1200 // m), -(-2000 // m))
    logits = ((mx.arange(2 * p * m) * 37) % 211).reshape(2, p * m) / 24 - 4
    logits[1, -1] = -mx.inf
    probes = mx.broadcast_to(mx.arange(p, dtype=mx.uint32), (2, p))
    ids = (mx.arange(c * m, dtype=mx.uint32) * 7919) % 10_007
    args = (logits, probes, ids.reshape(c, m), shaping)
    got, want = _launch_greedy(*args, threads), _reference_greedy(*args)
    backend.expect_close("draft_greedy", got, want)


def _check_sampled(
    m: int,
    shaping: Shaping,
    law: Law,
    tail: Tail,
    threads: int,
    sizes: tuple[int, int] | None = None,
) -> None:
    """Draws of 64 keys. Rounding may move a few: noise that two clusters share to all
    digits does not happen, but the edge of a filter may lie on a token."""
    p, c = sizes or ((97, 97) if tail.empty else (40, 97))
    rows = tail.rows
    assert rows is not None  # or there is no kernel
    b, d = 64, rows.x.shape[1]
    key = mx.random.key(0)
    logits = mx.random.normal((b, p * m), key=key) * 2
    probes = mx.sort(mx.argsort(mx.random.uniform(shape=(b, c), key=key))[:, :p])
    ids = mx.arange(c * m, dtype=mx.uint32).reshape(c, m)
    x = mx.random.normal((b, d), key=key).astype(rows.x.dtype)
    dense = mx.random.normal((c, m, d), key=key) / d**0.5
    weight, scales, biases = dense.astype(rows.x.dtype), None, None
    if rows.scales is not None:
        weight, scales, biases = mx.quantize(
            dense.astype(rows.scales.dtype), group_size=rows.group_size, bits=rows.bits
        )

    def score(clusters: mx.array) -> mx.array:
        form = (rows.group_size, rows.bits, c * m)
        y = _scores(x, weight, scales, biases, clusters, *form, exact=True)
        return y.reshape(b, 1, m)

    other = Tail(
        mx.random.normal((b, c), key=key).astype(tail.centroid_logits.dtype),
        mx.random.uniform(shape=(c,), key=key),
        mx.random.uniform(shape=(c,), key=key),
        score,
        Rows(x, weight, scales, biases, rows.bits, rows.group_size, c * m),
        tail.empty,
    )
    keys = mx.random.split(key, b)
    args = (logits, probes, ids, shaping, keys, law, other)
    got, want = _launch_sampled(*args, threads), _reference(*args)
    if cast(int, (got == want).sum().item()) < b - 2:
        raise AssertionError("draft_sampled differs from the plain reference")
