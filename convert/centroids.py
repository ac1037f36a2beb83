"""Centroids of clusters: mean rows, fitted to their log-mass, or unit directions."""

from __future__ import annotations

import numpy as np

from mlx_flashhead.compute.linalg import matmul, place, run_sums

from . import masses
from .clustering import Clustering
from .progress import Progress, silent


def mean_centroids(clustering: Clustering, weight: np.ndarray) -> np.ndarray:
    """Mean of each cluster's rows, float32 ``[C, D]``, for ``weight [V, D]``: its
    product with a hidden state is the cluster's exact mean logit."""
    sums = run_sums(weight, clustering.order, clustering.token_ids.shape[1])
    return sums / _sizes(clustering)[:, None]


def fitted_centroids(
    clustering: Clustering,
    weight: np.ndarray,
    states: np.ndarray,
    *,
    bias: np.ndarray | None = None,
    progress: Progress = silent,
) -> np.ndarray:
    """Mean rows, corrected to predict a cluster's log-mass, float32 ``[C, D]``.

    What a cluster is worth is the log of its mean ``exp(logit)``, which its likely
    tokens rule, not its mean logit. What the mean row lacks of it is fitted by least
    squares over calibration states, in closed form: all clusters share one matrix.
    The ridge weighs as much as D states that look into every direction alike, so that
    a short text changes little, and directions that it does not show keep the mean.
    Constants are left to the bonus and the excess.

    Args:
        clustering: Which tokens stand together.
        weight: Rows of the head, float32 ``[V, D]``.
        states: Calibration states, float32 ``[n, D]``.
        bias: The head's bias, ``[V]``.
        progress: Shows the stage.
    """
    centroids = mean_centroids(clustering, weight)
    centred = (states - states.mean(0)).astype(np.float64)
    scatter = centred.T @ centred
    # States that are all the same leave nothing to fit.
    ridge = max(np.trace(scatter) / len(states), 1e-30) * np.eye(len(scatter))
    solve = place(np.linalg.solve(scatter + ridge, centred.T).T.astype(np.float32))
    right = place(np.ascontiguousarray(states.T))
    title = "Fitting centroids"
    for s, real, logits in masses.logits(
        clustering, weight, right, bias=bias, title=title, progress=progress
    ):
        # On a GPU the logits are MLX's, which needs no memory to work in.
        scratch = logits if isinstance(logits, np.ndarray) else None
        lacking = masses.log_mass(logits, real, scratch=scratch)
        lacking -= matmul(centroids[s], right)
        lacking -= lacking.mean(-1, keepdims=True)
        centroids[s] += matmul(lacking, solve)
    return centroids


def unit_centroids(clustering: Clustering, weight: np.ndarray) -> np.ndarray:
    """The paper's: directions of the sums of the rows' directions, ``[C, D]``."""
    x = weight / np.maximum(np.linalg.norm(weight, axis=1, keepdims=True), 1e-30)
    sums = run_sums(x, clustering.order, clustering.token_ids.shape[1])
    return sums / np.maximum(np.linalg.norm(sums, axis=1, keepdims=True), 1e-30)


def _sizes(clustering: Clustering) -> np.ndarray:
    """Tokens in each cluster, ``[C]``: padding does not count."""
    return (clustering.token_ids < clustering.vocab_size).sum(1)
