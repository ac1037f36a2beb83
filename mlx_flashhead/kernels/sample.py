"""One random candidate of each row, in one launch, the same on every back-end."""

from functools import lru_cache, partial
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from . import backend, filters, fixed_point
from ._prelude import BINS, LARGE_GROUP, SMALL_GROUP

# There is one draw per row, from integer masses (fixed_point.py), and no rounding to
# differ by: one random number, scaled to their total, picks the same candidate on every
# back-end.
_SOURCE = """
    constexpr int N = (K + THREADS - 1) / THREADS;
    // A mass has 40 bits, and the tail's TAIL_BITS more.
    static_assert(K >= 1 && K <= 131072, "sums of masses stay below 2^64");
    static_assert(THREADS % 32 == 0 && THREADS <= 1024, "whole simdgroups, at most 32");
    uint lid = thread_position_in_threadgroup.x;
    uint simd_lid = thread_index_in_simdgroup;
    uint simd_gid = simdgroup_index_in_threadgroup;
    uint row = threadgroup_position_in_grid.y;
    size_t base = size_t(row) * K;
    uint first = simd_gid * 32 * N + simd_lid;
    float scale = as_type<float>(settings[0]);
    float temperature = as_type<float>(settings[1]);
    uint limit = settings[2];

    threadgroup atomic_uint bins[TOP_P || TOP_K ? BINS : 1];
    threadgroup uint sums[32];
    threadgroup uint bin_at[3];
    threadgroup float tops[32];
    threadgroup ulong totals[32];
    threadgroup ulong inverse[1];
    threadgroup uint words[2];

    if (lid < 2) {
        words[lid] = random_word(key[0], key[1], 2 * row + lid, 2 * logits_shape[0]);
    }
    float top = -INFINITY;
#pragma unroll 4
    for (int j = 0; j < N; j++) {
        uint i = first + 32 * j;
        float value = i < K ? logit(logits, base + i) : -INFINITY;
        top = value > top ? value : top;
    }
    top = simd_max(top);
    if (simd_lid == 0) {
        tops[simd_gid] = top;
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    top = simd_max(simd_lid < THREADS / 32 ? tops[simd_lid] : -INFINITY);

    // How far from the top a candidate may be: min-p, then top-p and top-k.
    bool tail_kept = TAIL && limit == ~0u && !TOP_K;
    if (TOP_P) {
        ulong sum = 0;
#pragma unroll 4
        for (int j = 0; j < N; j++) {
            uint i = first + 32 * j;
            if (i < K) {
                float value = logit(logits, base + i);
                sum += exp2_negative(levels_below(top, value, LOG2E), 0);
            }
        }
        sum = simd_scan(sum, simd_lid);
        if (simd_lid == 31) {
            totals[simd_gid] = sum;
        }
        threadgroup_barrier(mem_flags::mem_threadgroup);
        if (simd_gid == 0) {
            sum = simd_lid < THREADS / 32 ? totals[simd_lid] : ulong(0);
            sum = simd_scan(sum, simd_lid);
            if (simd_lid == 31) {
                if (TAIL) {
                    float behind = top - load(tail, 2 * row + 1);
                    sum += exp2_negative(tail_levels(behind), TAIL_BITS);
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
        uint remaining = settings[3 + rule];
        for (int digit = 0; digit < 2; digit++) {
            clear_bins<THREADS>(bins, lid);
            threadgroup_barrier(mem_flags::mem_threadgroup);
#pragma unroll 4
            for (int j = 0; j < N; j++) {
                uint i = first + 32 * j;
                if (i < K) {
                    float value = logit(logits, base + i);
                    uint far = levels_below(top, value, LOG2E) >> COARSE;
                    // A candidate counts its share of the mass, in units of 2^-31,
                    // for top-p and itself for top-k.
                    uint count = 1;
                    if (rule == 0) {
                        ulong mass = exp2_negative(levels_below(top, value, LOG2E), 0);
                        count = uint((mass * inverse[0]) >> 32);
                    }
                    if (count > 0 && (digit == 0 || far >> 11 == cut)) {
                        uint bin = digit == 0 ? far >> 11 : far & 2047;
                        atomic_fetch_add_explicit(
                            &bins[bin], count, memory_order_relaxed);
                    }
                }
            }
            find_bin<THREADS>(bins, sums, bin_at, remaining, lid, simd_lid, simd_gid);
            cut = cut << 11 | bin_at[0];
            remaining -= bin_at[1];
            tail_kept = tail_kept && bin_at[2] == 0;
        }
        limit = min(limit, cut << COARSE | ((1u << COARSE) - 1));
    }

    // The mass of what is left, by simdgroup, each of which has a stretch of
    // candidates.
    ulong mass = 0;
#pragma unroll 4
    for (int j = 0; j < N; j++) {
        uint i = first + 32 * j;
        if (i < K) {
            float value = logit(logits, base + i);
            mass += candidate_mass(top, value, scale, limit);
        }
    }
    mass = simd_scan(mass, simd_lid);
    if (simd_lid == 31) {
        totals[simd_gid] = mass;
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    ulong upto = simd_lid < THREADS / 32 ? totals[simd_lid] : ulong(0);
    upto = simd_scan(upto, simd_lid);
    ulong all = simd_get(upto, 31);
    ulong end = simd_get(upto, simd_gid);
    ulong begin = end - totals[simd_gid];

    ulong total = all;
    if (TAIL && tail_kept) {
        float behind = top / temperature - load(tail, 2 * row);
        total += exp2_negative(tail_levels(behind), 8 + TAIL_BITS);
    }
    ulong drawn = scaled(words[0], words[1], total);
    if (drawn >= all) {
        if (lid == 0) {
            chosen[row] = uint(K);
        }
    } else if (begin <= drawn && drawn < end) {
        // This simdgroup's stretch again, now in order: N candidates to each lane.
        mass = 0;
        uint start = (simd_gid * 32 + simd_lid) * N;
        for (uint i = start; i < start + N && i < K; i++) {
            mass += candidate_mass(top, logit(logits, base + i), scale, limit);
        }
        ulong after = begin + simd_scan(mass, simd_lid);
        ulong before = after - mass;
        if (before <= drawn && drawn < after) {
            uint i = start;
            for (; i + 1 < start + N; i++) {
                before += candidate_mass(top, logit(logits, base + i), scale, limit);
                if (drawn < before) {
                    break;
                }
            }
            chosen[row] = i;
        }
    }
"""

