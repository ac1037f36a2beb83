"""Balanced clustering of the vocabulary (paper, section 3.1).

Every cluster holds the same number of tokens, so that the rows of a cluster are one
block of fixed size. Three things beyond the paper's spherical k-means:

- *Hidden-state metric.* What is clustered are the directions of ``w M^(1/2)`` with
  ``M = S + (tr S / D) I`` and ``S = E[h h^T]`` over calibration states: distances
  are then expected differences of logits. The identity keeps directions that the
  calibration text does not show.
- *Hierarchical start.* Coarse groups, then clusters within each, then balanced
  rounds in which a token looks at the clusters of the groups near its own. It is
  many times cheaper than k-means over all clusters at once, and ends better.
- *Nobody is orphaned.* A token that finds its near clusters full goes to the nearest
  one with room, never to an arbitrary one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from mlx_flashhead.compute.linalg import group_sums, matmul, nearest, place, run_sums

from .progress import Progress, silent

# Clusters that a token may propose to in one balanced round.
N_CANDIDATES = 48
# Groups, nearest to its own, in which a token looks for clusters: in the last round,
# and in those before, whose centroids still move.
N_NEAR_GROUPS, N_NEAR_AT_FIRST = 16, 6
N_COARSE_ITERATIONS = 8
N_FINE_ITERATIONS = 4


@dataclass(frozen=True)
class Clustering:
    """Which tokens stand together.

    Attributes:
        token_ids: int64 ``[C, m]``, a permutation of the vocabulary in front of the
          padding, which is ``vocab_size`` and stands at the end of the last cluster.
        vocab_size: Number of tokens V.
        n_always: The first clusters, which are probed at every step.
    """

    token_ids: np.ndarray
    vocab_size: int
    n_always: int = 0

    @property
    def order(self) -> np.ndarray:
        """Tokens in cluster order, without padding, ``[V]``."""
        return self.token_ids.reshape(-1)[: self.vocab_size]


def metric_factor(second_moment: np.ndarray) -> np.ndarray:
    """L with ``L L^T = S + (tr S / D) I``, float32 ``[D, D]``; ``w L`` stands for
    ``w M^(1/2)``, from which it differs by a rotation."""
    s = second_moment.astype(np.float64)
    return np.linalg.cholesky(s + np.trace(s) / len(s) * np.eye(len(s))).astype(
        np.float32
    )


def directions(weight: np.ndarray, factor: np.ndarray | None) -> np.ndarray:
    """Unit rows of ``weight [V, D]``, seen through the metric where one is given."""
    x = weight.astype(np.float32) if factor is None else matmul(weight, factor)
    return _unit(x)


def cluster(
    x: np.ndarray,
    cluster_size: int,
    *,
    always: np.ndarray | None = None,
    seed: int = 0,
    n_rounds: int = 3,
    progress: Progress = silent,
) -> Clustering:
    """Cluster the rows of x into groups of exactly ``cluster_size``.

    Args:
        x: Unit directions, float32 ``[V, D]``.
        cluster_size: Tokens per cluster, m.
        always: Tokens that get clusters of their own, in front, in this order; as
          many as fill whole clusters.
        seed: Seed of every random choice; the same seed gives the same result.
        n_rounds: Balanced rounds.
        progress: Shows the stages.
    """

    def make(rest: np.ndarray) -> np.ndarray:
        return balanced(x[rest], cluster_size, seed, n_rounds, progress)

    return with_always(len(x), cluster_size, always, make)


def with_always(
    vocab_size: int,
    cluster_size: int,
    always: np.ndarray | None,
    make: Callable[[np.ndarray], np.ndarray],
) -> Clustering:
    """Clusters of the tokens that are always probed, in front of those that ``make``
    gives for the other tokens: their members ``[C, m]``, ``len(tokens)`` as padding."""
    always = np.empty(0, np.int64) if always is None else np.asarray(always, np.int64)
    n_always = min(len(always), vocab_size) // cluster_size
    always = always[: n_always * cluster_size]
    rest = np.setdiff1d(np.arange(vocab_size), always)
    if len(rest):
        rest_ids = np.append(rest, vocab_size)[make(rest)]
    else:
        rest_ids = np.empty((0, cluster_size), np.int64)
    token_ids = np.concatenate([always.reshape(-1, cluster_size), rest_ids])
    return Clustering(token_ids, vocab_size, n_always)


def balanced(
    x: np.ndarray, cluster_size: int, seed: int, n_rounds: int, progress: Progress
) -> np.ndarray:
    """Members ``[C, m]`` of each cluster as rows of x; ``len(x)`` is padding."""
    n = len(x)
    n_clusters = -(-n // cluster_size)
    room = np.full(n_clusters, cluster_size)
    room[-1] = n - (n_clusters - 1) * cluster_size
    rng = np.random.default_rng(seed)
    centroids, group = _hierarchical_start(x, n_clusters, rng, progress)
    for i in range(n_rounds):
        stage = f"Clustering: balanced round {i + 1}/{n_rounds}"
        n_near = N_NEAR_GROUPS if i == n_rounds - 1 else N_NEAR_AT_FIRST
        candidates, similarity = _near_clusters(
            x, centroids, group, n_near, progress, stage
        )
        owner = match(candidates, similarity, room)
        owner = place_leftovers(x, centroids, owner, room)
        order = np.argsort(owner, kind="stable")
        centroids = _unit(run_sums(x, order, cluster_size))
    members = np.full((n_clusters, cluster_size), n)
    starts = np.concatenate([[0], np.cumsum(room)[:-1]])
    members[owner[order], np.arange(n) - starts[owner[order]]] = order
    return members


def match(
    candidates: np.ndarray, similarity: np.ndarray, room: np.ndarray
) -> np.ndarray:
    """Give tokens to clusters with limited room, best similarity first.

    Deferred acceptance: a token proposes to its candidates in turn, and a full
    cluster keeps its most similar tokens. As both sides rank by the same similarity,
    this is what going through all pairs from the most similar down would give.

    Args:
        candidates: Clusters in order of preference, int ``[n, k]``.
        similarity: Theirs, float32 ``[n, k]``, descending.
        room: Tokens that each cluster can take, int ``[C]``.

    Returns:
        Cluster of each token, int64 ``[n]``; -1 where all candidates were full.
    """
    n, k = candidates.shape
    turn = np.zeros(n, np.int64)
    owner = candidates[:, 0].astype(np.int64)
    closeness = similarity[:, 0].copy()
    proposing = np.arange(n)
    while proposing.size:
        contested = np.zeros(len(room), bool)
        contested[owner[proposing]] = True
        rivals = np.flatnonzero((owner >= 0) & contested[owner])
        order = rivals[np.lexsort((-closeness[rivals], owner[rivals]))]
        ranked = owner[order]
        first = np.flatnonzero(np.r_[True, ranked[1:] != ranked[:-1]])
        rank = np.arange(len(order)) - np.repeat(
            first, np.diff(np.r_[first, len(order)])
        )
        rejected = order[rank >= room[ranked]]
        turn[rejected] += 1
        owner[rejected] = -1
        proposing = rejected[turn[rejected] < k]
        owner[proposing] = candidates[proposing, turn[proposing]]
        closeness[proposing] = similarity[proposing, turn[proposing]]
    return owner


def place_leftovers(
    x: np.ndarray, centroids: np.ndarray, owner: np.ndarray, room: np.ndarray
) -> np.ndarray:
    """Give every token without a cluster the nearest one that has room."""
    while (left := np.flatnonzero(owner < 0)).size:
        free = room - np.bincount(owner[owner >= 0], minlength=len(room))
        open_clusters = np.flatnonzero(free > 0)
        k = min(N_CANDIDATES, len(open_clusters))
        candidates, similarity = nearest(x[left], centroids[open_clusters], k)
        placed = match(candidates, similarity, free[open_clusters])
        owner[left] = np.where(placed >= 0, open_clusters[placed], -1)
    return owner


def _hierarchical_start(
    x: np.ndarray, n_clusters: int, rng: np.random.Generator, progress: Progress
) -> tuple[np.ndarray, np.ndarray]:
    """Centroids ``[C, D]`` and the coarse group of each, ``[C]``."""
    n_groups = max(1, round(n_clusters**0.5))
    with progress("Clustering: coarse groups", N_COARSE_ITERATIONS) as step:
        coarse = _kmeans(x, n_groups, N_COARSE_ITERATIONS, rng, step)
    group_of = nearest(x, coarse, 1)[0][:, 0]
    sizes = np.bincount(group_of, minlength=n_groups)
    counts = _apportion(sizes, n_clusters)
    centroids = []
    with progress("Clustering: within groups", n_groups) as step:
        for g in range(n_groups):
            if counts[g]:
                members = x[group_of == g]
                centroids.append(
                    _kmeans(members, int(counts[g]), N_FINE_ITERATIONS, rng)
                )
            step()
    return np.concatenate(centroids), np.repeat(np.arange(n_groups), counts)


def _apportion(sizes: np.ndarray, total: int) -> np.ndarray:
    """Whole shares of total in proportion to sizes (largest remainders)."""
    exact = sizes * (total / sizes.sum())
    shares = np.floor(exact).astype(np.int64)
    extra = np.argsort(shares - exact, kind="stable")[: total - shares.sum()]
    shares[extra] += 1
    return shares


def _kmeans(
    x: np.ndarray,
    k: int,
    n_iterations: int,
    rng: np.random.Generator,
    step: Callable[[], None] = lambda: None,
) -> np.ndarray:
    """Plain spherical k-means: unit centroids ``[k, D]`` of unit rows x."""
    # Fewer rows than centroids can happen in a small group: some start twice.
    start = rng.choice(len(x), k, replace=len(x) < k)
    centroids, placed = x[start], place(x)
    for _ in range(n_iterations):
        owner = nearest(placed, centroids, 1)[0][:, 0]
        means = _unit(group_sums(placed, owner, k))
        empty = np.bincount(owner, minlength=k) == 0
        means[empty] = x[rng.choice(len(x), empty.sum())]
        centroids = means
        step()
    return centroids


def _near_clusters(
    x: np.ndarray,
    centroids: np.ndarray,
    group: np.ndarray,
    n_near: int,
    progress: Progress,
    stage: str,
) -> tuple[np.ndarray, np.ndarray]:
    """Each token's nearest clusters, sought in the n_near groups near its own."""
    names, start = np.unique(group, return_index=True)
    heads = _unit(np.add.reduceat(centroids, start, axis=0))
    k = min(N_CANDIDATES, len(centroids))
    own = nearest(x, heads, 1)[0][:, 0]
    near = nearest(heads, heads, min(n_near, len(heads)))[0]
    members = np.split(np.arange(len(centroids)), start[1:])
    candidates = np.empty((len(x), k), np.int32)
    similarity = np.empty((len(x), k), np.float32)
    with progress(stage, len(names)) as step:
        for g in range(len(names)):
            tokens = np.flatnonzero(own == g)
            pool = np.concatenate([members[i] for i in near[g]])
            if len(pool) < k:
                pool = np.arange(len(centroids))
            if tokens.size:
                best, value = nearest(x[tokens], centroids[pool], k)
                candidates[tokens], similarity[tokens] = pool[best], value
            step()
    return candidates, similarity


def _unit(x: np.ndarray) -> np.ndarray:
    norm = np.linalg.norm(x, axis=-1, keepdims=True)
    return x / np.maximum(norm, np.finfo(np.float32).tiny)
