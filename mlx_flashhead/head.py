"""The retrieval head: multiprobe retrieval over a clustered vocabulary.

FlashHead (arXiv 2603.14591) replaces the product of the hidden state with all V
rows of the classification head by two small ones. Stage 1 scores the C centroids;
stage 2 scores the m rows of each of the p best clusters exactly. Here a centroid is
the mean of its rows, so stage 1 gives the exact mean logit of every cluster, and
what is not probed keeps an estimate: each token of the vocabulary has a logit.
"""

from __future__ import annotations

import math
import warnings
from typing import NamedTuple

import mlx.core as mx
import mlx.nn as nn

from . import kernels
from .table import Table

# Added to the score of a cluster that is probed at every step. Finite, so that a
# file never holds an infinity, and far above any score.
ALWAYS = 1e30


class Candidates(NamedTuple):
    """What was probed: token ids and their exact logits.

    Attributes:
        ids (mx.array): uint32 ``[..., p * m]``; ``vocab_size`` marks padding.
        logits (mx.array): float32 ``[..., p * m]``; ``-inf`` for padding.
    """

    ids: mx.array
    logits: mx.array


class FlashHead(nn.Module):
    """A classification head that reads a fraction of its rows.

    ``head(x)`` is a drop-in for ``nn.Linear``: logits over the whole vocabulary, in
    vocabulary order. One position per sequence (a decode step) is answered by
    retrieval; more (a prompt) by the dense product, exactly.

    Args:
        rows (Table): The head's rows in cluster order, ``[C, m, D]``.
        centroids (Table): Mean row of each cluster, ``[C, D]``.
        token_ids (mx.array): Token of each row, uint32 ``[C, m]``; ``vocab_size``
          marks padding, which stands at the end of the last cluster.
        vocab_size (int): Number of tokens V.
        spread (mx.array): Added to a cluster's mean logit in the selection, float32
          ``[C]``: by how much its best row tends to exceed its mean.
        excess (mx.array): By how much the log of the mean ``exp(logit)`` of a cluster
          tends to exceed its mean logit, float32 ``[C]``, in nats.
        tail_offset (float): Fitted correction of that for the clusters that are not
          probed, in nats.
        n_probes (int): Clusters probed per step, p. It can be changed at any time.
        bias (mx.array, optional): Bias of each row, ``[C, m]``.
    """

    def __init__(
        self,
        rows: Table,
        centroids: Table,
        token_ids: mx.array,
        vocab_size: int,
        *,
        spread: mx.array,
        excess: mx.array,
        tail_offset: float = 0.0,
        n_probes: int | None = None,
        bias: mx.array | None = None,
    ):
        super().__init__()
        self.rows = rows
        self.centroids = centroids
        self.token_ids = token_ids
        self.spread = spread
        self.excess = excess
        if bias is not None:
            self.bias = bias
        self.tail_offset = tail_offset
        self.vocab_size = vocab_size
        self.n_clusters, self.cluster_size = token_ids.shape
        if n_probes is None:
            n_probes = default_n_probes(self.n_clusters)
        self.n_probes = n_probes
        # Derived, so not a parameter: where each token's row stands.
        flat = token_ids.reshape(-1)[:vocab_size]
        self._position = mx.zeros(vocab_size, mx.uint32)
        self._position[flat] = mx.arange(vocab_size, dtype=mx.uint32)
        if bias is not None:
            real = token_ids < vocab_size
            total = mx.where(real, bias.astype(mx.float32), 0).sum(-1)
            self._mean_bias = total / real.sum(-1)
        # Not a dict of its own: a module takes those for parameters.
        object.__setattr__(self, "_compiled", {})
        self.freeze()

    @property
    def n_probes(self) -> int:
        return self._n_probes

    @n_probes.setter
    def n_probes(self, n: int) -> None:
        if isinstance(n, bool) or not isinstance(n, int) or not 1 <= n <= self.n_clusters:
            raise ValueError(
                f"n_probes must be an integer from 1 to {self.n_clusters}, not {n!r}"
            )
        self._n_probes = n
        always = int((self.spread >= ALWAYS / 2).sum().item())
        if n < 2 * always:
            warnings.warn(
                f"{always} clusters are probed at every step, so n_probes = {n} leaves "
                f"few for the others; use {2 * always} or more",
                stacklevel=2,
            )

    @property
    def hidden_size(self) -> int:
        return self.rows.hidden_size

    @property
    def padding(self) -> int:
        """Rows at the end of the last cluster that stand for no token."""
        return self.n_clusters * self.cluster_size - self.vocab_size

    def __call__(self, x: mx.array) -> mx.array:
        """Logits ``[..., V]`` of hidden states ``x [..., D]``, in the dtype of x.

        ``x [B, 1, D]`` and ``[B, D]`` are decode steps and are answered by
        retrieval, with probes of its own for each row; tokens that were not probed
        get the logit that their cluster's estimate implies. Longer inputs, and
        batches for which retrieval would read more than the dense product, get
        exact logits.
        """
        rows_in = math.prod(x.shape[:-1])
        one_each = x.ndim < 3 or x.shape[-2] == 1
        if not one_each or self.rows_read(rows_in) >= self.vocab_size:
            return self.dense(x).astype(x.dtype)
        logits = self._fast(self._retrieve)(x.reshape(-1, x.shape[-1]))
        return logits.astype(x.dtype).reshape(*x.shape[:-1], self.vocab_size)

    def rows_read(self, batch_size: int = 1) -> int:
        """Rows, centroids included, that a decode step of a batch reads."""
        return self.n_clusters + batch_size * self.n_probes * self.cluster_size

    def bytes_read(self) -> int:
        """Bytes of the head that one decoded token reads."""
        rows = self.rows.nbytes * self.n_probes // self.n_clusters
        return rows + self.centroids.nbytes + self.spread.nbytes

    def dense(self, x: mx.array) -> mx.array:
        """Exact logits ``[..., V]`` of all rows for ``x [..., D]``."""
        y = self.rows.map(lambda a: a.reshape(-1, a.shape[-1])).matmul(x)
        if "bias" in self:
            y = y + self.bias.reshape(-1)
        return y[..., self._position]

    def mean_logits(self, x: mx.array) -> mx.array:
        """Mean logit of each cluster, float32 ``[B, C]``, for ``x [B, D]``."""
        means = self.centroids.matmul(x).astype(mx.float32)
        if "bias" in self:
            means = means + self._mean_bias
        return means

    def estimate(self, means: mx.array) -> mx.array:
        """Logit that stands for each token of a cluster that is not probed, float32
        ``[B, C]``: with it the cluster has its expected mass."""
        return means + (self.excess + self.tail_offset)

    def select(self, means: mx.array) -> mx.array:
        """The clusters to probe, uint32 ``[B, p]``, ascending in each row; among equal
        scores the lower index."""
        return kernels.select_probes(means, self.n_probes, spread=self.spread)

    def score(self, x: mx.array, probes: mx.array) -> mx.array:
        """Exact logits, float32 ``[B, p, m]``, of the rows of ``probes [B, p]``."""
        rows, shape = self.rows, (*probes.shape, self.cluster_size)
        if rows.has_kernel and x.dtype == rows.dtype:
            y = kernels.probe_logits(
                x,
                rows.weight,
                rows.get("scales"),
                rows.get("biases"),
                probes,
                group_size=rows.group_size,
                bits=rows.bits,
                n_rows=self.vocab_size,
            ).reshape(shape)
        else:
            y = rows.gather_matmul(x, probes).astype(mx.float32)
            if self.padding:
                real = self.token_ids[probes] < self.vocab_size
                y = mx.where(real, y, -mx.inf)
        if "bias" in self:
            y = y + self.bias[probes]
        return y

    def candidates(self, x: mx.array) -> Candidates:
        """Ids and exact logits ``[..., p * m]`` of what is probed for ``x [..., D]``."""
        h = x.reshape(-1, x.shape[-1])
        probes = self.select(self.mean_logits(h))
        shape = (*x.shape[:-1], self.n_probes * self.cluster_size)
        return Candidates(
            self.token_ids[probes].reshape(shape), self.score(h, probes).reshape(shape)
        )

    def embed(self, ids: mx.array) -> mx.array:
        """Embeddings ``[*ids.shape, D]`` of a tied model, from the same rows."""
        flat = self.rows.map(lambda a: a.reshape(-1, a.shape[-1]))
        return flat.take(self._position[ids])

    def _fast(self, function):
        """``function`` compiled where that pays: on a GPU the kernels take less time
        than building their graph anew each step would. On a CPU MLX would call a
        C++ compiler for it."""
        if mx.default_device().type != mx.DeviceType.gpu:
            return function
        key = (function.__name__, self.n_probes, kernels.kind())
        if key not in self._compiled:
            self._compiled[key] = mx.compile(function, inputs=self)
        return self._compiled[key]

    def _retrieve(self, h: mx.array) -> mx.array:
        """Logits, float32 ``[B, V]``: exact where probed, estimated elsewhere."""
        means = self.mean_logits(h)
        probes = self.select(means)
        exact = self.score(h, probes)
        # In cluster order first; the positions then leave the padding out.
        logits = mx.repeat(self.estimate(means)[..., None], self.cluster_size, -1)
        logits = mx.put_along_axis(logits, probes[..., None], exact, axis=1)
        return logits.reshape(h.shape[0], -1)[:, self._position]


class FlashEmbedding(nn.Module):
    """Stands in for the ``nn.Embedding`` of a tied model: one table serves both as
    the embedding and, through ``as_linear``, as the classification head."""

    def __init__(self, head: FlashHead):
        super().__init__()
        self.head = head

    def __call__(self, ids: mx.array) -> mx.array:
        return self.head.embed(ids)

    def as_linear(self, x: mx.array) -> mx.array:
        return self.head(x)


def default_n_probes(n_clusters: int) -> int:
    """A sixteenth of the clusters: with clusters of 16, an eighth of the rows read."""
    return max(1, n_clusters // 16)
