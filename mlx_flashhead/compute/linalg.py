"""Large products: through MLX on a GPU, through NumPy on a CPU,
whose BLAS is many times faster than the one in MLX's CPU back-end."""

from __future__ import annotations

from collections.abc import Iterator

import mlx.core as mx
import numpy as np

from .device import on_gpu
from .table import Table

# Large arrays are where they were computed, small ones NumPy's.
Array = np.ndarray | mx.array

# Entries of one block of similarities or logits: 128 MiB of float32.
BLOCK = 1 << 25
# Its rows at most: MLX's CUDA back-end cannot sort more at once.
MAX_ROWS = 65_535


def product(a: Array, b: Array) -> Array:
    """``a [n, k] @ b [k, m]`` in float32, left where it was computed."""
    return mx.array(a) @ mx.array(b) if on_gpu() else a @ b


def matmul(a: Array, b: Array) -> np.ndarray:
    """``a [n, k] @ b [k, m]`` in float32."""
    return np.asarray(product(a, b))


def place(a: np.ndarray) -> Array:
    """The array where large products of it are computed."""
    return mx.array(a) if on_gpu() else a


def group_sums(x: Array, group: np.ndarray, n_groups: int) -> np.ndarray:
    """The sum of each group's rows, float32 ``[n_groups, D]``.

    Args:
        x: float32 ``[n, D]``, where :func:`place` has put it.
        group: That of each row, ints ``[n]``.
    """
    sums = np.zeros((n_groups, x.shape[1]), np.float32)
    if isinstance(x, mx.array):
        # A product, for additions in no fixed order would not repeat.
        names, total = mx.arange(n_groups)[:, None], mx.array(sums)
        for s in blocks(len(x), n_groups):
            total += (mx.array(group[s])[None] == names).astype(x.dtype) @ x[s]
        return np.array(total)
    # One by one: ``np.add.reduceat`` takes twenty times as long.
    ends = np.cumsum(np.bincount(group, minlength=n_groups))
    for i, rows in enumerate(np.split(np.argsort(group, kind="stable"), ends[:-1])):
        x[rows].sum(0, out=sums[i])
    return sums


def run_sums(x: np.ndarray, order: np.ndarray, length: int) -> np.ndarray:
    """The sum of every ``length`` rows of ``x[order]``, of fewer in the end, float32
    ``[ceil(n / length), D]``, for float32 ``x [., D]`` and ints ``order [n]``."""
    sums = np.empty((-(-len(order) // length), x.shape[1]), np.float32)
    whole = len(order) // length
    for s in blocks(whole, length * x.shape[1]):
        rows = order[s.start * length : s.stop * length]
        x[rows].reshape(-1, length, x.shape[1]).sum(1, out=sums[s])
    if whole < len(sums):
        sums[-1] = x[order[whole * length :]].sum(0)
    return sums


class Product:
    """``x [n, D]`` times every row of a matrix ``[N, D]``, for x after x, float32
    ``[n, N]``, left where it was computed. On a CPU the rows of a table are
    dequantized once.

    Args:
        rows: float32 array, or a :class:`~mlx_flashhead.compute.table.Table`.
    """

    def __init__(self, rows: np.ndarray | Table):
        if on_gpu():
            array = isinstance(rows, np.ndarray)
            self._rows = Table(mx.array(rows), bits=32) if array else rows
        elif isinstance(rows, Table):
            self._rows = np.asarray(rows.dequantize(mx.float32))
        else:
            self._rows = rows

    def __call__(self, x: np.ndarray) -> Array:
        if isinstance(self._rows, Table):
            # Not MLX's quantized product: for each size of x, CUDA compiles another,
            # which takes 25 seconds.
            return mx.array(x) @ self._rows.dequantize(mx.float32).T
        return x @ self._rows.T


def blocks(n: int, width: int) -> Iterator[slice]:
    """Slices that cover n rows, each of at most BLOCK entries of the given width."""
    step = max(1, min(MAX_ROWS, BLOCK // max(1, width)))
    for start in range(0, n, step):
        yield slice(start, min(n, start + step))


def nearest(x: Array, centroids: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The k centroids with the largest inner product with each row of x.

    Args:
        x: float32 ``[n, D]``, where :func:`place` has put it or not.
        centroids: float32 ``[C, D]``, with C >= k.

    Returns:
        Indices int32 and similarities float32, both ``[n, k]``, best first.
    """
    n, n_centroids = len(x), len(centroids)
    ids = np.empty((n, k), np.int32)
    similarity = np.empty((n, k), np.float32)
    right = mx.array(centroids).T if on_gpu() else None
    for s in blocks(n, n_centroids):
        if right is not None:
            products = mx.array(x[s]) @ right
            if k == 1:
                top = mx.argmax(products, axis=-1, keepdims=True)
            else:
                # MLX sorts for ``argpartition``, too.
                top = mx.argsort(-products, axis=-1)[:, :k]
            best = np.array(top)
            value = np.array(mx.take_along_axis(products, top, axis=-1))
        else:
            block = x[s] @ centroids.T
            if k == 1:
                best = block.argmax(-1)[:, None]
            elif k < n_centroids:
                best = np.argpartition(block, n_centroids - k, axis=-1)[:, -k:]
            else:
                best = np.broadcast_to(np.arange(k), block.shape)
            value = np.take_along_axis(block, best, axis=-1)
            if k > 1:
                # Ties go to the lower index, so that the result is a pure function.
                order = np.lexsort((best, -value), axis=-1)
                best = np.take_along_axis(best, order, axis=-1)
                value = np.take_along_axis(value, order, axis=-1)
        ids[s], similarity[s] = best, value
    return ids, similarity
