"""One random candidate of each row, in one launch, the same on every back-end."""

import math
from functools import lru_cache

import mlx.core as mx
import numpy as np

from . import backend
from ._prelude import BINS, LARGE_GROUP, TOKEN
from .greedy import check_tokens, to_tokens

# Probabilities are integers. The distance of a logit from the largest, in powers of
# two, becomes a fixed-point number with 26 fractional bits, and 2^-distance a 64-bit
# mass by integer arithmetic alone. Integer sums do not depend on the order of
# addition, so one random number, scaled to the total, picks the same candidate on
# every back-end: there is one draw per row and no rounding to differ by.
_FRACTION = 26
_LOG2E = float(np.float32(math.log2(math.e) * 2**_FRACTION))
_LARGEST = 4294967040.0  # the largest float below 2^32
# Minimax coefficients of (1 - 2^-t) / t on [0, 1], in units of 2^-32, signs
# alternating: 2^-t within 4e-9 with the rounding of integers.
_EXP2 = (0xB1721605, 0x3D7F581B, 0x0E34A46B, 0x0273C7F8, 0x00538ABA, 0x0007251B)
# The tail may weigh up to 2^22 times the best candidate.
_TAIL_BITS = 22
_TAIL_SHIFT = float(np.float32(_TAIL_BITS * math.log(2)))
# Top-p and top-k compare distances at this resolution.
_COARSE = 10

_SOURCE = """
    constexpr int N = (K + THREADS - 1) / THREADS;
    uint tid = thread_position_in_threadgroup.x;
    uint lane = thread_index_in_simdgroup;
    uint group = simdgroup_index_in_threadgroup;
    uint row = threadgroup_position_in_grid.y;
    size_t base = size_t(row) * K;
    uint first = group * 32 * N + lane;
    float scale = as_type<float>(settings[0]);
    float temperature = as_type<float>(settings[1]);
    uint limit = settings[2];

    threadgroup atomic_uint bins[TOP_P || TOP_K ? BINS : 1];
    threadgroup uint sums[32];
    threadgroup uint found[3];
    threadgroup float tops[32];
    threadgroup ulong totals[32];
    threadgroup ulong inverse[1];
    threadgroup uint words[2];

    if (tid < 2) {
        words[tid] = random_word(key[0], key[1], 2 * row + tid, logits_shape[0]);
    }
    float top = -INFINITY;
#pragma unroll 4
    for (int j = 0; j < N; j++) {
        uint i = first + 32 * j;
        float value = i < K ? logit(logits, base + i) : -INFINITY;
        top = value > top ? value : top;
    }
    top = simd_max(top);
    if (lane == 0) {
        tops[group] = top;
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    top = simd_max(lane < THREADS / 32 ? tops[lane] : -INFINITY);

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
        sum = simd_scan(sum, lane);
        if (lane == 31) {
            totals[group] = sum;
        }
        threadgroup_barrier(mem_flags::mem_threadgroup);
        if (group == 0) {
            sum = simd_scan(lane < THREADS / 32 ? totals[lane] : ulong(0), lane);
            if (lane == 31) {
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
            clear_bins<THREADS>(bins, tid);
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
            find_bin<THREADS>(bins, sums, found, remaining, tid, lane, group);
            cut = cut << 11 | found[0];
            remaining -= found[1];
            tail_kept = tail_kept && found[2] == 0;
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
    mass = simd_scan(mass, lane);
    if (lane == 31) {
        totals[group] = mass;
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    ulong upto = simd_scan(lane < THREADS / 32 ? totals[lane] : ulong(0), lane);
    ulong all = simd_get(upto, 31);
    ulong end = simd_get(upto, group);
    ulong begin = end - totals[group];

    ulong total = all;
    if (TAIL && tail_kept) {
        float behind = top / temperature - load(tail, 2 * row);
        total += exp2_negative(tail_levels(behind), 8 + TAIL_BITS);
    }
    ulong drawn = scaled(words[0], words[1], total);
    if (drawn >= all) {
        if (tid == 0) {
            tokens[row] = MAPPED ? ~0u : uint(K);
        }
    } else if (begin <= drawn && drawn < end) {
        // This simdgroup's stretch again, now in order: N candidates to each lane.
        mass = 0;
        uint start = (group * 32 + lane) * N;
        for (uint i = start; i < start + N && i < K; i++) {
            mass += candidate_mass(top, logit(logits, base + i), scale, limit);
        }
        ulong after = begin + simd_scan(mass, lane);
        ulong before = after - mass;
        if (before <= drawn && drawn < after) {
            uint i = start;
            for (; i + 1 < start + N; i++) {
                before += candidate_mass(top, logit(logits, base + i), scale, limit);
                if (drawn < before) {
                    break;
                }
            }
            size_t probed = size_t(row) * probes_shape[1];
            tokens[row] = candidate_token<MAPPED, M>(probes, token_ids, probed, i);
        }
    }
"""

