"""Which clusters to probe: the p best of C scores (arXiv 2603.14591, stage 1)."""

from functools import lru_cache

import mlx.core as mx

from . import backend
from ._prelude import BINS, LARGE_GROUP

# Scores become integer keys that grow from the best score to the worst. A radix
# select finds the p-th key, then every simdgroup writes the chosen of its own
# stretch of indices, ties in order of index until p are chosen.
_SOURCE = """
    constexpr int N = (C + THREADS - 1) / THREADS;
    uint tid = thread_position_in_threadgroup.x;
    uint lane = thread_index_in_simdgroup;
    uint group = simdgroup_index_in_threadgroup;
    uint row = threadgroup_position_in_grid.y;
    size_t base = size_t(row) * C;
    uint first = group * 32 * N + lane;
    uint n_probes = sizes[0];

    threadgroup atomic_uint bins[BINS];
    threadgroup uint sums[64];
    threadgroup uint bin_at[3];

    // The p-th smallest key, digit by digit. The keys before it are all chosen;
    // of those equal to it, as many as remain.
    uint cut = 0;
    uint remaining = n_probes;
    for (int digit = 0; digit < 3; digit++) {
        int shift = digit == 0 ? 21 : digit == 1 ? 10 : 0;
        int width = digit == 2 ? 10 : 11;
        clear_bins<THREADS>(bins, tid);
        threadgroup_barrier(mem_flags::mem_threadgroup);
#pragma unroll 4
        for (int j = 0; j < N; j++) {
            uint i = first + 32 * j;
            if (i < C) {
                uint key = score_key(scores, base + i, spread, i, SPREAD);
                if (digit == 0 || key >> (shift + width) == cut) {
                    uint bin = (key >> shift) & ((1u << width) - 1);
                    atomic_fetch_add_explicit(&bins[bin], 1u, memory_order_relaxed);
                }
            }
        }
        find_bin<THREADS>(bins, sums, bin_at, remaining, tid, lane, group);
        cut = cut << width | bin_at[0];
        remaining -= bin_at[1];
    }

    // How many keys below the cut, and equal to it, lie before this simdgroup's
    // stretch of indices.
    uint below = 0;
    uint equal = 0;
#pragma unroll 4
    for (int j = 0; j < N; j++) {
        uint i = first + 32 * j;
        if (i < C) {
            uint key = score_key(scores, base + i, spread, i, SPREAD);
            below += key < cut;
            equal += key == cut;
        }
    }
    below = simd_sum(below);
    equal = simd_sum(equal);
    if (lane == 0) {
        sums[group] = below;
        sums[32 + group] = equal;
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    below = simd_sum(lane < group ? sums[lane] : 0u);
    equal = simd_sum(lane < group ? sums[32 + lane] : 0u);

#pragma unroll 4
    for (int j = 0; j < N; j++) {
        uint i = first + 32 * j;
        uint key = ~0u;
        if (i < C) {
            key = score_key(scores, base + i, spread, i, SPREAD);
        }
        bool is_below = i < C && key < cut;
        bool is_equal = i < C && key == cut;
        uint below_here = below + simd_prefix_exclusive_sum(uint(is_below));
        uint equal_here = equal + simd_prefix_exclusive_sum(uint(is_equal));
        if (is_below || (is_equal && equal_here < remaining)) {
            uint at = below_here + min(equal_here, remaining);
            probes[size_t(row) * n_probes + at] = i;
        }
        below += simd_sum(uint(is_below));
        equal += simd_sum(uint(is_equal));
    }
"""

_HEADER = """
// 0 for the best score, growing towards the worst; NaN is the worst.
template <typename S, typename P>
inline uint score_key(S scores, size_t at, P spread, uint i, bool add) {
    float score = load(scores, at);
    if (add) {
        score = score + load(spread, i);
    }
    uint bits = as_type<uint>(score);
    if ((bits << 1) > 0xff000000u) {
        return ~0u;
    }
    bits = (bits << 1) == 0 ? 0 : bits;  // -0 equals 0
    return bits >> 31 ? bits : ~bits & 0x7fffffffu;
}
"""

