"""Exact logits of the probed clusters' rows (arXiv 2603.14591, stage 2)."""

from functools import lru_cache
from typing import NamedTuple

import mlx.core as mx

from . import backend

# x, weight, scales, biases and probes of :func:`probe_logits`.
_Arrays = tuple[mx.array, mx.array, mx.array | None, mx.array | None, mx.array]

# One simdgroup scores one probed cluster, whose rows lie one after another. Eight
# lanes share a row and read it side by side, 16 bytes or more each, so four rows are
# read at once; a lane keeps ROWS such sets in flight and uses x for all of them. The
# bits of a quantized weight become a float by or-ing them into the mantissa of 2^23,
# which is exact.
_SOURCE = """
    constexpr int UNIT = unit_size(BITS);  // weights that a lane reads at a time
    constexpr int WORDS = UNIT * BITS / 32;
    constexpr int UNITS = D / UNIT;
    constexpr int GROUPS = D / GROUP_SIZE;
    constexpr int ROWS = M > 12 ? 4 : (M + 3) / 4;
    constexpr int CHUNKS = (M + 4 * ROWS - 1) / (4 * ROWS);
    uint lane = thread_index_in_simdgroup;
    uint batch = threadgroup_position_in_grid.y;
    uint n_probes = probes_shape[1];
    uint n_rows = sizes[0];
    uint probe = threadgroup_position_in_grid.x * (THREADS / 32)
        + simdgroup_index_in_threadgroup;
    if (probe >= n_probes) {
        return;
    }
    size_t out = size_t(batch) * n_probes + probe;
    uint first = probes[out] * M;
    const device uint* words = (const device uint*)weight;
    const device uint* x_words = (const device uint*)(x + size_t(batch) * D);

    float best = -INFINITY;
    uint best_at = ~0u;
    for (int chunk = 0; chunk < CHUNKS; chunk++) {
        uint rows[ROWS];
        float acc[ROWS];
        for (int r = 0; r < ROWS; r++) {
            uint row = (chunk * ROWS + r) * 4 + lane / 8;
            rows[r] = min(first + min(row, uint(M - 1)), n_rows - 1);
            acc[r] = 0.0f;
        }
        for (int unit = lane % 8; unit < UNITS; unit += 8) {
            float v[UNIT];
            load_floats<T, UNIT>(x_words, unit, v);
            uint w[ROWS][WORDS];
            for (int r = 0; r < ROWS; r++) {
                const device uint* from = words
                    + (size_t(rows[r]) * UNITS + unit) * WORDS;
                load_words<WORDS>(from, w[r]);
            }
            if (QUANTIZED) {
                float sum = 0.0f;
                for (int i = 0; i < UNIT; i++) {
                    sum += v[i];
                }
                for (int r = 0; r < ROWS; r++) {
                    float dot = 0.0f;
                    for (int i = 0; i < UNIT; i++) {
                        dot += v[i] * unpack<BITS>(w[r], i);
                    }
                    size_t at = size_t(rows[r]) * GROUPS + unit * UNIT / GROUP_SIZE;
                    acc[r] += load(scales, at) * dot + load(biases, at) * sum;
                }
            } else {
                for (int r = 0; r < ROWS; r++) {
                    for (int i = 0; i < UNIT; i++) {
                        acc[r] += v[i] * element<T>(w[r], i);
                    }
                }
            }
        }
        for (int r = 0; r < ROWS; r++) {
            float value = acc[r];
            value += simd_shuffle_xor(value, ushort(1));
            value += simd_shuffle_xor(value, ushort(2));
            value += simd_shuffle_xor(value, ushort(4));
            uint row = (chunk * ROWS + r) * 4 + lane / 8;
            bool real = row < uint(M) && first + row < n_rows;
            value = real ? value : -INFINITY;
            if (row < uint(M) && lane % 8 == 0) {
                logits[out * M + row] = value;
            }
            if (value > best) {
                best = value;
                best_at = row;
            }
        }
    }
    if (STATS) {
        float top = simd_max(best);
        uint top_at = simd_min(best == top ? best_at : ~0u);
        if (lane == 0) {
            block_max[out] = top;
            block_argmax[out] = probe * M + (top_at < uint(M) ? top_at : 0u);
        }
    }
"""

