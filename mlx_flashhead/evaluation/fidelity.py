"""How faithful a head is to the unquantized dense head that it stands for.

Both are given the same hidden states. Of a FlashHead, the distribution is the one that
its sampling implies: exact logits where probed, the estimated mass of each other
cluster, and within that the exact logits again (:mod:`mlx_flashhead.sampling.draw`). A
dense head is one that probes everything. All logits are in the FlashHead's cluster
order, ``[n, C, m]``, so that most of the work is done by cluster.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import mlx.core as mx
import numpy as np

from ..compute.linalg import Array, Product, blocks
from ..compute.table import Table
from ..head import FlashHead, masses
from ..head.transform import Transform

# The logit of padding: finite, and of no weight.
PADDING = -1e30
# Tokens of the top-10 recall.
TOP = 10


@dataclass(frozen=True)
class Distribution:
    """Measures at one temperature T per hidden state, each ``[n]``, float64.

    Attributes:
        probed_mass: The reference's probability of what was probed.
        kl_terms: ``(a, log_probed, log_tail)``, from which :meth:`kl` follows at any
          shift of the estimated log-masses.
        total_variation: ``sum |p - q| / 2`` between the reference p and FlashHead q.
        equal_shares: What KL would gain if each token of an unprobed cluster had an
          equal share of its mass, as in the logits of ``head(x)``, in nats. The last
          two are ``None`` unless details were asked for.
    """

    probed_mass: np.ndarray
    kl_terms: tuple[np.ndarray, np.ndarray, np.ndarray]
    total_variation: np.ndarray | None = None
    equal_shares: np.ndarray | None = None

    def kl(self, shift: float = 0.0) -> np.ndarray:
        """KL(reference || FlashHead) in nats, ``[n]``, were all estimated log-masses
        shifted by so much.

        With p the reference, q the FlashHead's log-masses and b the shift:
        ``sum p log p - sum p q - b p_tail + log(Z_probed + e^b Z_tail)``.
        """
        a, log_probed, log_tail = self.kl_terms
        log_z = np.logaddexp(log_probed, shift + log_tail)
        return a - shift * (1 - self.probed_mass) + log_z

    def fit_shift(self) -> float:
        """The shift with the least mean KL: the one at which the estimated mass of
        what was not probed equals, on average, the true one."""
        _, log_probed, log_tail = self.kl_terms
        if not np.isfinite(log_tail).any():
            return 0.0
        target = np.mean(1 - self.probed_mass)
        low, high = -20.0, 20.0
        for _ in range(60):
            middle = (low + high) / 2
            gap = np.clip(log_probed - log_tail - middle, -700, 700)
            too_much = np.mean(1 / (1 + np.exp(gap))) > target
            low, high = (low, middle) if too_much else (middle, high)
        return (low + high) / 2


@dataclass(frozen=True)
class Fidelity:
    """Measures per hidden state.

    Attributes:
        recall: Whether the reference's best token was probed, bool ``[n]``.
        agreement: Whether the FlashHead's best token is the reference's, bool ``[n]``.
        at: Measures of the distribution, by temperature.
    """

    recall: np.ndarray
    agreement: np.ndarray
    at: dict[float, Distribution]

    @property
    def probed_mass(self) -> np.ndarray:
        """The reference's probability of what was probed, at temperature 1, ``[n]``."""
        return self.at[1.0].probed_mass

    def kl(self) -> np.ndarray:
        """KL in nats at temperature 1, ``[n]``."""
        return self.at[1.0].kl()