_HEADER = (
    fixed_point.METAL
    + f"constexpr constant int COARSE = {filters.COARSE};\n"
    + """
template <typename P>
METAL_FUNC float logit(P logits, size_t i) {
    float value = load(logits, i);
    return value == value ? value : -INFINITY;
}

METAL_FUNC ulong candidate_mass(float top, float value, float scale, uint limit) {
    if (levels_below(top, value, LOG2E) > limit) {
        return 0;
    }
    return exp2_negative(levels_below(top, value, scale), 8);
}

// Inclusive sum over the lanes.
METAL_FUNC ulong simd_scan(ulong v, uint simd_lid) {
    for (ushort d = 1; d < 32; d *= 2) {
        uint low = simd_shuffle_up(uint(v), d);
        uint high = simd_shuffle_up(uint(v >> 32), d);
        v += simd_lid >= d ? ulong(high) << 32 | low : 0;
    }
    return v;
}

METAL_FUNC ulong simd_get(ulong v, uint simd_lid) {
    uint low = simd_shuffle(uint(v), ushort(simd_lid));
    uint high = simd_shuffle(uint(v >> 32), ushort(simd_lid));
    return ulong(high) << 32 | low;
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
"""
)

_kernel = backend.Kernel(
    "sample",
    ["logits", "key", "settings", "tail"],
    ["chosen"],
    _SOURCE,
    BINS + _HEADER,
)