_HEADER = """
constexpr int unit_size(int bits) {
    return bits < 8 ? 32 : 128 / bits;
}

template <int N>
inline void load_words(const device uint* from, thread uint* to) {
    if (N % 4 == 0) {
        for (int i = 0; i < N; i += 4) {
            uint4 v = *(const device uint4*)(from + i);
            to[i] = v.x;
            to[i + 1] = v.y;
            to[i + 2] = v.z;
            to[i + 3] = v.w;
        }
    } else if (N % 2 == 0) {
        for (int i = 0; i < N; i += 2) {
            uint2 v = *(const device uint2*)(from + i);
            to[i] = v.x;
            to[i + 1] = v.y;
        }
    } else {
        for (int i = 0; i < N; i++) {
            to[i] = from[i];
        }
    }
}

// Element i of words that hold values of type T.
template <typename T>
inline float element(thread const uint* words, int i) {
    return float(as_type<T>(ushort(words[i / 2] >> (16 * (i % 2)))));
}
template <>
inline float element<float>(thread const uint* words, int i) {
    return as_type<float>(words[i]);
}

template <typename T, int N>
inline void load_floats(const device uint* from, int unit, thread float* to) {
    constexpr int WORDS = N * sizeof(T) / 4;
    uint words[WORDS];
    load_words<WORDS>(from + unit * WORDS, words);
    for (int i = 0; i < N; i++) {
        to[i] = element<T>(words, i);
    }
}

// Weight i of a little-endian stream of BITS-bit integers.
template <int BITS>
inline float unpack(thread const uint* words, int i) {
    int at = i * BITS / 32;
    int shift = i * BITS % 32;
    uint bits = words[at] >> shift;
    if (shift + BITS > 32) {
        bits |= words[at + 1] << (32 - shift);
    }
    return as_type<float>(0x4b000000u | (bits & (~0u >> (32 - BITS)))) - 8388608.0f;
}
"""

# Two clusters to a threadgroup: small groups spread over all cores.
_THREADS = 64

_OUTPUTS = ["logits", "block_max", "block_argmax"]


def _kernel(stats: bool) -> backend.Kernel:
    source = _SOURCE
    if not stats:  # without the outputs that it would write
        source = source[: source.index("    if (STATS)")]
    return backend.Kernel(
        "probe_logits_stats" if stats else "probe_logits",
        ["x", "weight", "scales", "biases", "probes", "sizes"],
        _OUTPUTS if stats else _OUTPUTS[:1],
        source.replace("if (STATS) {", "{"),
        _HEADER,
    )


_kernels = {stats: _kernel(stats) for stats in (False, True)}


class ProbeLogits(NamedTuple):
    """Logits of the probed rows, and what each probed cluster amounts to.

    Attributes:
        logits (mx.array): float32 ``[B, p * m]``; ``-inf`` for padding.
        block_max (mx.array): Largest logit of each cluster, float32 ``[B, p]``.
        block_argmax (mx.array): Where it is in ``logits``, uint32 ``[B, p]``; the
          first of equals.
    """

    logits: mx.array
    block_max: mx.array
    block_argmax: mx.array


def probe_logits(
    x: mx.array,
    weight: mx.array,
    scales: mx.array | None,
    biases: mx.array | None,
    probes: mx.array,
    *,
    group_size: int = 64,
    bits: int = 8,
    n_rows: int | None = None,
) -> mx.array:
    """Logits of all rows of the probed clusters, accumulated in float32.

    Args:
        x (mx.array): Hidden states ``[B, D]``, float16, bfloat16 or float32, with D
          a multiple of 32.
        weight (mx.array): Rows in cluster order: ``[C, m, D]`` in the dtype of x, or
          uint32 ``[C, m, D * bits / 32]`` as :func:`mlx.core.quantize` packs them in
          its affine mode; m from 1 to 128.
        scales (mx.array, optional): ``[C, m, D / group_size]``, floating; ``None`` for
          rows that are not quantized.
        biases (mx.array, optional): Like ``scales``.
        probes (mx.array): Clusters to score, uint32 ``[B, p]``, each below C.
        group_size (int): Weights per scale: 32, 64 or 128.
        bits (int): Bits per weight: 4, 5, 6 or 8.
        n_rows (int, optional): Number of real rows. Row ``c * m + j`` is padding if
          it is not below it, and its logit is ``-inf``. By default all are real.

    Returns:
        mx.array: Logits, float32 ``[B, p * m]``, cluster after cluster.

    Raises:
        ValueError: If shapes, dtypes, ``bits`` or ``group_size`` do not fit.
    """
    args = (x, weight, scales, biases, probes)
    return _run(False, args, group_size, bits, n_rows)[0]