def measure(
    head: FlashHead,
    weight: np.ndarray,
    states: np.ndarray,
    *,
    bias: np.ndarray | None = None,
    temperatures: Sequence[float] = (1.0,),
    details: bool = False,
    step: Callable[[], None] = lambda: None,
    watch: Callable[[Truth, mx.array], None] = lambda truth, scores: None,
) -> Fidelity:
    """Compare a FlashHead with the dense head on hidden states.

    Args:
        head: The FlashHead. Its own retrieval chooses the probes.
        weight: Rows of the reference, float32 ``[V, D]``, in vocabulary order.
        states: float32 ``[n, D]``.
        bias: Bias of the reference, float32 ``[V]``.
        temperatures: Those at which the distributions are compared.
        details: Whether to find what :class:`Distribution` has only then.
        step: Called after each block of :func:`n_blocks`.
        watch: Given what the reference makes of each block, and the scores of its
            centroids, ``[., C]``.
    """
    order = row_order(head)
    reference = Logits(head, weight[order], None if bias is None else bias[order])
    stored, of_centroids = stored_logits(head), centroid_logits(head)
    parts: list[tuple[np.ndarray, np.ndarray]] = []
    by_temperature: dict[float, list[list[np.ndarray]]] = {t: [] for t in temperatures}
    for s in blocks(len(states), len(order)):
        h = states[s]
        true, own, scores = reference(h), stored(h), of_centroids(h)
        plain = Truth(true), HeadLogits(own)
        watch(plain[0], scores)
        probed = probed_clusters(head.select(scores), head.n_clusters)
        parts.append((plain[0].recall(probed), plain[1].best(probed) == plain[0].best))
        for t in by_temperature:
            truth, other = plain if t == 1 else (Truth(true / t), HeadLogits(own / t))
            log_masses = np.array(masses.log_masses(head, scores, t))
            implied = Implied(truth, other, probed, log_masses)
            row = [implied.probed_mass, *implied.kl_terms]
            if details:
                row += [implied.total_variation(), implied.equal_shares()]
            by_temperature[t].append(row)
        step()
    at = {}
    for t, rows in by_temperature.items():
        mass, *rest = (np.concatenate(p) for p in zip(*rows, strict=True))
        a, log_probed, log_tail, *more = rest
        at[t] = Distribution(mass, (a, log_probed, log_tail), *more)
    recall, agreement = (np.concatenate(p) for p in zip(*parts, strict=True))
    return Fidelity(recall, agreement, at)


def n_blocks(head: FlashHead, n_states: int) -> int:
    """How many blocks :func:`measure` takes."""
    return len(list(blocks(n_states, head.n_clusters * head.cluster_size)))


def row_order(head: FlashHead) -> np.ndarray:
    """The token of each row in cluster order, ``[C * m]``; some token for padding."""
    return np.minimum(np.array(head.token_ids).reshape(-1), head.vocab_size - 1)


class Logits:
    """The model's logits, float32 ``[n, C, m]``, of hidden states ``[n, D]``.

    Args:
        head: The FlashHead that gives the order of the rows and the transform.
        rows: A head's rows in that order, ``[C * m, D]``.
        bias: Of each row, float32 ``[C * m]``.
    """

    def __init__(
        self, head: FlashHead, rows: Table | np.ndarray, bias: np.ndarray | None
    ):
        self._product, self._bias = Product(rows), bias
        self._transform = head.transform or Transform()
        self._shape = head.n_clusters, head.cluster_size
        self._vocab_size = head.vocab_size

    def __call__(self, states: np.ndarray) -> Array:
        y = self._product(states)
        if self._bias is not None:
            y += _like(y, self._bias)
        y = self._transform(y)
        # Padding stands at the end.
        y[:, self._vocab_size :] = PADDING
        return y.reshape(len(states), *self._shape)


def stored_logits(head: FlashHead) -> Logits:
    """The logits of a FlashHead's own rows."""
    bias = None
    if "bias" in head:
        bias = np.array(head.bias.astype(mx.float32)).reshape(-1)
    flat = head.rows.map(lambda a: a.reshape(-1, a.shape[-1]))
    return Logits(head, flat, bias)


def centroid_logits(head: FlashHead) -> Callable[[np.ndarray], mx.array]:
    """:meth:`FlashHead.centroid_logits` for many float32 states ``[n, D]`` at once."""
    product = Product(head.centroids)

    def logits(states: np.ndarray) -> mx.array:
        y = mx.array(product(states))
        return y if head.centroid_bias is None else y + head.centroid_bias

    return logits


def probed_clusters(probes: mx.array, n_clusters: int) -> np.ndarray:
    """Whether each cluster is among ``probes [n, p]``, bool ``[n, C]``."""
    probed = np.zeros((len(probes), n_clusters), bool)
    np.put_along_axis(probed, np.array(probes).astype(np.int64), True, axis=1)
    return probed


