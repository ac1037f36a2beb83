"""Exact logits of the probed clusters' rows (arXiv 2603.14591, stage 2)."""

import itertools
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import mlx.core as mx

from . import backend
from .rows import INPUTS, METAL, Rows

# What stands before: where a thread is. A kernel that goes on with the logits FINDS
# them in threadgroup memory as well, and all its threads come to its barriers.
BEGIN = """
    constexpr int SIMDGROUPS = THREADS / 32;
    static_assert(THREADS % 32 == 0, "whole simdgroups");
    uint simd_lid = thread_index_in_simdgroup;
    uint simd_gid = simdgroup_index_in_threadgroup;
    uint batch = threadgroup_position_in_grid.y;
    uint n_probes = probes_shape[1];
    uint probe = threadgroup_position_in_grid.x * SIMDGROUPS + simd_gid;
    threadgroup float found[FINDS ? SIMDGROUPS * M : 1];
"""

# One simdgroup scores one probed cluster, whose rows lie one after another, four rows
# side by side: eight lanes share a row.
SCORE = """
    constexpr int ROWS = M > 12 ? 4 : (M + 3) / 4;
    constexpr int CHUNKS = (M + 4 * ROWS - 1) / (4 * ROWS);
    static_assert(M >= 1, "a cluster has rows");
    uint n_rows = sizes[0];
    if (probe < n_probes) {
        size_t out = size_t(batch) * n_probes + probe;
        uint first = probes[out] * M;
        for (int chunk = 0; chunk < CHUNKS; chunk++) {
            uint numbers[ROWS];
            float values[ROWS];
#pragma unroll
            for (int r = 0; r < ROWS; r++) {
                uint row = (chunk * ROWS + r) * 4 + simd_lid / 8;
                numbers[r] = min(first + min(row, uint(M - 1)), n_rows - 1);
            }
            score_rows<T, D, BITS, GROUP_SIZE, QUANTIZED, ROWS, 8>(
                (const device uint*)(x + size_t(batch) * D),
                (const device uint*)weight, scales, biases, numbers, simd_lid % 8,
                values);
#pragma unroll
            for (int r = 0; r < ROWS; r++) {
                float value = values[r];
                uint row = (chunk * ROWS + r) * 4 + simd_lid / 8;
                bool real = row < uint(M) && first + row < n_rows;
                if (row < uint(M) && simd_lid % 8 == 0) {
                    if (BIASED && real) {
                        value += load(bias, first + row);
                    }
                    value = real ? value : -INFINITY;
                    logits[out * M + row] = value;
                    if (FINDS) {
                        found[simd_gid * M + row] = value;
                    }
                }
            }
        }
    }
"""

# Two clusters to a threadgroup: small groups spread over all cores.
THREADS = 64

_kernel = backend.Kernel(
    "probe_logits",
    [*INPUTS, "probes", "sizes"],
    ["logits"],
    BEGIN + SCORE,
    METAL,
)


def probe_logits(rows: Rows, probes: mx.array) -> mx.array:
    """Logits of all rows of the probed clusters, accumulated in float32.

    Args:
        rows (Rows): Hidden states ``[B, D]``, float16, bfloat16 or float32, with D a
          multiple of 32, and rows in cluster order: ``[C, m, D]`` in the dtype of x, or
          uint32 ``[C, m, D * bits / 32]`` as :func:`mlx.core.quantize` packs them in
          its affine mode, in 4, 5, 6 or 8 bits and groups of 32, 64 or 128, with
          scales and biases ``[C, m, D / group_size]``, floating; m from 1 to 128.
        probes (mx.array): Clusters to score, uint32 ``[B, p]``, each below C.

    Returns:
        mx.array: Logits, float32 ``[B, p * m]``, cluster after cluster; ``-inf`` where
        the number of the row is not below ``n_rows``, which is padding.

    Raises:
        ValueError: If shapes, dtypes, ``bits`` or ``group_size`` do not fit.
    """
    validate(rows, probes)
    if not probes.size:
        return mx.zeros((len(probes), probes.shape[1] * rows.weight.shape[1]))
    threads = threads_for("probe_logits", rows, partial(_check, case_of(rows)))
    return _launch(rows, probes, threads) if threads else reference(rows, probes)


