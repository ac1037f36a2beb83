"""Exact logits of the probed clusters' rows (arXiv 2603.14591, stage 2)."""

import itertools
from functools import lru_cache, partial
from typing import NamedTuple

import mlx.core as mx

from . import backend

# One simdgroup scores one probed cluster, whose rows lie one after another. Eight
# lanes share a row and read it side by side, 16 bytes or more each, so four rows are
# read at once; a lane keeps ROWS such sets in flight and uses x for all of them. The
# bits of a quantized weight become a float by or-ing them into the mantissa of 2^23,
# which is exact. What is indexed by a loop's counter is an array in registers only if
# the loop is unrolled, so all loops over ROWS, UNIT and WORDS say that they are.
#
# Lanes that share a scale read it at the same address, which the memory serves once. To
# read it in one of them and shuffle would take the same load, which all lanes issue
# together, and a shuffle more.
_SOURCE = """
    constexpr int UNIT = unit_size(BITS);  // weights that a lane reads at a time
    constexpr int WORDS = UNIT * BITS / 32;
    constexpr int UNITS = D / UNIT;
    constexpr int GROUPS = D / GROUP_SIZE;
    constexpr int ROWS = M > 12 ? 4 : (M + 3) / 4;
    constexpr int CHUNKS = (M + 4 * ROWS - 1) / (4 * ROWS);
    static_assert(M >= 1 && D % UNIT == 0, "a row is whole units");
    static_assert(UNIT * BITS == 32 * WORDS, "a unit is whole words");
    static_assert(!QUANTIZED || (D % GROUP_SIZE == 0 && GROUP_SIZE % UNIT == 0),
                  "a unit has one scale");
    static_assert(!QUANTIZED || BITS <= 23, "weights fit the mantissa of 2^23");
    static_assert(THREADS % 32 == 0, "whole simdgroups");
    uint simd_lid = thread_index_in_simdgroup;
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

    for (int chunk = 0; chunk < CHUNKS; chunk++) {
        // Where the rows and their groups begin.
        const device uint* row_words[ROWS];
        size_t row_groups[ROWS];
        float acc[ROWS];
#pragma unroll
        for (int r = 0; r < ROWS; r++) {
            uint row = (chunk * ROWS + r) * 4 + simd_lid / 8;
            size_t at = min(first + min(row, uint(M - 1)), n_rows - 1);
            row_words[r] = words + at * (UNITS * WORDS);
            row_groups[r] = at * GROUPS;
            acc[r] = 0.0f;
        }
        for (int unit = simd_lid % 8; unit < UNITS; unit += 8) {
            float v[UNIT];
            load_floats<T, UNIT>(x_words, unit, v);
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
                }
#pragma unroll
                for (int r = 0; r < ROWS; r++) {
                    float dot = 0.0f;
#pragma unroll
                    for (int i = 0; i < UNIT; i++) {
                        dot += v[i] * unpack<BITS>(w[r], i);
                    }
                    size_t at = row_groups[r] + group;
                    acc[r] += load(scales, at) * dot + load(biases, at) * sum;
                }
            } else {
#pragma unroll
                for (int r = 0; r < ROWS; r++) {
#pragma unroll
                    for (int i = 0; i < UNIT; i++) {
                        acc[r] += v[i] * element<T>(w[r], i);
                    }
                }
            }
        }
#pragma unroll
        for (int r = 0; r < ROWS; r++) {
            float value = acc[r];
            value += simd_shuffle_xor(value, ushort(1));
            value += simd_shuffle_xor(value, ushort(2));
            value += simd_shuffle_xor(value, ushort(4));
            uint row = (chunk * ROWS + r) * 4 + simd_lid / 8;
            bool real = row < uint(M) && first + row < n_rows;
            if (row < uint(M) && simd_lid % 8 == 0) {
                logits[out * M + row] = real ? value : -INFINITY;
            }
        }
    }
"""

_HEADER = """
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

# Two clusters to a threadgroup: small groups spread over all cores.
_THREADS = 64

_kernel = backend.Kernel(
    "probe_logits",
    ["x", "weight", "scales", "biases", "probes", "sizes"],
    ["logits"],
    _SOURCE,
    _HEADER,
)


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
    _validate(x, weight, scales, biases, probes, group_size, bits)
    C, m = weight.shape[:2]
    n_rows = C * m if n_rows is None else n_rows
    if not 1 <= n_rows <= C * m:
        raise ValueError(f"n_rows must be from 1 to {C * m}, not {n_rows}")
    if not probes.size:
        B, p = probes.shape
        return mx.zeros((B, p * m))
    code = Case(
        *(x.dtype, 0 if scales is None else bits, group_size, x.shape[1], m),
        scales=None if scales is None else scales.dtype,
    )
    if scales is None:
        group_size, bits = 32, 8 * x.dtype.size
    variant = f"probe_logits({_described(code)})"
    # Fewer than 8 words are no device buffer in Metal, and not worth a launch.
    threads = 0
    if weight.size >= 8:
        threads = backend.largest_group(variant, largest(code), partial(_check, code))
    args = (x, weight, scales, biases, probes, group_size, bits, n_rows)
    return _launch(*args, threads) if threads else _reference(*args)


class Case(NamedTuple):
    """Inputs of a launch: dtype of the hidden states, bits of a weight (0: it is not
    quantized), sizes as in :func:`probe_logits` with C clusters and p probes, and the
    scales' dtype (by default that of the states)."""

    dtype: mx.Dtype
    bits: int
    group_size: int
    D: int
    m: int
    B: int = 2
    C: int = 5
    p: int = 3
    scales: mx.Dtype | None = None