def sample(
    logits: mx.array,
    key: mx.array,
    *,
    temperature: float = 1.0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    min_tokens_to_keep: int = 1,
    top_k: int = 0,
    xtc_probability: float = 0.0,
    xtc_threshold: float = 0.1,
    xtc_exempt: mx.array | None = None,
    tail: mx.array | None = None,
) -> mx.array:
    """One candidate of each row, drawn at random.

    As in mlx-lm, the filters look at the distribution at temperature 1
    (:mod:`mlx_flashhead.kernels.filters` defines them), and the draw is made among what
    they leave at ``temperature``. The draw inverts the cumulative distribution with 64
    random bits per row; probabilities are integers, exact to about 4e-9 of their size
    and 1e-12 of the largest, so the same key gives the same candidate on every
    back-end.

    Args:
        logits (mx.array): Candidate logits ``[B, K]``, float16, bfloat16 or float32,
          K up to 131,072. NaN counts as ``-inf``; if nothing is above ``-inf``, all
          candidates are equally likely.
        key (mx.array): Random key, uint32 ``[2]``, as from
          :func:`mlx.core.random.key`, or a seed and a counter.
        temperature (float): Above 0.
        top_p (float): Keep the most likely candidates whose mass reaches this.
        min_p (float): Keep what is at least this times as likely as the best.
        min_tokens_to_keep (int): Candidates that ``min_p`` leaves in any case.
        top_k (int): Keep this many candidates; 0 for all.
        xtc_probability (float): How often, by a coin of each row, the likeliest
          candidates are dropped.
        xtc_threshold (float): Probability from which on they are.
        xtc_exempt (mx.array, optional): Candidates that XTC never drops, bool
          ``[B, K]``.
        tail (mx.array, optional): One more candidate, of index K, that stands for
          everything not among the candidates: float32 ``[B, 2]``, its log-mass at
          ``temperature`` and at temperature 1, on the scale of the logits.

    Returns:
        mx.array: Candidate indices, uint32 ``[B]``; K for the tail.

    Raises:
        ValueError: If a shape or a setting is out of range.
    """
    if logits.ndim != 2 or not 1 <= logits.shape[1] <= 131_072:
        raise ValueError(f"logits must be [B, K], K to 131,072, not {logits.shape}")
    if key.shape != (2,) or key.dtype != mx.uint32:
        raise ValueError(f"key must be uint32 [2], not {key.dtype} {key.shape}")
    if not 1e-3 <= temperature <= 1e3:
        raise ValueError(f"temperature must be from 0.001 to 1000, not {temperature}")
    if not 0 < top_p <= 1 or not 0 <= min_p <= 1 or top_k < 0:
        raise ValueError(
            "top_p must be in (0, 1], min_p in [0, 1] and top_k not negative, "
            f"not {top_p}, {min_p} and {top_k}"
        )
    if not 0 <= xtc_probability <= 1 or min_tokens_to_keep < 1:
        raise ValueError(
            "xtc_probability must be in [0, 1] and min_tokens_to_keep at least 1, "
            f"not {xtc_probability} and {min_tokens_to_keep}"
        )
    B, K = logits.shape
    if tail is not None and (tail.shape != (B, 2) or tail.dtype != mx.float32):
        raise ValueError(
            f"tail must be float32 [{B}, 2], not {tail.dtype} {tail.shape}"
        )
    rules = filters.Rules(top_p, min_p, min_tokens_to_keep, top_k, xtc_threshold)
    plain = min_tokens_to_keep > 1 or xtc_probability > 0
    options = (top_p < 1, 0 < top_k < K, tail is not None)
    if not B:
        return mx.zeros((0,), dtype=mx.uint32)
    if not plain:
        code = Case(K, logits.dtype, *options)
        names = ("top-p", "top-k", "tail")
        on = [n for n, option in zip(names, options, strict=True) if option]
        variant = f"sample({', '.join([backend.short(logits.dtype), *on])}, K {K})"
        threads = backend.largest_group(variant, largest(code), partial(check, code))
        if threads:
            return _launch(logits, key, temperature, rules, tail, threads)
    coin = None
    if xtc_probability > 0:
        u = mx.random.uniform(shape=(B,), key=key ^ mx.array([0, 1 << 31], mx.uint32))
        coin = u <= xtc_probability
    return _reference(logits, key, temperature, rules, tail, coin, xtc_exempt)


@lru_cache(maxsize=256)
def _settings(temperature: float, rules: filters.Rules) -> mx.array:
    """The settings as words: what scales a logit, the temperature, and how far below
    the top, how much mass (of 2^31) and how many candidates are kept."""
    scale = np.float32(fixed_point.LOG2E / temperature).view(np.uint32)
    heat = np.float32(temperature).view(np.uint32)
    words = [int(scale), int(heat), rules.limit, rules.share, rules.top_k]
    return mx.array(words, dtype=mx.uint32)