def threads_for(name: str, rows: Rows, check: Callable[[int], None]) -> int:
    """With how many threads a kernel that scores rows runs; 0 where it cannot."""
    # Fewer than 8 words are no device buffer in Metal, and not worth a launch.
    if rows.weight.size < 8:
        return 0
    return backend.largest_group(f"{name}({rows})", THREADS, check)


class Case(NamedTuple):
    """Inputs of a launch: dtype of the hidden states, bits of a weight (0: it is not
    quantized), sizes as in :func:`probe_logits` with C clusters and p probes, the
    scales' dtype (by default that of the states) and the bias's, if there is one."""

    dtype: mx.Dtype
    bits: int
    group_size: int
    D: int
    m: int
    B: int = 2
    C: int = 5
    p: int = 3
    scales: mx.Dtype | None = None
    bias: mx.Dtype | None = None


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
    Case(_F16, 8, 64, 128, 16, bias=_F16),
    Case(_BF16, 0, 32, 96, 5, bias=_F32),
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
    return THREADS


def inputs(case: Case) -> Rows:
    """Hidden states and rows of a case."""
    keys = mx.random.split(mx.random.key(case.D + case.m), 3)
    x = mx.random.normal((case.B, case.D), key=keys[0]).astype(case.dtype)
    shape = (case.C, case.m, case.D)
    weight = mx.random.normal(shape, key=keys[1]) * case.D**-0.5
    weight, scales, biases = weight.astype(case.scales or case.dtype), None, None
    bits = case.bits or 8 * case.dtype.size
    if case.bits:
        weight, scales, biases = mx.quantize(
            weight, group_size=case.group_size, bits=bits
        )
    bias = None
    if case.bias is not None:
        bias = mx.random.normal(shape[:2], key=keys[2]).astype(case.bias)
    n_rows = case.C * case.m - case.m // 3
    return Rows(x, weight, scales, biases, bits, case.group_size, n_rows, bias)