_HEADER = (
    f"""
constexpr constant float LOG2E = {_LOG2E:.1f}f;  // log2(e) in fixed point
constexpr constant int TAIL_BITS = {_TAIL_BITS};
constexpr constant int COARSE = {_COARSE};
"""
    + """
template <typename P>
inline float logit(P logits, size_t i) {
    float value = load(logits, i);
    return value == value ? value : -INFINITY;
}

inline uint fixed_point(float x) {
    return uint(x < 4294967040.0f ? x : 4294967040.0f);
}

// How far below the top a value is, times scale, which converts to powers of two in
// fixed point. A product of a difference: nothing that could be fused.
inline uint levels_below(float top, float value, float scale) {
    return fixed_point((value == top ? 0.0f : top - value) * scale);
}

inline uint tail_levels(float behind) {
    float x = behind + TAIL_SHIFT;
    return fixed_point((x > 0.0f ? x : 0.0f) * LOG2E);
}

// 2^(32 + up - x / 2^26), by integer arithmetic.
inline ulong exp2_negative(uint x, int up) {
    uint t = x << 6;  // the fraction
    uint v = EXP2_5;
    v = EXP2_4 - mulhi(t, v);
    v = EXP2_3 - mulhi(t, v);
    v = EXP2_2 - mulhi(t, v);
    v = EXP2_1 - mulhi(t, v);
    v = EXP2_0 - mulhi(t, v);
    return (ulong(~0u - mulhi(t, v)) << up) >> (x >> 26);
}

inline ulong candidate_mass(float top, float value, float scale, uint limit) {
    if (levels_below(top, value, LOG2E) > limit) {
        return 0;
    }
    return exp2_negative(levels_below(top, value, scale), 8);
}

// Inclusive sum over the lanes.
inline ulong simd_scan(ulong v, uint lane) {
    for (ushort d = 1; d < 32; d *= 2) {
        uint low = simd_shuffle_up(uint(v), d);
        uint high = simd_shuffle_up(uint(v >> 32), d);
        v += lane >= d ? ulong(high) << 32 | low : 0;
    }
    return v;
}

inline ulong simd_get(ulong v, uint lane) {
    uint low = simd_shuffle(uint(v), ushort(lane));
    uint high = simd_shuffle(uint(v >> 32), ushort(lane));
    return ulong(high) << 32 | low;
}

// floor(random * total / 2^64) for a random number of two words.
inline ulong scaled(uint high, uint low, ulong total) {
    ulong total_low = total & 0xffffffffu;
    ulong total_high = total >> 32;
    ulong a = high * total_low + (low * total_low >> 32);
    ulong b = low * total_high + (a & 0xffffffffu);
    return high * total_high + (a >> 32) + (b >> 32);
}

// Word i of mx.random.split(key, n): Threefry 2x32 with 20 rounds (Salmon et al.,
// "Parallel random numbers: as easy as 1, 2, 3", SC 2011).
inline uint random_word(uint key0, uint key1, uint i, uint n) {
    uint keys[3] = {key0, key1, key0 ^ key1 ^ 0x1bd11bdau};
    const int rotations[8] = {13, 15, 26, 6, 17, 29, 16, 24};
    uint a = (i < n ? i : i - n) + keys[0];
    uint b = (i < n ? i + n : i) + keys[1];
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
_HEADER = _HEADER.replace("TAIL_SHIFT", f"{_TAIL_SHIFT!r}f")
for _i, _c in enumerate(_EXP2):
    _HEADER = _HEADER.replace(f"EXP2_{_i}", f"{_c:#010x}u")

_kernel = backend.Kernel(
    "sample",
    ["logits", "key", "settings", "tail", "probes", "token_ids"],
    ["tokens"],
    _SOURCE,
    BINS + TOKEN + _HEADER,
)


def sample(
    logits: mx.array,
    key: mx.array,
    *,
    temperature: float = 1.0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    top_k: int = 0,
    tail: mx.array | None = None,
    probes: mx.array | None = None,
    token_ids: mx.array | None = None,
) -> mx.array:
    """One candidate of each row, drawn at random.

    As in mlx-lm, top-p, min-p and top-k look at the distribution at temperature 1,
    and the draw is made among what they leave at ``temperature``. They keep whole
    sets of ties (logits within about 1e-5). The draw inverts the cumulative
    distribution with 64 random bits per row; probabilities are integers, exact to
    about 4e-9 of their size and 1e-12 of the largest, so the same key gives the same
    candidate on every back-end.

    Args:
        logits (mx.array): Candidate logits ``[B, K]``, float16, bfloat16 or float32,
          K up to 131,072. NaN counts as ``-inf``; if nothing is above ``-inf``, all
          candidates are equally likely.
        key (mx.array): Random key, uint32 ``[2]``, as from
          :func:`mlx.core.random.key`, or a seed and a counter.
        temperature (float): Above 0.
        top_p (float): Keep the most likely candidates whose mass reaches this.
        min_p (float): Keep what is at least this times as likely as the best.
        top_k (int): Keep this many candidates; 0 for all.
        tail (mx.array, optional): One more candidate, of index K, that stands for
          everything not among the candidates: float32 ``[B, 2]``, its log-mass at
          ``temperature`` and at temperature 1, on the scale of the logits. It counts
          in the total of top-p and ranks last there; min-p and top-k drop it.
        probes (mx.array, optional): Probed clusters, uint32 ``[B, p]``.
        token_ids (mx.array, optional): Token of each row, uint32 ``[C, m]``.

    Returns:
        mx.array: uint32 ``[B]``: candidate indices, K for the tail; or, with
        ``probes`` and ``token_ids``, tokens, 0xFFFFFFFF for the tail.

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
    B, K = logits.shape
    if tail is not None and (tail.shape != (B, 2) or tail.dtype != mx.float32):
        raise ValueError(
            f"tail must be float32 [{B}, 2], not {tail.dtype} {tail.shape}"
        )
    check_tokens(B, probes, token_ids)
    rules = (top_p < 1, 0 < top_k < K, tail is not None)
    numbers = _settings(temperature, top_p, min_p, top_k)
    options = [str(logits.dtype).split(".")[-1]]
    options += [n for n, on in zip(("top-p", "top-k", "tail"), rules) if on]
    m = 0 if token_ids is None else token_ids.shape[1]
    options += [f"K {K}"] + [f"tokens, m {m}"] * (m > 0)
    variant = f"sample({', '.join(options)})"
    args = (logits, key, numbers, tail, probes, token_ids)
    if backend.ready(variant, lambda: _check(K, logits.dtype, rules, m)):
        return _launch(*args, rules)
    return _reference(*args, rules)


@lru_cache(maxsize=256)
def _settings(temperature: float, top_p: float, min_p: float, top_k: int) -> mx.array:
    """The settings as words: what scales a logit, the temperature, and how far below
    the top, how much mass (of 2^31) and how many candidates are kept."""
    scale = np.float32(_LOG2E / temperature).view(np.uint32)
    heat = np.float32(temperature).view(np.uint32)
    limit = 0xFFFFFFFF
    if min_p > 0:
        limit = min(int(-math.log2(min_p) * 2**_FRACTION), limit - 1)
    mass = max(1, int(min(top_p, 1.0) * 2**31))
    return mx.array([int(scale), int(heat), limit, mass, top_k], dtype=mx.uint32)


def _fixed_point(x: mx.array) -> mx.array:
    return mx.minimum(x, _LARGEST).astype(mx.uint32)


def _levels_below(top: mx.array, value: mx.array, scale: mx.array | float) -> mx.array:
    return _fixed_point(mx.where(value == top, 0, top - value) * scale)


def _tail_levels(behind: mx.array) -> mx.array:
    x = behind + _TAIL_SHIFT
    return _fixed_point(mx.where(x > 0, x, 0) * _LOG2E)


def _exp2_negative(x: mx.array, up: int) -> mx.array:
    x = x.astype(mx.uint64)
    low = 0xFFFFFFFF
    t = (x << 6) & low
    v = mx.array(_EXP2[-1], dtype=mx.uint64)
    for c in reversed((low, *_EXP2[:-1])):
        v = mx.array(c, dtype=mx.uint64) - (t * v >> 32)
    return (v << up) >> (x >> _FRACTION)


def _scaled(words: mx.array, total: mx.array) -> mx.array:
    """``floor(random * total / 2^64)`` for random ``words [B, 2]``, ``total [B]``."""
    high, low = words.astype(mx.uint64).T
    total_high, total_low = total >> 32, total & 0xFFFFFFFF
    a = high * total_low + (low * total_low >> 32)
    b = low * total_high + (a & 0xFFFFFFFF)
    return high * total_high + (a >> 32) + (b >> 32)


def _reference(
    logits: mx.array,
    key: mx.array,
    settings: mx.array,
    tail: mx.array | None,
    probes: mx.array | None,
    token_ids: mx.array | None,
    rules: tuple[bool, bool, bool],
) -> mx.array:
    """:func:`sample` in plain MLX."""
    use_top_p, use_top_k, _ = rules
    scale, temperature = settings[0].view(mx.float32), settings[1].view(mx.float32)
    B, K = logits.shape
    logits = logits.astype(mx.float32)
    logits = mx.where(mx.isnan(logits), -mx.inf, logits)
    top = logits.max(axis=-1, keepdims=True)
    far = _levels_below(top, logits, _LOG2E)
    limit = mx.broadcast_to(settings[2], (B, 1))
    tail_kept = mx.broadcast_to(settings[2] == 0xFFFFFFFF, (B,)) & (not use_top_k)
    if use_top_p or use_top_k:
        order = mx.argsort(far, axis=-1)
        coarse = mx.take_along_axis(far, order, axis=-1) >> _COARSE

        def cut(counts: mx.array, target: mx.array) -> mx.array:
            before = mx.cumsum(counts, axis=-1) - counts
            last = (before < target).sum(axis=-1, keepdims=True) - 1
            edge = mx.take_along_axis(coarse, last, axis=-1)
            return (edge << _COARSE) | ((1 << _COARSE) - 1)

        if use_top_p:
            mass = _exp2_negative(far, 0)
            total = mass.sum(axis=-1)
            if tail is not None:
                behind = top[:, 0] - tail[:, 1]
                total = total + _exp2_negative(_tail_levels(behind), _TAIL_BITS)
            inverse = (mx.array(1, dtype=mx.uint64) << 63) // total
            share = mass * inverse[:, None] >> 32
            share = mx.take_along_axis(share, order, axis=-1)
            limit = mx.minimum(limit, cut(share, settings[3]))
            tail_kept = tail_kept & (share.sum(axis=-1) < settings[3])
        if use_top_k:
            limit = mx.minimum(limit, cut(mx.ones_like(far), settings[4]))
    mass = _exp2_negative(_levels_below(top, logits, scale), 8)
    upto = mx.cumsum(mx.where(far <= limit, mass, 0), axis=-1)
    total = upto[:, -1]
    if tail is not None:
        behind = top[:, 0] / temperature - tail[:, 0]
        tail_mass = _exp2_negative(_tail_levels(behind), 8 + _TAIL_BITS)
        total = total + mx.where(tail_kept, tail_mass, 0)
    drawn = _scaled(mx.random.split(key, B), total)
    chosen = (upto <= drawn[:, None]).sum(axis=-1).astype(mx.uint32)
    if probes is None:
        return chosen
    tokens = to_tokens(mx.minimum(chosen, K - 1), probes, token_ids)
    return mx.where(chosen < K, tokens, 0xFFFFFFFF)


def _launch(
    logits: mx.array,
    key: mx.array,
    settings: mx.array,
    tail: mx.array | None,
    probes: mx.array | None,
    token_ids: mx.array | None,
    rules: tuple[bool, bool, bool],
) -> mx.array:
    B, K = logits.shape
    threads = LARGE_GROUP if K > 2048 else 256
    unused = backend.unused()
    return _kernel(
        [
            logits,
            key,
            settings,
            logits if tail is None else tail,
            unused if probes is None else probes,
            unused if token_ids is None else token_ids,
        ],
        template=[
            ("K", K),
            ("M", 1 if token_ids is None else token_ids.shape[1]),
            ("TOP_P", rules[0]),
            ("TOP_K", rules[1]),
            ("TAIL", rules[2]),
            ("MAPPED", probes is not None),
            ("THREADS", threads),
        ],
        groups=(1, B),
        threads=threads,
        outputs=[((B,), mx.uint32)],
    )[0]


def _check(K: int, dtype: mx.Dtype, rules: tuple[bool, bool, bool], m: int) -> None:
    B = 2
    logits = (((mx.arange(B * K) * 37) % 211) / 24).reshape(B, K).astype(dtype)
    tail = probes = token_ids = None
    if rules[2]:
        tail = mx.array([[9.0, 10.0]] * B)
    if m:
        p = -(-K // m)
        probes = mx.arange(B * p, dtype=mx.uint32).reshape(B, p)
        token_ids = (mx.arange(B * p * m, dtype=mx.uint32) * 7).reshape(-1, m)
    top_k = -(-K // 3) if rules[1] else 0
    settings = _settings(0.8, 0.9 if rules[0] else 1.0, 0.0, top_k)
    for seed in range(3):
        args = (logits, mx.random.key(seed), settings, tail, probes, token_ids, rules)
        backend.expect_close("sample", _launch(*args), _reference(*args))
