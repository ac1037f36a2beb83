"""Logits of a clustering's rows, some clusters at a time, and what is summed over each
cluster's: on a GPU by MLX, on a CPU by NumPy, in whose hands both are fastest."""

from __future__ import annotations

from collections.abc import Iterator

import mlx.core as mx
import numpy as np

from mlx_flashhead.compute.linalg import BLOCK, Array, product

from .clustering import Clustering
from .progress import Progress, silent


def logits(
    clustering: Clustering,
    weight: np.ndarray,
    right: Array,
    *,
    bias: np.ndarray | None = None,
    title: str = "",
    progress: Progress = silent,
) -> Iterator[tuple[slice, np.ndarray, Array]]:
    """Some clusters at a time: which, what of their rows is no padding, bool
    ``[., m]``, and the rows' logits, float32 ``[., m, n]``.

    Args:
        weight: Rows of the head, float32 ``[V, D]``.
        right: Hidden states, float32 ``[D, n]``, where :func:`place` has put them.
        bias: The head's bias, ``[V]``.
        title, progress: What to show, and how.
    """
    c, m = clustering.token_ids.shape
    step_size = max(1, BLOCK // (right.shape[1] * m))
    with progress(title, -(-c // step_size)) as step:
        for start in range(0, c, step_size):
            s = slice(start, min(c, start + step_size))
            rows = rows_of(clustering, s)
            block = product(weight[rows.reshape(-1)], right).reshape(*rows.shape, -1)
            if bias is not None:
                block += _like(block, bias[rows][..., None])
            yield s, clustering.token_ids[s] < clustering.vocab_size, block
            step()


def rows_of(clustering: Clustering, s: slice) -> np.ndarray:
    """The rows of clusters s, ``[., m]``; some row that exists for padding."""
    ids = clustering.token_ids[s]
    return np.where(ids < clustering.vocab_size, ids, 0)


def best(logits: Array, real: np.ndarray) -> np.ndarray:
    """Largest logit of each cluster, float32 ``[., n]``.

    Args:
        logits: float32 ``[., m, n]``.
        real: What is no padding, bool ``[., m]``.
    """
    if isinstance(logits, mx.array):
        return np.array(mx.where(mx.array(real)[..., None], logits, -mx.inf).max(1))
    return np.max(logits, axis=1, where=real[..., None], initial=-np.inf)


def log_mass(
    logits: Array,
    real: np.ndarray,
    temperature: float = 1.0,
    scratch: np.ndarray | None = None,
) -> np.ndarray:
    """Log of ``sum(exp(logit / T))`` of each cluster, float32 ``[., n]``.

    Args:
        logits: float32 ``[., m, n]``.
        real: What is no padding, bool ``[., m]``.
        temperature: T.
        scratch: Memory to work in, of the logits' shape; a fresh array costs more than
            the sum. It can be the logits.
    """
    if isinstance(logits, mx.array):
        shown = mx.where(mx.array(real)[..., None], logits / temperature, -mx.inf)
        return np.array(mx.logsumexp(shown, axis=1))
    top = best(logits, real)
    below = np.subtract(logits, top[:, None], out=scratch)
    if temperature != 1:
        below /= temperature
    mass = np.sum(np.exp(below, out=below), axis=1, where=real[..., None])
    return top / temperature + np.log(mass)


def _like(block: Array, a: np.ndarray) -> Array:
    return mx.array(a) if isinstance(block, mx.array) else a