_kernel = backend.Kernel(
    "select_probes",
    ["scores", "spread", "sizes"],
    ["probes"],
    _SOURCE,
    BINS + _HEADER,
)


def select_probes(
    scores: mx.array, n_probes: int, *, spread: mx.array | None = None
) -> mx.array:
    """The ``n_probes`` best clusters of each row, in ascending order of index.

    The choice is a pure function of the scores: ties go to the lower index, ``-0``
    equals ``0``, and NaN ranks below everything, ``-inf`` included.

    Args:
        scores (mx.array): Cluster scores ``[B, C]``, float16, bfloat16 or float32.
        n_probes (int): How many to choose, from 1 to C.
        spread (mx.array, optional): Added to the scores in float32, floating
          ``[C]``: by how much a cluster's best row exceeds its mean.

    Returns:
        mx.array: Cluster indices, uint32 ``[B, n_probes]``.

    Raises:
        ValueError: If ``scores`` is not two-dimensional, ``spread`` does not match,
          or ``n_probes`` is out of range.
    """
    if scores.ndim != 2:
        raise ValueError(f"scores must be [B, C], not {scores.shape}")
    n_clusters = scores.shape[1]
    if not 1 <= n_probes <= n_clusters:
        raise ValueError(f"n_probes must be from 1 to {n_clusters}, not {n_probes}")
    if spread is not None and spread.shape != (n_clusters,):
        raise ValueError(f"spread must be [{n_clusters}], not {spread.shape}")
    types = [scores.dtype] + ([] if spread is None else [spread.dtype])
    names = [str(t).split(".")[-1] for t in types]
    variant = f"select_probes({', '.join(names)}, C {n_clusters})"
    if backend.ready(variant, lambda: _check(n_clusters, *types)):
        return _launch(scores, n_probes, spread)
    return _reference(scores, n_probes, spread)


def _reference(scores: mx.array, n_probes: int, spread: mx.array | None) -> mx.array:
    """:func:`select_probes` in plain MLX."""
    B, C = scores.shape
    if n_probes == C:
        return mx.broadcast_to(mx.arange(C, dtype=mx.uint32), (B, C))
    scores = scores.astype(mx.float32)
    if spread is not None:
        scores = scores + spread.astype(mx.float32)
    bits = mx.where(scores == 0, 0, scores).view(mx.uint32)
    key = mx.where(bits >> 31, bits, ~bits & 0x7FFFFFFF)
    key = mx.where(mx.isnan(scores), mx.array(0xFFFFFFFF, mx.uint32), key)
    # The index in the low half makes all keys differ, and the order total.
    key = (key.astype(mx.uint64) << 32) | mx.arange(C, dtype=mx.uint64)
    best = mx.partition(key, kth=n_probes - 1, axis=-1)[:, :n_probes]
    return mx.sort(best.astype(mx.uint32), axis=-1)


@lru_cache
def _sizes(n_probes: int) -> mx.array:
    return mx.array([n_probes], dtype=mx.uint32)


def _launch(scores: mx.array, n_probes: int, spread: mx.array | None) -> mx.array:
    B, C = scores.shape
    threads = LARGE_GROUP if C > 2048 else 256
    return _kernel(
        [scores, scores if spread is None else spread, _sizes(n_probes)],
        template=[("C", C), ("THREADS", threads), ("SPREAD", spread is not None)],
        groups=(1, B),
        threads=threads,
        outputs=[((B, n_probes), mx.uint32)],
    )[0]


def _check(C: int, dtype: mx.Dtype, spread_dtype: mx.Dtype | None = None) -> None:
    scores = ((mx.arange(2 * C) * 37) % 101).reshape(2, C).astype(dtype) / 8 - 6
    scores[1, ::7] = -mx.inf
    scores[1, 3::11] = mx.nan
    spread = None
    if spread_dtype is not None:
        spread = (((mx.arange(C) * 13) % 17) / 4).astype(spread_dtype)
    for p in {1, -(-C // 16), C}:
        backend.expect_close(
            "select_probes", _launch(scores, p, spread), _reference(scores, p, spread)
        )
