"""Calibration: what a cluster's score lacks, and the mass of what is not probed."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import mlx.core as mx
import numpy as np

from mlx_flashhead.compute.device import on_gpu
from mlx_flashhead.compute.linalg import Array, matmul, place
from mlx_flashhead.evaluation.fidelity import (
    Distribution,
    centroid_logits,
    probed_clusters,
)
from mlx_flashhead.head import ALWAYS, FlashHead, Transform
from mlx_flashhead.head import masses as estimates

from . import masses
from .clustering import Clustering
from .progress import Progress, silent
from .statistics import TEMPERATURES, Statistics

# The tail offset is fitted on one in this many of the states of the mean masses.
TAIL_STRIDE = 3


def calibrate(
    head: FlashHead,
    clustering: Clustering,
    weight: np.ndarray,
    statistics: Statistics,
    *,
    bias: np.ndarray | None = None,
    use_spread: bool = True,
    progress: Progress = silent,
) -> FlashHead:
    """Fit what a cluster's score lacks, and the mass of what is not probed.

    A cluster is wanted for its best row, not for its mean: its bonus (``spread``) is
    the mean plus one standard deviation, over calibration states, of the best logit
    in it less the score that its stored centroid gives. That also makes up for the
    centroid's quantization.

    Args:
        head: What :func:`pack` gave.
        clustering: Which tokens stand together.
        weight: Rows of the head, float32 ``[V, D]``.
        statistics: Of the clusters.
        bias: The head's bias, ``[V]``.
        use_spread: Whether to add the bonus; the paper has none.
        progress: Shows the stages.

    Returns:
        A head that shares its tables with the one that was given.
    """
    spread, excess = _lacking(head, clustering, statistics, bias)
    if not use_spread:
        spread = np.zeros_like(spread)
    spread[: clustering.n_always] = ALWAYS
    head = _with(head, spread, excess, (0.0,) * len(TEMPERATURES))
    states = statistics.some[::TAIL_STRIDE]
    offsets = _tail_offsets(head, clustering, weight, states, bias, progress)
    return _with(head, spread, excess, offsets)


def _lacking(
    head: FlashHead,
    clustering: Clustering,
    statistics: Statistics,
    bias: np.ndarray | None,
) -> tuple[np.ndarray, np.ndarray]:
    """Per cluster, over the states: mean + standard deviation of (best logit - score)
    and, at each of TEMPERATURES, mean of (log mean exp(logit / T) - score / T), logits
    and scores there being the model's."""
    centroids = np.array(head.centroids.dequantize(mx.float32))
    variance = statistics.best_variance - 2 * np.einsum(
        "cd,cd->c", centroids, statistics.best_covariance
    )
    variance += np.einsum(
        "cd,cd->c", centroids, matmul(centroids, statistics.covariance)
    )
    scores = matmul(centroids, np.ascontiguousarray(statistics.some.T))
    mean = centroids @ statistics.mean
    if bias is not None:
        real = masses.is_real(clustering, slice(None))
        of_rows = np.where(real, bias[masses.rows_of(clustering)], 0)
        of_rows = of_rows.sum(-1) / real.sum(-1)
        mean += of_rows
        scores += of_rows[:, None]
    spread = statistics.best - mean + np.sqrt(np.maximum(variance, 0))
    score = (head.transform or Transform())(scores).mean(-1)
    excess = statistics.log_mean_exp - score / np.array(TEMPERATURES)[:, None]
    return spread.astype(np.float32), excess.astype(np.float32)


def _tail_offsets(
    head: FlashHead,
    clustering: Clustering,
    weight: np.ndarray,
    states: np.ndarray,
    bias: np.ndarray | None,
    progress: Progress,
) -> tuple[float, ...]:
    """At each of TEMPERATURES the shift of the estimated log-masses with the least mean
    KL over the states: see :meth:`~.fidelity.Distribution.fit_shift`."""
    order = masses.rows_of(clustering)
    of_rows = None if bias is None else bias[order]

    def stored(s: slice) -> Array:
        rows = head.rows.map(lambda a: a[s].reshape(-1, a.shape[-1]))
        dense = rows.dequantize(mx.float32)
        return dense if on_gpu() else np.array(dense)

    def log_masses(rows: Callable[[slice], Array], title: str) -> np.ndarray:
        """Of all clusters, ``[n_temperatures, C, n]``."""
        shape = len(TEMPERATURES), head.n_clusters, len(states)
        found = np.empty(shape, np.float32)
        right = place(np.ascontiguousarray(states.T))
        for s, logits in masses.logits(
            clustering, rows, right, bias=of_rows, title=title, progress=progress
        ):
            logits = (head.transform or Transform())(logits)
            logits = masses.without_padding(logits, masses.is_real(clustering, s))
            top = logits.max(1)
            scratch = np.empty(logits.shape, np.float32)
            for i, t in enumerate(TEMPERATURES):
                found[i, s] = masses.log_masses(logits, top, t, scratch)
        return found

    true = log_masses(lambda s: weight[order[s].reshape(-1)], "Calibration: tail")
    own = log_masses(stored, "Calibration: tail, stored")
    scores = centroid_logits(head)(states)
    probed = probed_clusters(head.select(scores), head.n_clusters)
    offsets = []
    for i, t in enumerate(TEMPERATURES):
        tail = np.array(estimates.log_masses(head, scores, t))
        mass = np.exp(true[i].T - _log_sum(true[i].T, True)[:, None])
        terms = (
            np.zeros(len(states)),
            _log_sum(own[i].T, probed),
            _log_sum(tail, ~probed),
        )
        probed_mass = (mass * probed).sum(-1, dtype=np.float64)
        offsets.append(Distribution(probed_mass, terms).fit_shift())
    return tuple(offsets)


def _log_sum(x: np.ndarray, some: np.ndarray | bool) -> np.ndarray:
    """Log of the sum of ``exp(x[i])`` over some of ``x [n, C]``, float64 ``[n]``."""
    x = np.where(some, x, -np.inf)
    top = x.max(-1)
    safe = np.where(np.isfinite(top), top, 0)
    with np.errstate(divide="ignore"):
        return safe + np.log(np.exp(x - safe[:, None]).sum(-1, dtype=np.float64))


def _with(
    head: FlashHead,
    spread: np.ndarray,
    excess: np.ndarray,
    tail_offset: Sequence[float],
) -> FlashHead:
    """The same head with ``spread [C]``, ``excess [n_temperatures, C]`` and tail
    offsets at TEMPERATURES."""
    return FlashHead(
        head.rows,
        head.centroids,
        head.token_ids,
        head.vocab_size,
        spread=mx.array(spread),
        excess=mx.array(excess),
        temperatures=TEMPERATURES,
        tail_offset=tail_offset,
        n_probes=head.n_probes,
        bias=head.get("bias"),
        transform=head.transform,
    )