def probed(case: Case) -> mx.array:
    """Probes of a case, different in each row and the last cluster among them."""
    C, p = case.C, case.p
    rows = [[(b + i * (C // p)) % C for i in range(p - 1)] for b in range(case.B)]
    return mx.array([[*sorted(row), C - 1] for row in rows], dtype=mx.uint32)


def case_of(rows: Rows) -> Case:
    """The case that runs the same code."""
    scales, bias = (None if a is None else a.dtype for a in (rows.scales, rows.bias))
    bits = 0 if scales is None else rows.bits
    return Case(
        *(rows.x.dtype, bits, rows.group_size, rows.x.shape[1], rows.weight.shape[1]),
        scales=scales,
        bias=bias,
    )


def check(case: Case, threads: int) -> None:
    """Raise unless the kernel matches its reference in this case."""
    rows, probes = inputs(case), probed(case)
    got, want = _launch(rows, probes, threads), reference(rows, probes, exact=True)
    backend.expect_close("probe_logits", got, want, 1e-4)


def _check(code: Case, threads: int) -> None:
    """The cases of one piece of code: with a full and a half-empty threadgroup."""
    for p in (2, 3):
        check(code._replace(p=p), threads)


def validate(rows: Rows, probes: mx.array) -> None:
    """Raise ValueError unless rows and probes are what :func:`probe_logits` takes."""
    validate_rows(rows)
    B = len(rows.x)
    if probes.ndim != 2 or probes.shape[0] != B or probes.dtype != mx.uint32:
        raise ValueError(
            f"probes must be uint32 [{B}, p], not {probes.dtype} {probes.shape}"
        )


def validate_rows(rows: Rows) -> None:
    """Raise ValueError unless rows are what :func:`probe_logits` takes."""
    x, weight, scales, biases, bits, group_size, n_rows, bias = rows
    if x.ndim != 2 or x.shape[1] % 32:
        raise ValueError(f"x must be [B, D] with D a multiple of 32, not {x.shape}")
    if weight.ndim != 3 or not 1 <= weight.shape[1] <= 128:
        raise ValueError(f"weight must be [C, m, D], m up to 128, not {weight.shape}")
    n = weight.shape[0] * weight.shape[1]
    if not 1 <= n_rows <= n:
        raise ValueError(f"n_rows must be from 1 to {n}, not {n_rows}")
    if bias is not None and bias.shape != weight.shape[:2]:
        raise ValueError(f"bias must be {weight.shape[:2]}, not {bias.shape}")
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


def _exact(rows: Rows, probes: mx.array) -> mx.array:
    """Logits in float32 from copies of the probed clusters. On a CPU this is also the
    fastest for packed rows: MLX's gather_qmm accumulates in the dtype of x there."""
    x = rows.x.astype(mx.float32)[:, None]

    def probed_rows(a: mx.array) -> mx.array:
        a = a[probes].reshape(len(probes), -1, a.shape[-1])
        return a if a.dtype == mx.uint32 else a.astype(mx.float32)

    if rows.scales is None or rows.biases is None:
        return x @ probed_rows(rows.weight).swapaxes(-1, -2)
    weight, scales, biases = map(probed_rows, (rows.weight, rows.scales, rows.biases))
    bits, group_size = rows.bits, rows.group_size
    if mx.default_device().type == mx.DeviceType.gpu:
        # On CUDA, MLX 0.32.4's product of these was zeros for some sizes.
        unpacked = mx.dequantize(
            weight, scales, biases, group_size=group_size, bits=bits
        )
        return x @ unpacked.swapaxes(-1, -2)
    return mx.quantized_matmul(
        *(x, weight, scales, biases), transpose=True, group_size=group_size, bits=bits
    )


# What the C library keeps for the next copy: larger ones it gives back to the system
# each time, and the system's pages cost more than the products (glibc: 32 MB).
_COPY_BYTES = 16 << 20


def _at_once(rows: Rows, B: int) -> int:
    """Clusters of B states whose copies are no larger than that."""
    return max(1, _COPY_BYTES * len(rows.weight) // (rows.weight.nbytes * max(B, 1)))


def _gathered(rows: Rows, probes: mx.array) -> mx.array:
    """Logits without a copy of the clusters, in the precision of x."""
    x = rows.x[:, None, None]
    if rows.scales is None:
        return mx.gather_mm(x, rows.weight.swapaxes(-1, -2), rhs_indices=probes)
    return mx.gather_qmm(
        x,
        rows.weight,
        rows.scales,
        rows.biases,
        rhs_indices=probes,
        transpose=True,
        group_size=rows.group_size,
        bits=rows.bits,
    )


def reference(rows: Rows, probes: mx.array, exact: bool | None = None) -> mx.array:
    """:func:`probe_logits` in plain MLX.

    Args:
        exact: Whether logits are float32's; by default on a CPU, where MLX's gather_mm
            makes all rows contiguous first.
    """
    B, p = probes.shape
    C, m = rows.weight.shape[:2]
    if exact is None:
        exact = mx.default_device().type != mx.DeviceType.gpu
    if exact:
        parts = mx.split(probes, range(0, p, _at_once(rows, B))[1:], axis=1)
        logits = mx.concatenate([_exact(rows, part) for part in parts], axis=-1)
    else:
        logits = _gathered(rows, probes)
    logits = logits.astype(mx.float32).reshape(B, p, m)
    if rows.bias is not None:
        logits = logits + rows.bias[probes]
    if rows.n_rows < C * m:
        numbers = probes[..., None] * m + mx.arange(m, dtype=mx.uint32)
        logits = mx.where(numbers < rows.n_rows, logits, -mx.inf)
    return logits.reshape(B, p * m)


def groups(n_probes: int, threads: int) -> int:
    """Threadgroups for so many clusters of a row."""
    return -(-n_probes * 32 // threads)


def _launch(rows: Rows, probes: mx.array, threads: int) -> mx.array:
    B, p = probes.shape
    return _kernel(
        [*rows.inputs, probes, backend.words((rows.n_rows,))],
        template=[*rows.template, ("FINDS", False)],
        groups=(groups(p, threads), B),
        threads=threads,
        outputs=[((B, p * rows.weight.shape[1]), mx.float32)],
    )[0]