class Truth:
    """What the reference makes of some states.

    Attributes:
        logits: float32 ``[n, C, m]``.
        best: Where its best token stands in cluster order, int64 ``[n]``.
    """

    def __init__(self, logits: Array):
        self.logits = logits
        self.best = np.asarray(_flat(logits).argmax(-1)).astype(np.int64)

    @cached_property
    def _softmax(self) -> tuple[Array, np.ndarray]:
        top = self.logits.max((1, 2), keepdims=True)
        p = _exp(self.logits - top)
        total = np.asarray(_sums(p), np.float64)
        p /= _like(p, total.astype(np.float32)[:, None, None])
        return p, np.asarray(top)[:, 0, 0] + np.log(total)

    @property
    def p(self) -> Array:
        """Probabilities, float32 ``[n, C, m]``."""
        return self._softmax[0]

    @property
    def log_z(self) -> np.ndarray:
        """Log of the sum of ``exp(logit)``, float64 ``[n]``."""
        return self._softmax[1]

    @cached_property
    def cluster_p(self) -> np.ndarray:
        """Probability of each cluster, float64 ``[n, C]``; the sum is 1."""
        p = np.asarray(self.p.sum(-1)).astype(np.float64)
        return p / p.sum(-1, keepdims=True)

    def log_p(self, positions: np.ndarray) -> np.ndarray:
        """Log-probability of one token each, given where it stands in cluster order,
        ``[n]``."""
        return _at(self.logits, positions) - self.log_z

    def gap(self, positions: np.ndarray) -> np.ndarray:
        """By how much the best logit exceeds that of one token each, ``[n]``."""
        return _at(self.logits, self.best) - _at(self.logits, positions)

    def recall(self, probed: np.ndarray) -> np.ndarray:
        """Whether the best token's cluster is probed, bool ``[n]``."""
        m = self.logits.shape[-1]
        return np.take_along_axis(probed, (self.best // m)[:, None], axis=1)[:, 0]

    @cached_property
    def _top_clusters(self) -> np.ndarray:
        """The clusters of the ten best tokens, ``[n, 10]``; they are among the ten
        clusters with the largest maxima."""
        n, c, m = self.logits.shape
        k = min(TOP, c)
        tops = np.asarray(self.logits.max(-1))
        clusters = np.argpartition(tops, c - k, axis=-1)[:, c - k :]
        positions = (clusters[..., None] * m + np.arange(m)).reshape(n, -1)
        among = _at(self.logits, positions)
        k = min(TOP, int((np.asarray(self.logits[0]) > PADDING / 2).sum()))
        tokens = np.argpartition(among, among.shape[1] - k, axis=-1)[:, -k:]
        return np.take_along_axis(clusters, tokens // m, axis=1)

    def top_recall(self, probed: np.ndarray) -> np.ndarray:
        """Share of the ten best tokens whose cluster is probed, ``[n]``."""
        return np.take_along_axis(probed, self._top_clusters, axis=1).mean(-1)


class HeadLogits:
    """What another head makes of the same states, everything scored.

    Attributes:
        logits: float32 ``[n, C, m]``.
        top: The best of each cluster, ``[n, C]``.
        shares: ``exp(logit - top)``, ``[n, C, m]``.
        log_masses: Log of each cluster's sum of ``exp(logit)``, ``[n, C]``.
    """

    def __init__(self, logits: Array):
        self.logits = logits

    @cached_property
    def top(self) -> np.ndarray:
        return np.asarray(self.logits.max(-1))

    @cached_property
    def shares(self) -> Array:
        return _exp(self.logits - _like(self.logits, self.top[..., None]))

    @cached_property
    def log_masses(self) -> np.ndarray:
        return self.top + np.log(np.asarray(self.shares.sum(-1)))

    def best(self, probed: np.ndarray) -> np.ndarray:
        """Where the best token of what is probed stands in cluster order, ``[n]``."""
        m = self.logits.shape[-1]
        start = np.where(probed, self.top, -np.inf).argmax(-1) * m
        inside = _at(self.logits, start[:, None] + np.arange(m))
        return start + inside.argmax(-1)


class Implied:
    """The distribution that sampling implies, beside the reference's.

    Args:
        truth, other: What the heads make of the states.
        probed: bool ``[n, C]``.
        masses: Estimated log-masses of the clusters, ``[n, C]``; not used where
          everything is probed.

    Attributes:
        probed_mass: The reference's probability of what is probed, ``[n]``.
        kl_terms: As in :class:`Distribution`.
    """

    def __init__(
        self,
        truth: Truth,
        other: HeadLogits,
        probed: np.ndarray,
        masses: np.ndarray | None = None,
    ):
        self._truth, self._logits_of_head, self._probed = truth, other, probed
        own = other.log_masses
        tail = own if masses is None else masses
        # What lifts an unprobed cluster's own logits to its estimated mass.
        self._lift = np.where(probed, 0, tail - own)
        self._log_probed = _logsumexp(np.where(probed, own, -np.inf))
        self._log_tail = _logsumexp(np.where(probed, -np.inf, tail))
        self.probed_mass = np.sum(truth.cluster_p, -1, where=probed)

    @cached_property
    def log_z(self) -> np.ndarray:
        """Log of what the masses of all clusters sum to, float64 ``[n]``."""
        return np.logaddexp(self._log_probed, self._log_tail)

    @cached_property
    def kl_terms(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        truth = self._truth
        gap = truth.logits - self._logits_of_head.logits
        a = _inner(truth.p, gap).sum(-1, dtype=np.float64)
        a -= np.sum(truth.cluster_p * self._lift, -1) + truth.log_z
        return a, self._log_probed, self._log_tail

    def kl(self) -> np.ndarray:
        """KL(reference || head) in nats, ``[n]``."""
        return self.kl_terms[0] + self.log_z

    def total_variation(self) -> np.ndarray:
        """``sum |p - q| / 2``, ``[n]``."""
        weight = self._logits_of_head.top + self._lift - self.log_z[:, None]
        shares = self._logits_of_head.shares
        q = shares * _like(shares, np.exp(weight).astype(np.float32)[..., None])
        return np.asarray(_sums(_abs(q - self._truth.p)), np.float64) / 2

    def log_q(self, positions: np.ndarray) -> np.ndarray:
        """Log-probability of one token each, given where it stands in cluster order,
        ``[n]``."""
        clusters = positions // self._logits_of_head.logits.shape[-1]
        lift = np.take_along_axis(self._lift, clusters[:, None], axis=1)[:, 0]
        return _at(self._logits_of_head.logits, positions) + lift - self.log_z

    def equal_shares(self) -> np.ndarray:
        """See :class:`Distribution`."""
        other, truth = self._logits_of_head, self._truth
        sizes = (np.asarray(truth.logits[0]) > PADDING / 2).sum(-1)
        expected = _inner(truth.p, other.logits)
        equal = expected - truth.cluster_p * (other.log_masses - np.log(sizes))
        return np.sum(equal, -1, where=~self._probed)


# ---- of large arrays, NumPy's or MLX's ----------------------------------------------


def _like(x: Array, a: np.ndarray) -> Array:
    return mx.array(a) if isinstance(x, mx.array) else a


def _flat(x: Array) -> Array:
    return x.reshape(len(x), -1)


def _at(x: Array, positions: np.ndarray) -> np.ndarray:
    """Of ``x [n, C, m]`` what stands at ``positions [n]`` or ``[n, k]``."""
    index = positions.reshape(len(positions), -1)
    flat = _flat(x)
    if isinstance(flat, mx.array):
        taken = np.asarray(mx.take_along_axis(flat, mx.array(index), axis=1))
    else:
        taken = np.take_along_axis(flat, index, axis=1)
    return taken.reshape(positions.shape)


def _exp(x: Array) -> Array:
    """Exponentials, in x's memory where that saves the time for more."""
    return mx.exp(x) if isinstance(x, mx.array) else np.exp(x, out=x)


def _abs(x: Array) -> Array:
    return mx.abs(x) if isinstance(x, mx.array) else np.abs(x, out=x)


def _sums(x: Array) -> Array:
    """The sum of each ``x[i]``."""
    if isinstance(x, mx.array):
        return x.sum((1, 2))
    return x.sum((1, 2), dtype=np.float64)


def _inner(a: Array, b: Array) -> np.ndarray:
    """The sum over each cluster's tokens of ``a * b``, ``[n, C]``."""
    if isinstance(a, mx.array):
        return np.asarray((a * b).sum(-1))
    return np.einsum("ncm,ncm->nc", a, b)


def _logsumexp(x: np.ndarray) -> np.ndarray:
    top = x.max(-1, keepdims=True)
    safe = np.where(np.isfinite(top), top, 0)
    with np.errstate(divide="ignore"):
        return safe[:, 0] + np.log(np.exp(x - safe).sum(-1, dtype=np.float64))