_F16, _BF16, _F32 = mx.float16, mx.bfloat16, mx.float32
# Edges of rows, chunks and threadgroups.
_EDGES = (
    Case(_BF16, 8, 64, 640, 16, B=1, C=6),
    Case(_BF16, 8, 128, 1152, 16, C=4, p=4),
    Case(_F32, 8, 32, 2048, 16, B=1, C=3, p=2),
    Case(_F16, 8, 32, 96, 1, B=3, C=9, p=5),
    Case(_BF16, 4, 64, 896, 16, B=1, C=4),
    Case(_F16, 4, 32, 640, 40, B=1, C=3, p=2),
    Case(_F32, 4, 128, 1152, 3, p=4),
    Case(_BF16, 5, 64, 640, 16, B=1),
    Case(_F32, 5, 32, 32, 7, C=8),
    Case(_F16, 6, 128, 896, 16, C=4, p=2),
    Case(_BF16, 6, 32, 2048, 13, B=1, C=3),
    Case(_BF16, 0, 32, 640, 16),
    Case(_F16, 0, 32, 1152, 24, B=1, C=3, p=2),
    Case(_F32, 0, 32, 896, 16, B=1, C=3, p=1),
    Case(_F32, 0, 32, 32, 128, B=1, C=1, p=1),
    # Scales may be finer than states.
    Case(_BF16, 4, 64, 640, 16, scales=_F16),
    Case(_BF16, 8, 64, 640, 16, scales=_F32),
    Case(_F16, 4, 64, 640, 16, scales=_F32),
)
# Every format, with sizes that go round.
_FORMATS = tuple(
    Case(
        *(dtype, bits, group_size, (128, 640, 896, 1152, 2048)[i % 5]),
        *((1, 5, 16, 33)[i % 4], 2, 4, 3),
    )
    for i, (dtype, (bits, group_size)) in enumerate(
        itertools.product(
            (_F16, _BF16, _F32),
            ((0, 32), *itertools.product((4, 5, 6, 8), (32, 64, 128))),
        )
    )
)
# What tests, the doctor and the check on a GPU run.
CASES = (*_EDGES, *_FORMATS)


def largest(case: Case) -> int:
    """Threads of a threadgroup: the same in all cases."""
    return _THREADS


def inputs(case: Case) -> tuple[mx.array, mx.array, mx.array | None, mx.array | None]:
    """Hidden states, rows, scales and biases of a case."""
    keys = mx.random.split(mx.random.key(case.D + case.m))
    x = mx.random.normal((case.B, case.D), key=keys[0]).astype(case.dtype)
    weight = mx.random.normal((case.C, case.m, case.D), key=keys[1]) * case.D**-0.5
    weight = weight.astype(case.scales or case.dtype)
    if not case.bits:
        return x, weight, None, None
    packed = mx.quantize(weight, group_size=case.group_size, bits=case.bits)
    return x, *packed


def probed(case: Case) -> tuple[mx.array, int]:
    """Probes of a case, different in each row and the last cluster among them, and how
    many rows are real."""
    C, p = case.C, case.p
    rows = [[(b + i * (C // p)) % C for i in range(p - 1)] for b in range(case.B)]
    probes = mx.array([[*sorted(row), C - 1] for row in rows], dtype=mx.uint32)
    return probes, C * case.m - case.m // 3


def check(case: Case, threads: int) -> None:
    """Raise unless the kernel matches its reference in this case."""
    probes, n_rows = probed(case)
    bits = case.bits or 8 * case.dtype.size
    args = (*inputs(case), probes, case.group_size, bits, n_rows)
    got, want = _launch(*args, threads), _reference(*args, exact=True)
    backend.expect_close("probe_logits", got, want, 1e-4)


def _check(code: Case, threads: int) -> None:
    """The cases of one piece of code: with a full and a half-empty threadgroup."""
    for p in (2, 3):
        check(code._replace(p=p), threads)


def _described(code: Case) -> str:
    """What a case's code depends on."""
    form = "rows"
    if code.bits:
        form = f"{code.bits} bits in groups of {code.group_size}"
        form += f", scales {backend.short(code.scales)}"
    return f"{backend.short(code.dtype)}, {form}, D {code.D}, m {code.m}"


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
    x: mx.array,
    weight: mx.array,
    scales: mx.array | None,
    biases: mx.array | None,
    probes: mx.array,
    group_size: int,
    bits: int,
    n_rows: int,
    exact: bool | None = None,
) -> mx.array:
    """:func:`probe_logits` in plain MLX."""
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
    return logits.reshape(B, p * m)


@lru_cache
def _sizes(n_rows: int) -> mx.array:
    return mx.array([n_rows], dtype=mx.uint32)


def _launch(
    x: mx.array,
    weight: mx.array,
    scales: mx.array | None,
    biases: mx.array | None,
    probes: mx.array,
    group_size: int,
    bits: int,
    n_rows: int,
    threads: int,
) -> mx.array:
    B, p = probes.shape
    m = weight.shape[1]
    return _kernel(
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
        ],
        groups=(-(-p * 32 // threads), B),
        threads=threads,
        outputs=[((B, p * m), mx.float32)],
    )[0]
