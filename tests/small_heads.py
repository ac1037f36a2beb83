"""Small FlashHeads, and what they should compute, in float64 from the equations."""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from mlx_flashhead import FlashHead
from mlx_flashhead.compute.table import Table


def unpack(table: Table) -> np.ndarray:
    """A table's rows in float64, from the bits themselves.

    Packed values are one stream of little-endian numbers of ``bits`` bits; each
    group of them is ``scale * value + bias``.
    """
    if table.bits >= 16:
        return np.array(table.weight.astype(mx.float32)).astype(np.float64)
    packed = np.array(table.weight)
    stream = np.unpackbits(packed.view(np.uint8), axis=-1, bitorder="little")
    digits = stream.reshape(*packed.shape[:-1], -1, table.bits)
    values = (digits * 2.0 ** np.arange(table.bits)).sum(-1)
    groups = values.reshape(*values.shape[:-1], -1, table.group_size)
    scales, biases = (
        np.array(a.astype(mx.float32)).astype(np.float64)[..., None]
        for a in (table.scales, table.biases)
    )
    return (groups * scales + biases).reshape(values.shape)


@dataclass
class Made:
    """A head, and the table it was made of in vocabulary order."""

    head: FlashHead
    table: Table
    bias: np.ndarray | None


def make_head(
    vocab_size: int = 500,
    hidden_size: int = 64,
    cluster_size: int = 8,
    n_probes: int | None = 3,
    *,
    bits: int = 8,
    centroid_bits: int = 4,
    group_size: int = 32,
    dtype: mx.Dtype = mx.float32,
    bias: bool = False,
    padding_scale: float = 1.0,
    seed: int = 0,
) -> Made:
    """A head of random rows, randomly clustered; the padding holds random rows too,
    ``padding_scale`` times as long."""
    rng = np.random.default_rng(seed)
    c = -(-vocab_size // cluster_size)
    n = c * cluster_size
    weight = rng.standard_normal((n, hidden_size)) * np.exp(
        0.3 * rng.standard_normal((n, 1))
    )
    weight[vocab_size:] *= padding_scale
    order = np.append(rng.permutation(vocab_size), np.arange(vocab_size, n))
    token_ids = np.where(order < vocab_size, order, vocab_size)
    table = Table.from_dense(
        mx.array(weight.astype(np.float32)).astype(dtype), bits, group_size
    )
    rows = table.map(lambda a: a[mx.array(order.reshape(c, -1))])
    means = unpack(rows).mean(1).astype(np.float32)
    biases = rng.standard_normal(n).astype(np.float32) if bias else None
    extra = {}
    if biases is not None:
        biases[vocab_size:] *= padding_scale
        extra["bias"] = mx.array(biases[order].reshape(c, -1))
    head = FlashHead(
        rows,
        Table.from_dense(mx.array(means).astype(dtype), centroid_bits, group_size),
        mx.array(token_ids.reshape(c, -1).astype(np.uint32)),
        vocab_size,
        spread=mx.array(rng.gamma(2, 2, c).astype(np.float32)),
        excess=mx.array(rng.gamma(2, 1, (1, c)).astype(np.float32)),
        tail_offset=(0.25,),
        n_probes=n_probes,
        **extra,
    )
    return Made(
        head,
        table.map(lambda a: a[:vocab_size]),
        None if biases is None else biases[:vocab_size],
    )


@dataclass
class Expected:
    """What a head should give for states ``[B, D]``, in float64.

    Attributes:
        dense: All logits ``[B, V]``.
        centroid_logits: Logit of each centroid ``[B, C]``.
        probes: Set of probed clusters for each state.
        margin: Score of the last probed cluster less that of the next, ``[B]``.
        logits: What ``head(x)`` should be ``[B, V]``.
    """

    dense: np.ndarray
    centroid_logits: np.ndarray
    probes: list[set[int]]
    margin: np.ndarray
    logits: np.ndarray


def expected(head: FlashHead, x: np.ndarray) -> Expected:
    x = x.astype(np.float64)
    vocab_size, p = head.vocab_size, head.n_probes
    token_ids = np.array(head.token_ids)
    rows, centroids = unpack(head.rows), unpack(head.centroids)
    spread, excess = (np.array(a, np.float64) for a in (head.spread, head.excess[0]))
    n_clusters, m = token_ids.shape
    bias = np.zeros((n_clusters, m))
    if "bias" in head:
        bias = np.array(head.bias.astype(mx.float32)).astype(np.float64)

    dense = np.empty((len(x), vocab_size))
    for c in range(n_clusters):
        for j in range(m):
            if (token := token_ids[c, j]) < vocab_size:
                dense[:, token] = x @ rows[c, j] + bias[c, j]
    real = token_ids < vocab_size
    centroid_logits = x @ centroids.T + (bias * real).sum(1) / real.sum(1)
    scores = centroid_logits + spread
    ranked = np.argsort(-scores, axis=1)
    ordered = np.take_along_axis(scores, ranked, 1)
    last = ordered[:, p] if p < n_clusters else -np.inf
    probes = [set(row[:p].tolist()) for row in ranked]
    cluster_of = np.empty(vocab_size, int)
    cluster_of[token_ids[real]] = np.nonzero(real)[0]
    logits = (centroid_logits + excess + head.tail_offset[0])[:, cluster_of]
    for b, chosen in enumerate(probes):
        exact = np.isin(cluster_of, list(chosen))
        logits[b, exact] = dense[b, exact]
    return Expected(dense, centroid_logits, probes, ordered[:, p - 1] - last, logits)


def implied(head: FlashHead, x: np.ndarray, temperature: float) -> np.ndarray:
    """The distribution ``[B, V]`` that sampling at a temperature is to have, in
    float64: exact where probed, expected masses elsewhere, exact again in a cluster."""
    want = expected(head, x)
    token_ids = np.array(head.token_ids)
    sizes = (token_ids < head.vocab_size).sum(1)
    inverse = [0.0, *(1 / t for t in head.temperatures)]
    curves = np.array(head.excess, np.float64) + np.array(head.tail_offset)[:, None]
    curves = np.vstack([np.zeros(len(token_ids)), curves]).T
    f = head.transform
    at = 1 / temperature
    lacking = np.array([np.interp(at, inverse, curve) for curve in curves])
    if at > inverse[-1]:
        slopes = (curves[:, -1] - curves[:, -2]) / (inverse[-1] - inverse[-2])
        lacking += slopes * (at - inverse[-1])
    masses = f(want.centroid_logits) / temperature + lacking + np.log(sizes)
    logits = f(want.dense) / temperature
    for b, probes in enumerate(want.probes):
        for c in set(range(len(token_ids))) - probes:
            members = token_ids[c][token_ids[c] < head.vocab_size]
            own = np.logaddexp.reduce(logits[b, members])
            logits[b, members] += masses[b, c] - own
    logits -= np.logaddexp.reduce(logits, axis=1)[:, None]
    return np.exp(logits)


def random_states(n: int, d: int = 64, seed: int = 100) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((n, d)).astype(np.float32)
