"""Logits of all centroids (arXiv 2603.14591, stage 1)."""

from functools import partial

import mlx.core as mx

from . import backend, probe_logits
from .probe_logits import Case
from .rows import INPUTS, METAL, Rows

# A simdgroup scores ROWS * 32 / LANES centroids that lie one after another.
_SOURCE = """
    static_assert(THREADS % 32 == 0, "whole simdgroups");
    constexpr uint SIDE_BY_SIDE = 32 / LANES;
    uint simd_lid = thread_index_in_simdgroup;
    uint simd_gid = simdgroup_index_in_threadgroup;
    uint batch = threadgroup_position_in_grid.y;
    uint n_clusters = weight_shape[0];
    uint first = threadgroup_position_in_grid.x * (THREADS / 32) + simd_gid;
    first = first * ROWS * SIDE_BY_SIDE + simd_lid / LANES;
    uint numbers[ROWS];
    float sums[ROWS];
#pragma unroll
    for (uint r = 0; r < ROWS; r++) {
        numbers[r] = min(first + r * SIDE_BY_SIDE, n_clusters - 1);
    }
    score_rows<T, D, BITS, GROUP_SIZE, QUANTIZED, ROWS, LANES>(
        (const device uint*)(x + size_t(batch) * D), (const device uint*)weight,
        scales, biases, numbers, simd_lid % LANES, sums);
#pragma unroll
    for (uint r = 0; r < ROWS; r++) {
        uint cluster = first + r * SIDE_BY_SIDE;
        if (cluster < n_clusters && simd_lid % LANES == 0) {
            logits[size_t(batch) * n_clusters + cluster] =
                BIASED ? sums[r] + load(bias, cluster) : sums[r];
        }
    }
"""

# Centroids that a lane has in flight, and lanes that share one: with four, sizes that
# are multiples of 128 leave none idle at the end of a row of 4 bits.
ROWS, LANES = 2, 4

# States that MLX's kernels score one by one, too; more of them share what is read.
FEW_STATES = 7

_kernel = backend.Kernel("centroid_logits", INPUTS, ["logits"], _SOURCE, METAL)


def preferred(rows: Rows) -> bool:
    """Whether this kernel takes the place of MLX's product. ``benchmarks/kernels.py
    --stage-1`` compares them on a GPU.

    With a bias, which MLX adds in a launch of its own, it does; and for quantized
    centroids, on Metal only for the sizes that MLX's fastest kernel does not take.
    """
    if not 0 < len(rows.x) <= FEW_STATES:
        return False
    if rows.bias is not None:
        return True
    return rows.scales is not None and (
        backend.kind() != "metal" or rows.x.shape[1] % 256 > 0
    )


def centroid_logits(rows: Rows) -> mx.array | None:
    """Logits of centroids, accumulated in float32; ``None`` where they are left to
    MLX's product.

    Args:
        rows (Rows): Hidden states ``[B, D]`` and the centroids, clusters of one row, as
          :func:`mlx_flashhead.kernels.probe_logits` takes them, with their bias.

    Returns:
        mx.array: Logits, float32 ``[B, C]``.

    Raises:
        ValueError: If shapes, dtypes, ``bits`` or ``group_size`` do not fit.
    """
    probe_logits.validate_rows(rows)
    if not preferred(rows):
        return None
    checked = partial(_check, probe_logits.case_of(rows))
    threads = probe_logits.threads_for("centroid_logits", rows, checked)
    return _launch(rows, threads) if threads else None


_F16, _BF16, _F32 = mx.float16, mx.bfloat16, mx.float32
# What tests, the doctor and the check on a GPU run: clusters of one row. Ends of rows,
# of simdgroups and of threadgroups; every format.
CASES = (
    Case(_BF16, 4, 64, 640, 1, B=1, C=67),
    Case(_BF16, 4, 64, 1152, 1, C=33, bias=_F32),
    Case(_F16, 4, 32, 2048, 1, B=1, C=32),
    Case(_F32, 4, 128, 896, 1, B=3, C=7, bias=_F32),
    Case(_BF16, 8, 64, 640, 1, C=31, scales=_F16),
    Case(_F32, 8, 32, 32, 1, C=5, bias=_F32),
    Case(_F16, 5, 64, 640, 1, B=1, C=35, bias=_F32),
    Case(_BF16, 6, 128, 1152, 1, C=16),
    Case(_BF16, 0, 32, 640, 1, B=1, C=40, bias=_F32),
    Case(_F32, 0, 32, 96, 1, C=65),
)


largest, inputs = probe_logits.largest, probe_logits.inputs


def check(case: Case, threads: int) -> None:
    """Raise unless the kernel matches its reference in this case."""
    rows = inputs(case)
    got, want = _launch(rows, threads), reference(rows)
    backend.expect_close("centroid_logits", got, want, 1e-4)


def _check(code: Case, threads: int) -> None:
    """A case of one piece of code, the last threadgroup of which has little to do."""
    check(code._replace(C=67), threads)


def reference(rows: Rows) -> mx.array:
    """:func:`centroid_logits` in plain MLX."""
    every = mx.arange(len(rows.weight), dtype=mx.uint32)
    every = mx.broadcast_to(every, (len(rows.x), len(every)))
    return probe_logits.reference(rows, every, exact=True)


def _launch(rows: Rows, threads: int) -> mx.array:
    B, C = len(rows.x), len(rows.weight)
    return _kernel(
        rows.inputs,
        template=[*rows.template, ("ROWS", ROWS), ("LANES", LANES)],
        groups=(-(-C // (ROWS * threads // LANES)), B),
        threads=threads,
        outputs=[((B, C), mx.float32)],
    )[0]
