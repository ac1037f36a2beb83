"""From a clustering to a FlashHead: centroids, calibrated bonuses, low-bit tensors."""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx
import numpy as np

from mlx_flashhead.fidelity import measure, n_blocks
from mlx_flashhead.head import ALWAYS, FlashHead
from mlx_flashhead.linalg import matmul, place, run_sums
from mlx_flashhead.table import Table
from mlx_flashhead.transform import Transform

from . import masses
from .cluster import Clustering
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


def pack(
    clustering: Clustering,
    table: Table,
    weight: np.ndarray,
    centroids: np.ndarray,
    *,
    bias: np.ndarray | None = None,
    head_bits: int = 8,
    centroid_bits: int = 4,
    group_size: int = 64,
    n_probes: int | None = None,
    transform: Transform | None = Transform(),
) -> FlashHead:
    """The clustered head, what its scores lack still zero.

    Args:
        clustering: Which tokens stand together.
        table: The model's head as it is stored, ``[V, D]``. If its bits are the ones
          asked for, its packed rows are only put in another order.
        weight: The same, float32.
        centroids: Centroid of each cluster, float32 ``[C, D]``.
        bias: The head's bias, ``[V]``.
        head_bits, centroid_bits: Bits of the rows and of the centroids. 32 is float32,
            and 16 the head's own dtype, or bfloat16 where that is wider.
        group_size: Weights per scale where they have 2 to 8 bits.
        n_probes: Clusters probed per step; by default a sixteenth of them.
        transform: What the model does to its logits; ``None`` if that is not known.
    """
    c, m = clustering.token_ids.shape
    # Padding repeats a row that exists; it is masked wherever logits are made.
    source = np.where(clustering.token_ids < len(weight), clustering.token_ids, 0)
    index = mx.array(source.astype(np.uint32))
    dtype = table.dtype
    half = dtype if dtype.size == 2 else mx.bfloat16
    kinds = {16: half, 32: mx.float32}
    same = table.bits == head_bits == 8 * table.weight.dtype.size or (
        table.quantized and (table.bits, table.group_size) == (head_bits, group_size)
    )
    rows = table
    if not same:
        dense = mx.array(weight).astype(kinds.get(head_bits, _scales(dtype, weight)))
        rows = Table.from_dense(dense, head_bits, group_size)
    rows = rows.map(lambda a: a[index])
    head = FlashHead(
        rows,
        Table.from_dense(
            mx.array(centroids).astype(kinds.get(centroid_bits, dtype)),
            centroid_bits,
            group_size,
        ),
        mx.array(clustering.token_ids.astype(np.uint32)),
        len(weight),
        spread=mx.zeros(c),
        excess=mx.zeros((1, c)),
        n_probes=n_probes,
        bias=None if bias is None else mx.array(bias[source]).astype(dtype),
    )
    head.transform = transform
    return head


def _scales(dtype: mx.Dtype, weight: np.ndarray) -> mx.Dtype:
    """Dtype of the scales of quantized rows. bfloat16 is too coarse for 8 bits: it
    costs more agreement with the unquantized head than the rounding of the weights."""
    return mx.float16 if dtype == mx.bfloat16 and np.abs(weight).max() < 6e4 else dtype


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
        found = measure(
            head, weight, sample, bias=bias, temperatures=TEMPERATURES, step=step
        )
    offsets = tuple(found.at[t].fit_shift() for t in TEMPERATURES)
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
    new = FlashHead(
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
    )
    new.transform = head.transform
    return new


def _sizes(clustering: Clustering) -> np.ndarray:
    """Tokens in each cluster, ``[C]``: padding does not count."""
    return (clustering.token_ids < clustering.vocab_size).sum(1)
