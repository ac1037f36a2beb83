"""How faithful a FlashHead is to the dense head it stands for.

Both are given the same hidden states. The reference is the unquantized dense head;
the FlashHead's distribution is that of ``head(x)``: exact where probed, estimated
elsewhere.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Callable

import mlx.core as mx
import numpy as np

from .head import FlashHead
from .linalg import blocks, matmul


@dataclass(frozen=True)
class Fidelity:
    """Measures per hidden state, each ``[n]``.

    Attributes:
        recall: Whether the reference's best token was probed.
        agreement: Whether the FlashHead's best token is the reference's.
        probed_mass: The reference's probability of what was probed.
        kl_terms: ``(a, log_probed, log_tail)``, float64, from which :meth:`kl`
          follows at any tail offset.
    """

    recall: np.ndarray
    agreement: np.ndarray
    probed_mass: np.ndarray
    kl_terms: tuple[np.ndarray, np.ndarray, np.ndarray]

    def kl(self, tail_offset: float) -> np.ndarray:
        """KL(reference || FlashHead) in nats, ``[n]``, were the estimated logits of
        all unprobed tokens shifted to this offset.

        With p the reference, q the FlashHead's logits at offset 0 and b the offset:
        ``sum p log p - sum p q - b p_tail + log(Z_probed + e^b Z_tail)``.
        """
        a, log_probed, log_tail = self.kl_terms
        log_z = np.logaddexp(log_probed, tail_offset + log_tail)
        return a - tail_offset * (1 - self.probed_mass) + log_z

    def fit_tail_offset(self) -> float:
        """The offset with the least mean KL: the one at which the estimated mass of
        what was not probed equals, on average, the true one."""
        _, log_probed, log_tail = self.kl_terms
        if not np.isfinite(log_tail).any():
            return 0.0
        target = np.mean(1 - self.probed_mass)
        low, high = -20.0, 20.0
        for _ in range(60):
            middle = (low + high) / 2
            gap = np.clip(log_probed - log_tail - middle, -700, 700)
            low, high = (low, middle) if np.mean(1 / (1 + np.exp(gap))) > target else (middle, high)
        return (low + high) / 2


def measure(
    head: FlashHead,
    weight: np.ndarray,
    states: np.ndarray,
    *,
    bias: np.ndarray | None = None,
    step: Callable[[], None] = lambda: None,
) -> Fidelity:
    """Compare a FlashHead with the dense head on hidden states.

    Args:
        head: The FlashHead. Its own retrieval chooses the probes.
        weight: Rows of the reference, float32 ``[V, D]``, in vocabulary order.
        states: float32 ``[n, D]``.
        bias: Bias of the reference, float32 ``[V]``.
        step: Called after each block of :func:`n_blocks`.
    """
    c, m, d = head.n_clusters, head.cluster_size, head.hidden_size
    order = np.array(head.token_ids).reshape(-1)
    # Padding gets logits that weigh nothing.
    mask = np.where(order < head.vocab_size, 0, -1e30).astype(np.float32)
    order = np.minimum(order, head.vocab_size - 1)
    ordered = weight[order]
    rows = np.array(head.rows.dequantize(mx.float32)).reshape(c * m, d)
    offset, rows_offset = mask.copy(), mask
    if bias is not None:
        offset += bias[order]
        rows_offset = mask + np.array(head.bias.astype(mx.float32)).reshape(-1)
    parts = []
    for s in blocks(len(states), c * m):
        h = states[s]
        reference = matmul(h, ordered.T)
        reference += offset
        stored = matmul(h, rows.T)
        stored += rows_offset
        means = head.mean_logits(mx.array(h))
        probes = np.array(head.select(means)).astype(np.int64)
        estimate = np.array(means + head.excess)
        shape = (len(h), c, m)
        parts.append(
            _compare(reference.reshape(shape), stored.reshape(shape), probes, estimate)
        )
        step()
    recall, agreement, mass, *terms = (np.concatenate(p) for p in zip(*parts))
    return Fidelity(recall, agreement, mass, tuple(terms))


def n_blocks(head: FlashHead, n_states: int) -> int:
    """How many blocks :func:`measure` takes."""
    return len(list(blocks(n_states, head.n_clusters * head.cluster_size)))


def _compare(reference, stored, probes, estimate):
    """Both logits ``[n, C, m]``, probes ``[n, p]``, estimates ``[n, C]``; see
    :class:`Fidelity`. What can be is summed by cluster first."""
    n, c, m = reference.shape
    rows = np.arange(n)
    best = reference.reshape(n, -1).argmax(-1)
    probed = np.zeros((n, c), bool)
    np.put_along_axis(probed, probes, True, axis=1)
    candidates = np.take_along_axis(stored, probes[..., None], axis=1)
    choice = candidates.reshape(n, -1).argmax(-1)
    chosen = probes[rows, choice // m] * m + choice % m

    shift = reference.max((1, 2)).astype(np.float64)
    p = np.exp(reference - shift[:, None, None].astype(np.float32))
    cluster_p = p.sum(-1).astype(np.float64)
    total = cluster_p.sum(-1)
    probed_p = np.take_along_axis(p, probes[..., None], axis=1)
    mass = np.sum(cluster_p, -1, where=probed) / total
    # Sum of p log p, less the sum of p q over probed tokens and over the others.
    a = np.einsum("ncm,ncm->n", p, np.maximum(reference, -1e4))
    a = a - np.einsum("npm,npm->n", probed_p, np.maximum(candidates, -1e4))
    a = a - np.sum(cluster_p * estimate, -1, where=~probed)
    a = a / total - shift - np.log(total)
    sizes = (reference[0] > -1e29).sum(-1)
    log_tail = _logsumexp(np.where(probed, -np.inf, estimate + np.log(sizes)))
    log_probed = _logsumexp(candidates.reshape(n, -1))
    return probed[rows, best // m], chosen == best, mass, a, log_probed, log_tail


def _logsumexp(x: np.ndarray) -> np.ndarray:
    top = x.max(-1, keepdims=True)
    safe = np.where(np.isfinite(top), top, 0)
    with np.errstate(divide="ignore"):
        return safe[:, 0] + np.log(np.exp(x - safe).sum(-1, dtype=np.float64))
