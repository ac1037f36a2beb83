"""Which clusters to probe: the p best of C scores (arXiv 2603.14591, stage 1)."""

from functools import partial
from typing import NamedTuple

import mlx.core as mx

from . import backend
from ._prelude import BINS, LARGE_GROUP, SMALL_GROUP

# Scores become integer keys that grow from the best score to the worst. A radix
# select finds the p-th key, then every simdgroup writes the chosen of its own
# stretch of indices, ties in order of index until p are chosen. Where a thread has
# few keys it keeps them in registers, else it makes them again in each pass.
_SOURCE = """
    constexpr int N = (C + THREADS - 1) / THREADS;
    static_assert(THREADS % 32 == 0 && THREADS <= 1024, "whole simdgroups, at most 32");
    uint lid = thread_position_in_threadgroup.x;
    uint simd_lid = thread_index_in_simdgroup;
    uint simd_gid = simdgroup_index_in_threadgroup;
    uint row = threadgroup_position_in_grid.y;
    size_t base = size_t(row) * C;
    uint first = simd_gid * 32 * N + simd_lid;
    uint n_probes = sizes[0];

    threadgroup atomic_uint bins[BINS];
    threadgroup uint sums[64];
    threadgroup uint bin_at[3];

    // Each thread's best key: the p-th of all is not beyond the worst of p of those.
    uint keys[KEPT ? N : 1];
    uint bound = ~0u;
    if (KEPT) {
UNROLL
        for (int j = 0; j < N; j++) {
            uint i = first + 32 * j;
            keys[j] = i < C ? score_key(scores, base + i, spread, i, SPREAD) : ~0u;
            bound = min(bound, keys[j]);
        }
        bound = simd_min(~bound);
        if (simd_lid == 0) {
            sums[simd_gid] = bound;
        }
        threadgroup_barrier(mem_flags::mem_threadgroup);
        bound = ~simd_min(simd_lid < THREADS / 32 ? sums[simd_lid] : ~0u);
        bound = n_probes <= THREADS ? bound : ~0u;
    }

    // The p-th smallest key, digit by digit. The keys before it are all chosen;
    // of those equal to it, as many as remain.
    uint cut = 0;
    uint remaining = n_probes;
    for (int digit = 0; digit < 3; digit++) {
        int shift = digit == 0 ? 21 : digit == 1 ? 10 : 0;
        int width = digit == 2 ? 10 : 11;
        clear_bins<THREADS>(bins, lid);
        threadgroup_barrier(mem_flags::mem_threadgroup);
UNROLL
        for (int j = 0; j < N; j++) {
            uint i = first + 32 * j;
            if (i < C) {
                uint key = KEPT ? keys[j]
                    : score_key(scores, base + i, spread, i, SPREAD);
                if (key <= bound && (digit == 0 || key >> (shift + width) == cut)) {
                    uint bin = (key >> shift) & ((1u << width) - 1);
                    atomic_fetch_add_explicit(&bins[bin], 1u, memory_order_relaxed);
                }
            }
        }
        find_bin<THREADS>(bins, sums, bin_at, remaining, lid, simd_lid, simd_gid);
        cut = cut << width | bin_at[0];
        remaining -= bin_at[1];
    }

    // How many keys below the cut, and equal to it, lie before this simdgroup's
    // stretch of indices.
    uint below = 0;
    uint equal = 0;
UNROLL
    for (int j = 0; j < N; j++) {
        uint i = first + 32 * j;
        if (i < C) {
            uint key = KEPT ? keys[j] : score_key(scores, base + i, spread, i, SPREAD);
            below += key < cut;
            equal += key == cut;
        }
    }
    below = simd_sum(below);
    equal = simd_sum(equal);
    if (simd_lid == 0) {
        sums[simd_gid] = below;
        sums[32 + simd_gid] = equal;
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    below = simd_sum(simd_lid < simd_gid ? sums[simd_lid] : 0u);
    equal = simd_sum(simd_lid < simd_gid ? sums[32 + simd_lid] : 0u);

    uint before = (1u << simd_lid) - 1;  // the lanes before this
UNROLL
    for (int j = 0; j < N; j++) {
        uint i = first + 32 * j;
        uint key = ~0u;
        if (i < C) {
            key = KEPT ? keys[j] : score_key(scores, base + i, spread, i, SPREAD);
        }
        bool is_below = i < C && key < cut;
        bool is_equal = i < C && key == cut;
        // A bit for each lane.
        uint all_below = simd_sum(uint(is_below) << simd_lid);
        uint all_equal = simd_sum(uint(is_equal) << simd_lid);
        uint below_here = below + popcount(all_below & before);
        uint equal_here = equal + popcount(all_equal & before);
        if (is_below || (is_equal && equal_here < remaining)) {
            uint at = below_here + min(equal_here, remaining);
            probes[size_t(row) * n_probes + at] = i;
        }
        below += popcount(all_below);
        equal += popcount(all_equal);
    }
"""

