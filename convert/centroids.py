"""Centroids of clusters: mean rows, or unit directions."""

from __future__ import annotations

import numpy as np

from mlx_flashhead.compute.linalg import run_sums

from .clustering import Clustering


def mean_centroids(clustering: Clustering, weight: np.ndarray) -> np.ndarray:
    """Mean of each cluster's rows, float32 ``[C, D]``, for ``weight [V, D]``: its
    product with a hidden state is the cluster's exact mean logit."""
    sums = run_sums(weight, clustering.order, clustering.token_ids.shape[1])
    return sums / _sizes(clustering)[:, None]


def unit_centroids(clustering: Clustering, weight: np.ndarray) -> np.ndarray:
    """The paper's: directions of the sums of the rows' directions, ``[C, D]``."""
    x = weight / np.maximum(np.linalg.norm(weight, axis=1, keepdims=True), 1e-30)
    sums = run_sums(x, clustering.order, clustering.token_ids.shape[1])
    return sums / np.maximum(np.linalg.norm(sums, axis=1, keepdims=True), 1e-30)


def _sizes(clustering: Clustering) -> np.ndarray:
    """Tokens in each cluster, ``[C]``: padding does not count."""
    return (clustering.token_ids < clustering.vocab_size).sum(1)
