"""What the logits of calibration states say of each cluster, in one pass over them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mlx_flashhead.compute.linalg import matmul, place
from mlx_flashhead.head import Transform

from . import masses
from .centroids import mean_centroids
from .clustering import Clustering
from .progress import Progress, silent
from .recipes import FULL

# Temperatures at which the mass of a cluster is fitted, falling.
TEMPERATURES = (2.0, 1.4, 1.0, 0.75, 0.55, 0.4, 0.3)


@dataclass(frozen=True)
class Statistics:
    """Per cluster, over calibration states.

    Attributes:
        fitted: Mean rows, corrected to predict the cluster's log-mass, ``[C, D]``.
        best: Mean of the best logit, ``[C]``.
        best_variance: Its variance, ``[C]``.
        best_covariance: Its covariance with the states, ``[C, D]``.
        log_mean_exp: At each of TEMPERATURES mean of ``log mean exp(logit / T)`` over
            ``some``, of logits as the model makes them, ``[n_temperatures, C]``.
        some: States of that mean, ``[., D]``.
        mean: Mean of the states, ``[D]``.
        covariance: Theirs, ``[D, D]``.
    """

    fitted: np.ndarray
    best: np.ndarray
    best_variance: np.ndarray
    best_covariance: np.ndarray
    log_mean_exp: np.ndarray
    some: np.ndarray
    mean: np.ndarray
    covariance: np.ndarray


def gather(
    clustering: Clustering,
    weight: np.ndarray,
    states: np.ndarray,
    *,
    bias: np.ndarray | None = None,
    transform: Transform | None = None,
    n_mass: int = FULL.n_mass,
    progress: Progress = silent,
) -> Statistics:
    """Look at the logits of all rows.

    What a cluster is worth is the log of its mean ``exp(logit)``, which its likely
    tokens rule, not its mean logit. What the mean row lacks of it is fitted by least
    squares, in closed form: all clusters share one matrix. The ridge weighs as much as
    D states that look into every direction alike, so that a short text changes little,
    and directions that it does not show keep the mean. Constants are left to the bonus
    and the excess.

    Args:
        clustering: Which tokens stand together.
        weight: Rows of the head, float32 ``[V, D]``.
        states: Calibration states, float32 ``[n, D]``.
        bias: The head's bias, ``[V]``.
        transform: What the model does to its logits.
        n_mass: States, at most, of the mean mass: it settles sooner than the rest, and
            costs an exponential per logit and temperature.
        progress: Shows the stage.
    """
    n, (c, d) = len(states), (len(clustering.token_ids), weight.shape[1])
    # Those of the mean mass come first.
    chosen = np.zeros(n, bool)
    chosen[:: -(-n // n_mass)] = True
    states = states[np.argsort(~chosen, kind="stable")]
    n_some = int(chosen.sum())
    mean = states.mean(0, dtype=np.float64)
    centred = states - mean.astype(np.float32)
    scatter = centred.T.astype(np.float64) @ centred
    # States that are all the same leave nothing to fit.
    ridge = max(np.trace(scatter) / n, 1e-30) * np.eye(d)
    solve = place(np.linalg.solve(scatter + ridge, centred.T).T.astype(np.float32))
    left, right = place(centred), place(np.ascontiguousarray(states.T))
    found = Statistics(
        mean_centroids(clustering, weight),
        *(np.empty(c, np.float32), np.empty(c, np.float32)),
        np.empty((c, d), np.float32),
        np.empty((len(TEMPERATURES), c), np.float32),
        *(states[:n_some], mean, scatter / n),
    )
    order = masses.rows_of(clustering)
    for s, logits in masses.logits(
        clustering,
        lambda s: weight[order[s].reshape(-1)],
        right,
        bias=None if bias is None else bias[order],
        title="Calibration: clusters",
        progress=progress,
    ):
        real = masses.is_real(clustering, s)
        sizes = real.sum(-1)
        some = (transform or Transform())(logits[..., :n_some])
        some = masses.without_padding(some, real)
        top = some.max(1)
        scratch = np.empty(some.shape, np.float32)
        for i, t in enumerate(TEMPERATURES):
            log_mass = masses.log_masses(some, top, t, scratch).mean(-1)
            found.log_mean_exp[i, s] = log_mass - np.log(sizes)
        logits = masses.without_padding(logits, real)
        top = logits.max(1)
        best = np.array(top)
        found.best[s] = best.mean(-1)
        best -= found.best[s, None]
        found.best_variance[s] = np.einsum("cn,cn->c", best, best) / n
        found.best_covariance[s] = matmul(best, left) / n
        # On a GPU the logits are MLX's, which needs no memory to work in.
        own = logits if isinstance(logits, np.ndarray) else None
        lacking = masses.log_masses(logits, top, 1.0, own)
        lacking -= matmul(found.fitted[s], right)
        lacking -= lacking.mean(-1, keepdims=True)
        found.fitted[s] += matmul(lacking, solve)
    return found
