"""Calibration: what a cluster's score lacks, and the mass of what is not probed."""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx
import numpy as np

from mlx_flashhead.compute.linalg import matmul, place
from mlx_flashhead.evaluation.fidelity import measure, n_blocks
from mlx_flashhead.head import ALWAYS, FlashHead, Transform

from . import masses
from .clustering import Clustering
from .progress import Progress, silent

# Calibration states on which what a cluster's score lacks is fitted.
N_FIT = 4096
# The mean mass of a cluster is taken over one in this many of them: it settles sooner
# than the bonus, and costs an exponential per logit.
MASS_STRIDE = 4
# Of those, states on which the tail offset is fitted.
N_TAIL = 384
# Temperatures at which the mass of a cluster is fitted, falling.
TEMPERATURES = (2.0, 1.4, 1.0, 0.75, 0.55, 0.4, 0.3)


def calibrate(
    head: FlashHead,
    clustering: Clustering,
    weight: np.ndarray,
    states: np.ndarray,
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
        states: Calibration states, float32 ``[n, D]``.
        bias: The head's bias, ``[V]``.
        use_spread: Whether to add the bonus; the paper has none.
        progress: Shows the stages.

    Returns:
        A head that shares its tables with the one that was given.
    """
    chosen = np.random.default_rng(0).permutation(len(states))[:N_FIT]
    states = states[np.sort(chosen)]
    spread, excess = _statistics(head, clustering, weight, states, bias, progress)
    if not use_spread:
        spread = np.zeros_like(spread)
    spread[: clustering.n_always] = ALWAYS
    head = _with(head, spread, excess, (0.0,) * len(TEMPERATURES))
    sample = states[:: max(1, len(states) // N_TAIL)]
    with progress("Calibration: tail", n_blocks(head, len(sample))) as step:
        fidelity = measure(
            head, weight, sample, bias=bias, temperatures=TEMPERATURES, step=step
        )
    offsets = tuple(fidelity.at[t].fit_shift() for t in TEMPERATURES)
    return _with(head, spread, excess, offsets)


def _statistics(
    head: FlashHead,
    clustering: Clustering,
    weight: np.ndarray,
    states: np.ndarray,
    bias: np.ndarray | None,
    progress: Progress,
) -> tuple[np.ndarray, np.ndarray]:
    """Per cluster, over the states: mean + standard deviation of (best logit - score)
    and, at each of TEMPERATURES, mean of (log mean exp(logit / T) - score / T), logits
    and scores there being the model's."""
    c = len(clustering.token_ids)
    centroids = np.array(head.centroids.dequantize(mx.float32))
    transform = head.transform or Transform()
    spread = np.empty(c, np.float32)
    excess = np.empty((len(TEMPERATURES), c), np.float32)
    right = place(np.ascontiguousarray(states.T))
    title = "Calibration: clusters"
    for s, real, logits in masses.logits(
        clustering, weight, right, bias=bias, title=title, progress=progress
    ):
        score = matmul(centroids[s], right)
        sizes = real.sum(-1)
        if bias is not None:
            of_rows = np.where(real, bias[masses.rows_of(clustering, s)], 0)
            score += (of_rows.sum(-1) / sizes)[:, None]
        gain = masses.best(logits, real) - score
        spread[s] = gain.mean(-1) + gain.std(-1)
        some = transform(logits[..., ::MASS_STRIDE])
        score = transform(score[:, ::MASS_STRIDE])
        scratch = np.empty(some.shape, np.float32)
        for i, t in enumerate(TEMPERATURES):
            lacking = masses.log_mass(some, real, t, scratch) - score / t
            excess[i, s] = lacking.mean(-1) - np.log(sizes)
    return spread, excess


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
