"""How faithful a FlashHead is to the dense head it stands for.

Both are given the same hidden states. The reference is the unquantized dense head; the
FlashHead's distribution is the one that its sampling implies: exact logits where
probed, the estimated mass of each other cluster, and within that the exact logits again
(see :mod:`mlx_flashhead.candidates`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from .head import FlashHead
from .linalg import blocks, matmul
from .transform import Transform


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
    """
    c, m, d = head.n_clusters, head.cluster_size, head.hidden_size
    transform = head.transform or Transform()
    order = np.array(head.token_ids).reshape(-1)
    # Padding gets logits that weigh nothing.
    mask = np.where(order < head.vocab_size, 0, -1e30).astype(np.float32)
    order = np.minimum(order, head.vocab_size - 1)
    ordered = weight[order]
    rows = np.array(head.rows.dequantize(mx.float32)).reshape(c * m, d)
    rows_bias = None
    if bias is not None:
        bias = bias[order]
        rows_bias = np.array(head.bias.astype(mx.float32)).reshape(-1)

    def logits(
        h: np.ndarray, matrix: np.ndarray, offset: np.ndarray | None
    ) -> np.ndarray:
        y = matmul(h, matrix.T)
        if offset is not None:
            y += offset
        y = transform(y)
        y += mask
        return y.reshape(len(h), c, m)

    parts: list[tuple[np.ndarray, np.ndarray]] = []
    by_temperature: dict[float, list[tuple[np.ndarray, ...]]]
    by_temperature = {t: [] for t in temperatures}
    for s in blocks(len(states), c * m):
        h = states[s]
        reference = logits(h, ordered, bias)
        stored = logits(h, rows, rows_bias)
        means = head.mean_logits(mx.array(h))
        probes = np.array(head.select(means)).astype(np.int64)
        parts.append(_compare_best(reference, stored, probes))
        for t in by_temperature:
            masses = np.array(head.log_masses(means, t))
            by_temperature[t].append(
                _compare(reference, stored, probes, masses, t, details)
            )
        step()
    at = {}
    for t, found in by_temperature.items():
        mass, a, log_probed, log_tail, *rest = (np.concatenate(p) for p in zip(*found))
        at[t] = Distribution(mass, (a, log_probed, log_tail), *rest)
    recall, agreement = (np.concatenate(p) for p in zip(*parts))
    return Fidelity(recall, agreement, at)


def n_blocks(head: FlashHead, n_states: int) -> int:
    """How many blocks :func:`measure` takes."""
    return len(list(blocks(n_states, head.n_clusters * head.cluster_size)))


def _compare_best(
    reference: np.ndarray, stored: np.ndarray, probes: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Recall and agreement; both logits ``[n, C, m]``, probes ``[n, p]``."""
    n, _, m = reference.shape
    rows = np.arange(n)
    best = reference.reshape(n, -1).argmax(-1)
    candidates = np.take_along_axis(stored, probes[..., None], axis=1)
    choice = candidates.reshape(n, -1).argmax(-1)
    chosen = probes[rows, choice // m] * m + choice % m
    return (probes == (best // m)[:, None]).any(-1), chosen == best


def _compare(
    reference: np.ndarray,
    stored: np.ndarray,
    probes: np.ndarray,
    masses: np.ndarray,
    temperature: float,
    details: bool,
) -> tuple[np.ndarray, ...]:
    """Both logits ``[n, C, m]``, probes ``[n, p]``, estimated log-masses ``[n, C]``;
    see :class:`Distribution`. What can be is summed by cluster first."""
    n, c, m = reference.shape
    if temperature != 1:
        reference, stored = reference / temperature, stored / temperature
    probed = np.zeros((n, c), bool)
    np.put_along_axis(probed, probes, True, axis=1)
    shift = reference.max((1, 2))
    scratch = reference - shift[:, None, None]
    p = np.exp(scratch)
    cluster_p = p.sum(-1).astype(np.float64)
    total = cluster_p.sum(-1)
    mass = np.sum(cluster_p, -1, where=probed) / total

    # What lifts an unprobed cluster's own logits to its estimated mass.
    top = stored.max(-1)
    np.subtract(stored, top[..., None], out=scratch)
    own = top + np.log(np.exp(scratch, out=scratch).sum(-1))
    lift = np.where(probed, 0, masses - own)
    log_probed = _logsumexp(np.where(probed, own, -np.inf))
    log_tail = _logsumexp(np.where(probed, -np.inf, masses))
    np.subtract(reference, stored, out=scratch)
    a = np.einsum("ncm,ncm->n", p, scratch) - np.sum(cluster_p * lift, -1)
    a = a / total - shift - np.log(total)
    if not details:
        return mass, a, log_probed, log_tail

    log_z = np.logaddexp(log_probed, log_tail)
    q = np.exp(stored + (lift - log_z[:, None]).astype(np.float32)[..., None])
    q -= p / total[:, None, None].astype(np.float32)
    variation = np.abs(q, out=q).sum((1, 2), dtype=np.float64) / 2
    sizes = (reference[0] > -1e29).sum(-1)
    expected = np.einsum("ncm,ncm->nc", p, np.maximum(stored, -1e4))
    equal = np.sum(expected - cluster_p * (own - np.log(sizes)), -1, where=~probed)
    return mass, a, log_probed, log_tail, variation, equal / total


def _logsumexp(x: np.ndarray) -> np.ndarray:
    top = x.max(-1, keepdims=True)
    safe = np.where(np.isfinite(top), top, 0)
    with np.errstate(divide="ignore"):
        return safe[:, 0] + np.log(np.exp(x - safe).sum(-1, dtype=np.float64))