def _reference(
    logits: mx.array,
    key: mx.array,
    temperature: float,
    rules: filters.Rules,
    tail: mx.array | None,
    coin: mx.array | None = None,
    exempt: mx.array | None = None,
) -> mx.array:
    """:func:`sample` in plain MLX."""
    logits = logits.astype(mx.float32)
    logits = mx.where(mx.isnan(logits), -mx.inf, logits)
    top = logits.max(axis=-1, keepdims=True)
    behind = None if tail is None else top[:, 0] - tail[:, 1]
    distance = fixed_point.levels_below(top, logits, fixed_point.LOG2E)
    kept, tail_kept = filters.keep(distance, rules, behind, coin, exempt)
    if coin is not None:
        # Masses are relative to the best of what is left; XTC drops what was the best.
        top = mx.where(kept, logits, -mx.inf).max(axis=-1, keepdims=True)
    scale = float(np.float32(fixed_point.LOG2E / temperature))
    mass = fixed_point.exp2_negative(fixed_point.levels_below(top, logits, scale), 8)
    upto = mx.cumsum(mx.where(kept, mass, 0), axis=-1)
    total = upto[:, -1]
    if tail is not None:
        levels = fixed_point.tail_levels(top[:, 0] / temperature - tail[:, 0])
        tail_mass = fixed_point.exp2_negative(levels, 8 + fixed_point.TAIL_BITS)
        total = total + mx.where(tail_kept, tail_mass, 0)
    drawn = fixed_point.scaled(mx.random.split(key, len(logits)), total)
    return (upto <= drawn[:, None]).sum(axis=-1).astype(mx.uint32)


class Case(NamedTuple):
    """Inputs of a launch: how many candidates, their dtype, whether there are top-p,
    top-k and a tail, the batch size, and min-p."""

    K: int
    dtype: mx.Dtype = mx.float32
    top_p: bool = False
    top_k: bool = False
    tail: bool = False
    B: int = 2
    min_p: float = 0.0


# What tests, the doctor and the check on a GPU run.
CASES = (
    Case(1, B=1),
    Case(300, top_p=True, tail=True),
    Case(300, mx.float16, True, True, B=1, min_p=0.01),
    Case(1000, mx.bfloat16, B=3),
    Case(2048, tail=True),
    Case(2049, mx.float16, top_k=True, B=1),
    Case(5000, top_p=True),
    Case(9000, mx.bfloat16, True, True, True, B=1),
    Case(16_384, top_p=True, B=4),
    Case(40_000, mx.bfloat16, True, True, True),
)
_SEEDS = range(3)


def largest(case: Case) -> int:
    """Threads per threadgroup, if so many fit."""
    return LARGE_GROUP if case.K > 2048 else SMALL_GROUP


def inputs(case: Case) -> tuple[mx.array, mx.array | None]:
    """Logits and tail of a case, with ties, infinities and NaN."""
    B, K = case.B, case.K
    logits = (((mx.arange(B * K) * 37) % 211) / 24).reshape(B, K).astype(case.dtype)
    if K > 32:
        logits[-1, 1::9] = -mx.inf
        logits[-1, 2::19] = mx.nan
    return logits, mx.array([[9.0, 10.0]] * B) if case.tail else None


def settings(case: Case) -> dict[str, float]:
    """Temperature and filters of a case, by their names in :func:`sample`."""
    chosen = {"temperature": 0.8, "min_p": case.min_p}
    if case.top_p:
        chosen["top_p"] = 0.9
    if case.top_k:
        chosen["top_k"] = -(-case.K // 3)
    return chosen


def check(case: Case, threads: int) -> None:
    """Raise unless the kernel matches its reference in this case."""
    logits, tail = inputs(case)
    chosen = settings(case)
    temperature = chosen.pop("temperature")
    rules = filters.Rules(**chosen)  # type: ignore[arg-type]
    for seed in _SEEDS:
        args = (logits, mx.random.key(seed), temperature, rules, tail)
        got = _launch(*args, threads)
        backend.expect_close("sample", got, _reference(*args))


def _launch(
    logits: mx.array,
    key: mx.array,
    temperature: float,
    rules: filters.Rules,
    tail: mx.array | None,
    threads: int,
) -> mx.array:
    B, K = logits.shape
    words = _settings(temperature, rules)
    return _kernel(
        [logits, key, words, logits if tail is None else tail],
        template=[
            ("K", K),
            ("TOP_P", rules.top_p < 1),
            ("TOP_K", 0 < rules.top_k < K),
            ("TAIL", tail is not None),
        ],
        groups=(1, B),
        threads=threads,
        outputs=[((B,), mx.uint32)],
    )[0]
