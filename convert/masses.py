"""Logits of a clustering's rows, some clusters at a time, and what is summed over each
cluster's: on a GPU by MLX, on a CPU by NumPy, in whose hands both are fastest."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import mlx.core as mx
import numpy as np

from mlx_flashhead.compute.linalg import BLOCK, Array, product

from .clustering import Clustering
from .progress import Progress, silent


def logits(
    clustering: Clustering,
    rows: Callable[[slice], Array],
    right: Array,
    *,
    bias: np.ndarray | None = None,
    title: str = "",
    progress: Progress = silent,
) -> Iterator[tuple[slice, Array]]:
    """Some clusters at a time: which, and their rows' logits, float32 ``[., m, n]``;
    those of padding are some row's.

    Args:
        rows: Gives clusters' rows, float32 ``[. * m, D]``.
        right: Hidden states, float32 ``[D, n]``, where :func:`place` has put them.
        bias: Of each row, ``[C, m]``.
        title, progress: What to show, and how.
    """
    c, m = clustering.token_ids.shape
    step_size = max(1, BLOCK // (right.shape[1] * m))
    with progress(title, -(-c // step_size)) as step:
        for start in range(0, c, step_size):
            s = slice(start, min(c, start + step_size))
            block = product(rows(s), right).reshape(s.stop - start, m, -1)
            if bias is not None:
                block += _like(block, bias[s, :, None])
            yield s, block
            step()


def rows_of(clustering: Clustering, s: slice | None = None) -> np.ndarray:
    """The rows of clusters s, or of all, ``[., m]``; some row that exists for
    padding."""
    ids = clustering.token_ids if s is None else clustering.token_ids[s]
    return np.where(ids < clustering.vocab_size, ids, 0)


def is_real(clustering: Clustering, s: slice) -> np.ndarray:
    """What of the rows of clusters s is no padding, bool ``[., m]``."""
    return clustering.token_ids[s] < clustering.vocab_size


def without_padding(logits: Array, real: np.ndarray) -> Array:
    """Logits ``[., m, n]``, those of padding ``-inf``; NumPy's in their place."""
    if real.all():
        return logits
    if isinstance(logits, mx.array):
        return mx.where(mx.array(real)[..., None], logits, -mx.inf)
    logits[~real] = -np.inf
    return logits


def log_masses(
    logits: Array, top: Array, temperature: float, scratch: np.ndarray | None = None
) -> np.ndarray:
    """Log of ``sum(exp(logit / T))`` of each cluster, float32 ``[., n]``.

    Args:
        logits: float32 ``[., m, n]``, without padding.
        top: The largest of each cluster, ``[., n]``.
        temperature: T.
        scratch: Memory to work in, of the logits' shape; a fresh array costs more than
            the sum. It can be the logits.
    """
    if not isinstance(logits, np.ndarray):
        return np.array(mx.logsumexp(logits / temperature, axis=1))
    top = np.asarray(top)
    below = np.subtract(logits, top[:, None], out=scratch)
    if temperature != 1:
        below *= np.float32(1 / temperature)
    mass = np.exp(below, out=below).sum(axis=1)
    return top / np.float32(temperature) + np.log(mass)


def _like(block: Array, a: np.ndarray) -> Array:
    return mx.array(a) if isinstance(block, mx.array) else a