def probe_logits_stats(
    x: mx.array,
    weight: mx.array,
    scales: mx.array | None,
    biases: mx.array | None,
    probes: mx.array,
    *,
    group_size: int = 64,
    bits: int = 8,
    n_rows: int | None = None,
) -> ProbeLogits:
    """:func:`probe_logits` and, from the same launch, the maximum of each cluster and
    its place, so that the greedy choice needs no further pass over all logits."""
    args = (x, weight, scales, biases, probes)
    return ProbeLogits(*_run(True, args, group_size, bits, n_rows))


def _run(
    stats: bool, args: _Arrays, group_size: int, bits: int, n_rows: int | None
) -> list[mx.array]:
    x, weight, scales, _, _ = args
    _validate(*args, group_size, bits)
    C, m = weight.shape[:2]
    n_rows = C * m if n_rows is None else n_rows
    if not 1 <= n_rows <= C * m:
        raise ValueError(f"n_rows must be from 1 to {C * m}, not {n_rows}")
    name = str(x.dtype).split(".")[-1]
    if scales is None:
        form, group_size, bits = "rows", 32, 8 * x.dtype.size
    else:
        kind = str(scales.dtype).split(".")[-1]
        form = f"{bits} bits in groups of {group_size}, scales {kind}"
    variant = f"{_kernels[stats].name}({name}, {form}, D {x.shape[1]}, m {m})"
    # Fewer than 8 words are no device buffer in Metal, and not worth a launch.
    if weight.size >= 8 and backend.ready(
        variant,
        lambda: _check(
            stats, x, m, None if scales is None else scales.dtype, group_size, bits
        ),
    ):
        return _launch(stats, *args, group_size, bits, n_rows)
    return _reference(stats, *args, group_size, bits, n_rows)