_HEADER = """
// 0 for the best score, growing towards the worst; NaN is the worst.
template <typename S, typename P>
METAL_FUNC uint score_key(S scores, size_t at, P spread, uint i, bool add) {
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

# Keys of a thread that are kept in registers at most: there are 64 for each of 1,024
# threads on NVIDIA's GPUs. What indexes registers has to be unrolled.
IN_REGISTERS = 16

_kept, _read_again = (
    backend.Kernel(
        name,
        ["scores", "spread", "sizes"],
        ["probes"],
        _SOURCE,
        BINS + _HEADER + f'#define UNROLL _Pragma("{unroll}")\n',
    )
    for name, unroll in (
        ("select_probes_kept", "unroll"),
        ("select_probes", "unroll 4"),
    )
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
    if not len(scores):
        return mx.zeros((0, n_probes), dtype=mx.uint32)
    of_spread = None if spread is None else spread.dtype
    code = Case(n_clusters, n_probes, scores.dtype, of_spread)
    added = "" if spread is None else f" + {backend.short(spread.dtype)}"
    form = f"{backend.short(scores.dtype)}{added}, C {n_clusters}"
    most = largest(code)
    if n_clusters <= IN_REGISTERS * most:
        kept = code._replace(kept=True)
        variant = f"select_probes({form}, in registers)"
        if backend.runs(variant, most, partial(_check, kept)):
            return _launch(scores, n_probes, spread, most, kept=True)
    variant = f"select_probes({form})"
    threads = backend.largest_group(variant, most, partial(_check, code))
    if threads:
        return _launch(scores, n_probes, spread, threads)
    return _reference(scores, n_probes, spread)


class Case(NamedTuple):
    """Inputs of a launch: how many clusters and probes, the dtypes of scores and
    spread, the batch size, and whether threads keep their keys in registers."""

    C: int
    p: int
    dtype: mx.Dtype = mx.float32
    spread: mx.Dtype | None = None
    B: int = 2
    kept: bool = False


# What tests, the doctor and the check on a GPU run. Edges of threads, stretches and
# threadgroups; all and one of the clusters; every dtype.
CASES = (
    Case(1, 1, B=1),
    Case(31, 31, mx.float16, kept=True),
    Case(33, 5, spread=mx.float32, kept=True),
    Case(300, 300, mx.bfloat16, B=3),
    Case(300, 299, mx.bfloat16, B=3, kept=True),
    Case(2048, 1, mx.float16, mx.float16, kept=True),
    Case(2049, 128, mx.bfloat16, mx.float32, B=1),
    Case(8192, 512, spread=mx.float32, B=1, kept=True),
    Case(9000, 562),
    Case(9000, 1200, mx.float16, kept=True),
    Case(16_384, 1024, mx.bfloat16, mx.float32, B=1, kept=True),
    Case(16_384, 1024, mx.bfloat16, B=1),
    Case(40_000, 2500, mx.bfloat16, mx.float32),
)


def largest(case: Case) -> int:
    """Threads per threadgroup, if so many fit."""
    return LARGE_GROUP if case.C > 2048 else SMALL_GROUP


def inputs(case: Case) -> tuple[mx.array, mx.array | None]:
    """Scores and spread of a case, with ties, both zeros, infinities and NaN."""
    scores = ((mx.arange(case.B * case.C) * 37) % 101).reshape(case.B, case.C)
    scores = scores.astype(case.dtype) / 8 - 6
    if case.C > 32:
        for value, at in (
            (-0.0, slice(1, None, 13)),
            (mx.inf, slice(2, None, 97)),
            (-mx.inf, slice(None, None, 7)),
            (mx.nan, slice(3, None, 11)),
        ):
            scores[-1, at] = value
    spread = None
    if case.spread is not None:
        spread = (((mx.arange(case.C) * 13) % 17) / 4).astype(case.spread)
    return scores, spread


def check(case: Case, threads: int) -> None:
    """Raise unless the kernel matches its reference in this case."""
    scores, spread = inputs(case)
    got = _launch(scores, case.p, spread, threads, case.kept)
    backend.expect_close("select_probes", got, _reference(scores, case.p, spread))


def _check(code: Case, threads: int) -> None:
    """The cases of one piece of code: one cluster, some, and all."""
    for p in sorted({1, -(-code.C // 16), code.C}):
        check(code._replace(p=p), threads)


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


def _launch(
    scores: mx.array,
    n_probes: int,
    spread: mx.array | None,
    threads: int,
    kept: bool = False,
) -> mx.array:
    B, C = scores.shape
    return (_kept if kept else _read_again)(
        [scores, scores if spread is None else spread, backend.words((n_probes,))],
        template=[("C", C), ("SPREAD", spread is not None), ("KEPT", kept)],
        groups=(1, B),
        threads=threads,
        outputs=[((B, n_probes), mx.uint32)],
    )[0]
