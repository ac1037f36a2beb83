"""Functions that the kernels of draft.py call."""

from __future__ import annotations

from . import filters, fixed_point, noise, rows, shaping
from ._prelude import BINS

# Clusters that can be listed. Of more, all are looked at.
LISTED = 1024

_MASSES = """
// A mass of so many exp(high), in units of exp(top).
METAL_FUNC float scaled(float mass, float high, float top) {
    return high > -INFINITY ? mass * precise::exp(high - top) : 0.0f;
}

// Adds more times exp(level) to mass times exp(high).
METAL_FUNC void add_mass(
    thread float& high, thread float& mass, float level, float more) {
    float top = level > high ? level : high;
    mass = scaled(mass, high, top) + scaled(more, level, top);
    high = top;
}

// The mass of a threadgroup; every thread calls it and gets it.
template <int THREADS>
METAL_FUNC void find_mass(
    thread float& high, thread float& mass, threadgroup float* highs,
    threadgroup float* masses, uint simd_lid, uint simd_gid) {
    float top = simd_max(high);
    float sum = simd_sum(scaled(mass, high, top));
    if (simd_lid == 0) {
        highs[simd_gid] = top;
        masses[simd_gid] = sum;
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    float each = simd_lid < THREADS / 32 ? highs[simd_lid] : -INFINITY;
    sum = simd_lid < THREADS / 32 ? masses[simd_lid] : 0.0f;
    high = simd_max(each);
    mass = simd_sum(scaled(sum, each, high));
}

// The best value of a threadgroup and its place, the lowest of equals; every thread
// calls it and gets both. Between two calls there is a barrier.
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
}
"""

_FILTERS = (
    f"""
constexpr constant int COARSE = {filters.COARSE};
constexpr constant uint LISTED = {LISTED};
"""
    + """
METAL_FUNC ulong simd_total(ulong v) {
    for (ushort m = 16; m; m /= 2) {
        uint low = simd_shuffle_xor(uint(v), m);
        uint high = simd_shuffle_xor(uint(v >> 32), m);
        v += ulong(high) << 32 | low;
    }
    return v;
}

// Over so many lanes side by side, a power of two.
template <uint LANES>
METAL_FUNC float lanes_max(float v) {
    for (ushort m = LANES / 2; m; m /= 2) {
        float other = simd_shuffle_xor(v, m);
        v = other > v ? other : v;
    }
    return v;
}
template <uint LANES>
METAL_FUNC float lanes_sum(float v) {
    for (ushort m = LANES / 2; m; m /= 2) {
        v += simd_shuffle_xor(v, m);
    }
    return v;
}

// A mass in units of 2^-32 of the best token's.
METAL_FUNC ulong fixed_mass(float mass) {
    uint whole = uint(mass);
    return ulong(whole) << 32 | fixed_point((mass - float(whole)) * 4294967296.0f);
}

// That of the tail, from its mass as a float.
METAL_FUNC ulong tail_mass(float rest) {
    return exp2_negative(tail_levels(-precise::log(rest)), TAIL_BITS);
}

// A candidate's share of the mass in units of 2^-31.
METAL_FUNC uint share_of(uint levels, ulong inverse) {
    return uint((exp2_negative(levels, 0) * inverse) >> 32);
}

// Lists the clusters whose best is at most so far below the top and whose chance is not
// below the least: how many there are, of which at most LISTED are listed. Every thread
// calls it, none before all are done with the last list.
template <int THREADS, typename S>
METAL_FUNC uint list_blocks(
    S summary, size_t entries, uint n_entries, uint n_probes, float top, uint bound,
    float least, threadgroup uint* listed, threadgroup atomic_uint* count,
    uint lid, uint simd_lid, uint simd_gid) {
    if (lid == 0) {
        atomic_store_explicit(&count[0], 0u, memory_order_relaxed);
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    for (uint from = simd_gid * 32; from < n_probes; from += THREADS) {
        uint q = from + simd_lid;
        bool passes = false;
        if (q < n_probes) {
            float best = as_type<float>(summary[entries + q]);
            float chance = as_type<float>(summary[entries + 2 * n_entries + q]);
            passes = levels_below(top, best, LOG2E) <= bound && chance >= least;
        }
        uint at = simd_prefix_exclusive_sum(uint(passes));
        uint n = simd_sum(uint(passes));
        uint begin = 0;
        if (simd_lid == 0) {
            begin = atomic_fetch_add_explicit(&count[0], n, memory_order_relaxed);
        }
        at += simd_sum(begin);
        if (passes && at < LISTED) {
            listed[at] = q;
        }
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    return atomic_load_explicit(&count[0], memory_order_relaxed);
}

// Whether a token is one of n.
template <typename S>
METAL_FUNC bool is_one_of(S special, uint n, uint token) {
    for (uint i = 0; i < n; i++) {
        if (special[i] == token) {
            return true;
        }
    }
    return false;
}
"""
)

HEADER = (
    fixed_point.METAL
    + BINS
    + rows.METAL
    + shaping.METAL
    + noise.METAL
    + _MASSES
    + _FILTERS
)