def _validate(
    x: mx.array,
    weight: mx.array,
    scales: mx.array | None,
    biases: mx.array | None,
    probes: mx.array,
    group_size: int,
    bits: int,
) -> None:
    if x.ndim != 2 or x.shape[1] % 32:
        raise ValueError(f"x must be [B, D] with D a multiple of 32, not {x.shape}")
    if probes.ndim != 2 or probes.shape[0] != x.shape[0] or probes.dtype != mx.uint32:
        raise ValueError(
            f"probes must be uint32 [{x.shape[0]}, p], "
            f"not {probes.dtype} {probes.shape}"
        )
    if weight.ndim != 3 or not 1 <= weight.shape[1] <= 128:
        raise ValueError(f"weight must be [C, m, D], m up to 128, not {weight.shape}")
    if (scales is None) != (biases is None):
        raise ValueError("scales and biases come together")
    D = x.shape[1]
    if scales is None or biases is None:
        if weight.shape[2] != D or weight.dtype != x.dtype:
            raise ValueError(
                f"weight must be {x.dtype} [C, m, {D}], "
                f"not {weight.dtype} {weight.shape}"
            )
        return
    if bits not in (4, 5, 6, 8) or group_size not in (32, 64, 128):
        raise ValueError(
            "bits must be 4, 5, 6 or 8 and group_size 32, 64 or 128, "
            f"not {bits} and {group_size}"
        )
    grouped = (*weight.shape[:2], D // group_size)
    if (
        D % group_size
        or weight.shape[2] != D * bits // 32
        or weight.dtype != mx.uint32
        or scales.dtype not in (mx.float16, mx.bfloat16, mx.float32)
        or any(a.shape != grouped or a.dtype != scales.dtype for a in (scales, biases))
    ):
        raise ValueError(
            f"for D = {D} in {bits} bits and groups of {group_size}, weight must be "
            f"uint32 [C, m, {D * bits // 32}] and scales and biases floating "
            f"{grouped}, not {weight.dtype} {weight.shape}, {scales.dtype} "
            f"{scales.shape} and {biases.dtype} {biases.shape}"
        )


def _exact(
    x: mx.array,
    weight: mx.array,
    scales: mx.array | None,
    biases: mx.array | None,
    probes: mx.array,
    group_size: int,
    bits: int,
) -> mx.array:
    """Logits in float32 from copies of the probed clusters. On a CPU this is also the
    fastest for packed rows: MLX's gather_qmm accumulates in the dtype of x there."""
    x = x.astype(mx.float32)[:, None]

    def rows(a: mx.array) -> mx.array:
        a = a[probes].reshape(len(probes), -1, a.shape[-1])
        return a if a.dtype == mx.uint32 else a.astype(mx.float32)

    if scales is None or biases is None:
        return x @ rows(weight).swapaxes(-1, -2)
    return mx.quantized_matmul(
        x,
        rows(weight),
        rows(scales),
        rows(biases),
        transpose=True,
        group_size=group_size,
        bits=bits,
    )


def _gathered(
    x: mx.array,
    weight: mx.array,
    scales: mx.array | None,
    biases: mx.array | None,
    probes: mx.array,
    group_size: int,
    bits: int,
) -> mx.array:
    """Logits without a copy of the clusters, in the precision of x."""
    x = x[:, None, None]
    if scales is None:
        return mx.gather_mm(x, weight.swapaxes(-1, -2), rhs_indices=probes)
    return mx.gather_qmm(
        x,
        weight,
        scales,
        biases,
        rhs_indices=probes,
        transpose=True,
        group_size=group_size,
        bits=bits,
    )


def _reference(
    stats: bool,
    x: mx.array,
    weight: mx.array,
    scales: mx.array | None,
    biases: mx.array | None,
    probes: mx.array,
    group_size: int,
    bits: int,
    n_rows: int,
    exact: bool | None = None,
) -> list[mx.array]:
    """:func:`probe_logits_stats` in plain MLX."""
    B, p = probes.shape
    C, m = weight.shape[:2]
    if exact is None:
        # On a CPU MLX's gather_mm makes all rows contiguous first.
        exact = mx.default_device().type != mx.DeviceType.gpu
    score = _exact if exact else _gathered
    logits = score(x, weight, scales, biases, probes, group_size, bits)
    logits = logits.astype(mx.float32).reshape(B, p, m)
    if n_rows < C * m:
        rows = probes[..., None] * m + mx.arange(m, dtype=mx.uint32)
        logits = mx.where(rows < n_rows, logits, -mx.inf)
    flat = logits.reshape(B, p * m)
    if not stats:
        return [flat]
    top = logits.max(axis=-1)
    argmax = mx.argmax(logits, axis=-1) + mx.arange(p, dtype=mx.uint32) * m
    return [flat, top, argmax.astype(mx.uint32)]


@lru_cache
def _sizes(n_rows: int) -> mx.array:
    return mx.array([n_rows], dtype=mx.uint32)


def _launch(
    stats: bool,
    x: mx.array,
    weight: mx.array,
    scales: mx.array | None,
    biases: mx.array | None,
    probes: mx.array,
    group_size: int,
    bits: int,
    n_rows: int,
) -> list[mx.array]:
    B, p = probes.shape
    m = weight.shape[1]
    shapes = [((B, p * m), mx.float32)]
    if stats:
        shapes += [((B, p), t) for t in (mx.float32, mx.uint32)]
    return _kernels[stats](
        [
            x,
            weight,
            x if scales is None else scales,
            x if biases is None else biases,
            probes,
            _sizes(n_rows),
        ],
        template=[
            ("T", x.dtype),
            ("D", x.shape[1]),
            ("M", m),
            ("BITS", bits),
            ("GROUP_SIZE", group_size),
            ("QUANTIZED", scales is not None),
            ("THREADS", _THREADS),
        ],
        groups=(-(-p * 32 // _THREADS), B),
        threads=_THREADS,
        outputs=shapes,
    )


def _check(
    stats: bool,
    like: mx.array,
    m: int,
    scales_dtype: mx.Dtype | None,
    group_size: int,
    bits: int,
) -> None:
    dtype, D, C = like.dtype, like.shape[1], 5
    key = mx.random.key(0)
    x = mx.random.normal((2, D), key=key).astype(dtype)
    weight = mx.random.normal((C, m, D), key=key).astype(dtype)
    scales = biases = None
    if scales_dtype is not None:
        weight, scales, biases = mx.quantize(
            weight.astype(scales_dtype), group_size=group_size, bits=bits
        )
    probes = mx.array([[0, 2, 4], [1, 3, 4]], dtype=mx.uint32)
    args = (x, weight, scales, biases, probes, group_size, bits, C * m - m // 2)
    got = _launch(stats, *args)
    want = _reference(stats, *args, exact=True)
    backend.expect_close("probe_logits", got[0], want[0], 1e-4)
    if stats:
        backend.expect_close("block_max", got[1], want[1], 1e-4)
        chosen = mx.take_along_axis(got[0], got[2], axis=1)
        backend.expect_close("block_argmax", chosen, got[1])
