"""The retrieval head: multiprobe retrieval over a clustered vocabulary.

FlashHead (arXiv 2603.14591) replaces the product of the hidden state with all V
rows of the classification head by two small ones. Stage 1 scores the C centroids;
stage 2 scores the m rows of each of the p best clusters exactly. Here a centroid is
fitted to the log-mass of its cluster, so stage 1 gives an estimate of every cluster's
mass (``masses.py``), and each token of the vocabulary has a logit.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from .. import kernels
from ..compute.table import Table
from . import masses
from .dense_rule import prefers_dense
from .transform import Transform

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


class Retrieved(NamedTuple):
    """What a decode step knows of its logits, before the model's own transform.

    Attributes:
        centroid_logits (mx.array): Logit of each centroid, floating ``[B, C]``.
        probes (mx.array): Clusters that were scored, uint32 ``[B, q]``.
        logits (mx.array): Exact logits of their rows, float32 ``[B, q * m]``;
          ``-inf`` for padding.
    """

    centroid_logits: mx.array
    probes: mx.array
    logits: mx.array


class FlashHead(nn.Module):
    """A classification head that reads a fraction of its rows (arXiv 2603.14591).

    ``head(x)`` is a drop-in for ``nn.Linear``: logits over the whole vocabulary, in
    vocabulary order. One position per sequence (a decode step) is answered by
    retrieval; more (a prompt) by the dense product, exactly.

    Stage 1 scores every cluster, ``s_c = centroid_c . h``
    (:meth:`centroid_logits`), and probes the p with the largest ``s_c + b_c``
    (:meth:`select`). Stage 2 computes the
    logits ``z_j = w_j . h`` of their rows (:meth:`score`). Both are the paper's; the
    bonus ``b_c`` (``spread``) and the masses of the other clusters are ours
    (docs/how-it-works.md).

    Args:
        rows (Table): The head's rows in cluster order, ``[C, m, D]``.
        centroids (Table): Centroid of each cluster, ``[C, D]``: its mean row, corrected
          to predict its log-mass.
        token_ids (mx.array): Token of each row, uint32 ``[C, m]``; ``vocab_size``
          marks padding, which stands at the end of the last cluster.
        vocab_size (int): Number of tokens V.
        spread (mx.array): Added to a centroid's logit in the selection, float32
          ``[C]``: by how much the cluster's best row tends to exceed it.
        excess (mx.array): By how much the log of the mean ``exp(logit / T)`` of a
          cluster tends to exceed its centroid's logit over T, float32
          ``[n_temperatures, C]``, in nats.
        temperatures (Sequence[float]): The temperatures T, falling.
        tail_offset (Sequence[float]): At each T, the fitted correction of the excess
          for the clusters that are not probed, in nats.
        n_probes (int, optional): Clusters probed per step, p, from 1 to C; by default
          :func:`default_n_probes`. It can be changed at any time.
        bias (mx.array, optional): Bias of each row, ``[C, m]``.
        transform (Transform, optional): What the model does to the logits; ``None`` if
          that is not known, and then nothing is drawn among candidates.

    Attributes:
        n_clusters (int): Number of clusters C.
        cluster_size (int): Rows of each, m.
        log_sizes (mx.array): Log of each cluster's number of tokens, float32 ``[C]``.
        choice (Callable, optional): Of the head, hidden states and the settings of a
          draw (``None``: for logits), whether the dense product takes no longer on this
          device. Who decodes with the head may ask; calling the head is retrieval, as
          above.

    Raises:
        ValueError: ``n_probes`` is out of range.
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
        temperatures: Sequence[float] = (1.0,),
        tail_offset: Sequence[float] = (0.0,),
        n_probes: int | None = None,
        bias: mx.array | None = None,
        transform: Transform | None = Transform(),
    ):
        super().__init__()
        self.rows = rows
        self.centroids = centroids
        self.token_ids = token_ids
        self.spread = spread
        self.excess = excess
        if bias is not None:
            self.bias = bias
        self.temperatures = tuple(temperatures)
        self.tail_offset = tuple(tail_offset)
        self.transform = transform
        self.vocab_size = vocab_size
        self.n_clusters, self.cluster_size = token_ids.shape
        if n_probes is None:
            n_probes = default_n_probes(self.n_clusters)
        self.n_probes = n_probes
        self.choice: Callable[[FlashHead, mx.array, Any], bool] | None = None
        # What is derived is no parameter, and is evaluated here: an array that is left
        # lazy belongs to the thread that made it, and no other could use the head.
        flat = token_ids.reshape(-1)[:vocab_size]
        self._positions = mx.zeros(vocab_size, mx.uint32)
        self._positions[flat] = mx.arange(vocab_size, dtype=mx.uint32)
        sizes = np.full(self.n_clusters, self.cluster_size)
        sizes[-1] -= self.padding
        self._log_sizes = mx.array(np.log(sizes), mx.float32)
        if bias is not None:
            real = token_ids < vocab_size
            total = mx.where(real, bias.astype(mx.float32), 0).sum(-1)
            self._centroid_bias = total / real.sum(-1)
        mx.eval(self._positions, self._log_sizes, self.get("_centroid_bias"))
        self.freeze()

    def _extra_repr(self) -> str:
        return (
            f"vocab_size={self.vocab_size}, hidden_size={self.hidden_size}, "
            f"n_clusters={self.n_clusters}, cluster_size={self.cluster_size}, "
            f"n_probes={self.n_probes}, bias={'bias' in self}"
        )

    @property
    def n_probes(self) -> int:
        """Clusters probed per step, p; setting it raises ValueError unless it is an
        integer from 1 to ``n_clusters``."""
        return self._n_probes

    @n_probes.setter
    def n_probes(self, n: int) -> None:
        if (
            isinstance(n, bool)
            or not isinstance(n, int)
            or not 1 <= n <= self.n_clusters
        ):
            raise ValueError(
                f"n_probes must be an integer from 1 to {self.n_clusters}, not {n!r}"
            )
        self._n_probes = n
        always = self.n_always
        if n < 2 * always:
            warnings.warn(
                f"{always} clusters are probed at every step, so n_probes = {n} leaves "
                f"few for the others; use {2 * always} or more",
                stacklevel=2,
            )

    @property
    def n_always(self) -> int:
        """Clusters that are probed at every step."""
        return cast(int, (self.spread >= ALWAYS / 2).sum().item())

    @property
    def hidden_size(self) -> int:
        """Size D of the hidden states."""
        return self.rows.hidden_size

    @property
    def padding(self) -> int:
        """Rows at the end of the last cluster that stand for no token."""
        return self.n_clusters * self.cluster_size - self.vocab_size

    @property
    def log_sizes(self) -> mx.array:
        """Log of the number of each cluster's tokens, float32 ``[C]``."""
        return self._log_sizes

    @property
    def centroid_bias(self) -> mx.array | None:
        """Mean bias of each cluster's tokens, float32 ``[C]``, where there is one."""
        return self.get("_centroid_bias")

    def probing(self, n_probes: int) -> FlashHead:
        """The same head, its arrays shared, with a number of probes of its own."""
        twin = copy.copy(self)
        twin.n_probes = n_probes
        return twin

    def rows_read(self, batch_size: int = 1) -> int:
        """Rows, centroids included, that a decode step of a batch reads."""
        return self.n_clusters + batch_size * self.n_probes * self.cluster_size

    def bytes_read(self) -> int:
        """Bytes of the head that one decoded token reads."""
        rows = self.rows.nbytes * self.n_probes // self.n_clusters
        return rows + self.centroids.nbytes + self.spread.nbytes

    def __call__(self, x: mx.array) -> mx.array:
        """Logits ``[..., V]`` of hidden states ``x [..., D]``, in the dtype of x.

        ``x [B, 1, D]`` and ``[B, D]`` are decode steps and are answered by
        retrieval, with probes of its own for each row; tokens that were not probed
        get the logit that their cluster's estimate implies. Longer inputs, and
        batches for which retrieval would read more than the dense product, get
        exact logits.

        They are the head's logits, before what the model does to them; the estimated
        ones are those of :func:`mlx_flashhead.head.masses.estimate`.
        """
        one_each = x.ndim < 3 or x.shape[-2] == 1
        if not one_each or prefers_dense(self, math.prod(x.shape[:-1])):
            return self.dense(x).astype(x.dtype)
        logits = masses.expand(self, self.retrieve(x.reshape(-1, x.shape[-1])))
        return logits.astype(x.dtype).reshape(*x.shape[:-1], self.vocab_size)

    def dense(self, x: mx.array) -> mx.array:
        """Exact logits ``[..., V]`` of all rows for ``x [..., D]``, in vocabulary
        order and in the dtype that MLX's product gives."""
        return mx.take(self.clustered(x), self._positions, axis=-1)

    def clustered(self, x: mx.array) -> mx.array:
        """:meth:`dense` in cluster order, as the rows stand: that of token t is at
        ``positions[t]``."""
        y = self.rows.matmul(x)
        if "bias" in self:
            y = y + self.bias.reshape(-1)
        return y[..., : self.vocab_size] if self.padding else y

    def product_dtype(self, dtype: mx.Dtype) -> mx.Dtype:
        """Dtype that :meth:`clustered` rounds logits to for states of a dtype: it holds
        both theirs and the rows'."""
        return (mx.zeros((), dtype) + mx.zeros((), self.rows.dtype)).dtype

    def retrieve(self, x: mx.array) -> Retrieved:
        """Both stages for hidden states ``x [B, D]``."""
        centroid_logits = self.centroid_logits(x)
        probes = self.select(centroid_logits)
        logits = self.score(x, probes).reshape(len(x), -1)
        return Retrieved(centroid_logits, probes, logits)

    def centroid_logits(self, x: mx.array) -> mx.array:
        """Stage 1: logit of each cluster's centroid, ``[B, C]``, for ``x [B, D]``; in
        the dtype that MLX's product gives, or float32 where a kernel makes them or
        there is a bias."""
        bias = self.centroid_bias
        if kernels.kind() != "plain":
            one_each = self.centroids.map(lambda a: a[:, None])
            of_each = None if bias is None else bias[:, None]
            rows = _kernel_rows(x, one_each, self.n_clusters, of_each)
            logits = None if rows is None else kernels.centroid_logits(rows)
            if logits is not None:
                return logits
        logits = self.centroids.fast_matmul(x)
        return logits if bias is None else logits + bias

    def select(
        self, centroid_logits: mx.array, n_probes: int | None = None
    ) -> mx.array:
        """The clusters to probe, uint32 ``[B, p]``, ascending in each row; among equal
        scores the lower index.

        Args:
            centroid_logits: Floating ``[B, C]``.
            n_probes: p, instead of the head's own number.
        """
        p = n_probes or self.n_probes
        return kernels.select_probes(centroid_logits, p, spread=self.spread)

    def score(self, x: mx.array, probes: mx.array) -> mx.array:
        """Stage 2: exact logits, float32 ``[B, p, m]``, of the rows of ``probes``;
        ``-inf`` for padding.

        Args:
            x: Hidden states ``[B, D]``.
            probes: Clusters, uint32 ``[B, p]``.
        """
        rows = self.kernel_rows(x)
        if rows is not None:
            return kernels.probe_logits(rows, probes).reshape(
                *probes.shape, self.cluster_size
            )
        y = self.rows.gather_matmul(x, probes).astype(mx.float32)
        if self.padding:
            real = self.token_ids[probes] < self.vocab_size
            y = mx.where(real, y, -mx.inf)
        return y + self.bias[probes] if "bias" in self else y

    def kernel_rows(self, x: mx.array) -> kernels.Rows | None:
        """Hidden states ``[B, D]`` and the rows, for kernels that score some of them;
        ``None`` where those cannot."""
        return _kernel_rows(x, self.rows, self.vocab_size, self.get("bias"))

    def candidates(self, x: mx.array) -> Candidates:
        """Ids, uint32, and exact logits, float32, both ``[..., p * m]``, of what hidden
        states ``x [..., D]`` probe."""
        _, probes, logits = self.retrieve(x.reshape(-1, x.shape[-1]))
        shape = (*x.shape[:-1], self.n_probes * self.cluster_size)
        return Candidates(self.token_ids[probes].reshape(shape), logits.reshape(shape))

    @property
    def positions(self) -> mx.array:
        """Where each token's row stands in cluster order, uint32 ``[V]``."""
        return self._positions

    def embed(self, ids: mx.array, dtype: mx.Dtype | None = None) -> mx.array:
        """Rows ``[*ids.shape, D]`` of tokens, the embeddings of a tied model, in a
        dtype or the rows' own. Packed rows are unpacked in that dtype, so only float32
        is exact."""
        return self.rows.take(self._positions[ids], dtype)


def default_n_probes(n_clusters: int) -> int:
    """A sixteenth of the clusters: with clusters of 16, an eighth of the rows read."""
    return max(1, n_clusters // 16)


def _kernel_rows(
    x: mx.array, table: Table, n_rows: int, bias: mx.array | None
) -> kernels.Rows | None:
    """Hidden states ``[B, D]`` and a table ``[C, m, D]`` for kernels; ``None`` where
    those cannot score it."""
    if not table.has_kernel(x.dtype):
        return None
    form = table.bits, table.group_size or 32, n_rows
    return kernels.Rows(x, *table.arrays, *form, bias)
