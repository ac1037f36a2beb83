"""The retrieval head: multiprobe retrieval over a clustered vocabulary.

FlashHead (arXiv 2603.14591) replaces the product of the hidden state with all V
rows of the classification head by two small ones. Stage 1 scores the C centroids;
stage 2 scores the m rows of each of the p best clusters exactly. Here a centroid is
fitted to the log-mass of its cluster, so stage 1 gives an estimate of every cluster's
mass, and each token of the vocabulary has a logit.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple, TypeVar, cast

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from .. import kernels
from ..compute.device import on_gpu
from ..compute.table import Table
from .transform import Transform

# Added to the score of a cluster that is probed at every step. Finite, so that a
# file never holds an infinity, and far above any score.
ALWAYS = 1e30
# Compiled steps and tables that are kept for settings that were used.
_REMEMBERED = 32

T = TypeVar("T")


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
        centroid_logits (mx.array): Logit of each centroid, float32 ``[B, C]``.
        probes (mx.array): Clusters that were scored, uint32 ``[B, q]``.
        logits (mx.array): Exact logits of their rows, float32 ``[B, q * m]``;
          ``-inf`` for padding.
    """

    centroid_logits: mx.array
    probes: mx.array
    logits: mx.array


class FlashHead(nn.Module):
    """A classification head that reads a fraction of its rows.

    ``head(x)`` is a drop-in for ``nn.Linear``: logits over the whole vocabulary, in
    vocabulary order. One position per sequence (a decode step) is answered by
    retrieval; more (a prompt) by the dense product, exactly.

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

    Attributes:
        transform (Transform, optional): What the model does to the logits; ``None`` if
          that is not known, and then nothing is drawn among candidates.
        n_clusters (int): Number of clusters C.
        cluster_size (int): Rows of each, m.

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
        self.transform: Transform | None = Transform()
        self.vocab_size = vocab_size
        self.n_clusters, self.cluster_size = token_ids.shape
        if n_probes is None:
            n_probes = default_n_probes(self.n_clusters)
        self.n_probes = n_probes
        # Derived, so not a parameter: where each token's row stands.
        flat = token_ids.reshape(-1)[:vocab_size]
        self._position = mx.zeros(vocab_size, mx.uint32)
        self._position[flat] = mx.arange(vocab_size, dtype=mx.uint32)
        sizes = np.full(self.n_clusters, self.cluster_size)
        sizes[-1] -= self.padding
        self._log_sizes = mx.array(np.log(sizes), mx.float32)
        if bias is not None:
            real = token_ids < vocab_size
            total = mx.where(real, bias.astype(mx.float32), 0).sum(-1)
            self._centroid_bias = total / real.sum(-1)
        # Not dicts of its own: a module takes those for parameters.
        object.__setattr__(self, "_compiled", {})
        object.__setattr__(self, "_log_weights", {})
        object.__setattr__(self, "_answer", None)
        object.__setattr__(self, "_unpacked", None)
        self.freeze()

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
        always = cast(int, (self.spread >= ALWAYS / 2).sum().item())
        if n < 2 * always:
            warnings.warn(
                f"{always} clusters are probed at every step, so n_probes = {n} leaves "
                f"few for the others; use {2 * always} or more",
                stacklevel=2,
            )

    @property
    def hidden_size(self) -> int:
        """Size D of the hidden states."""
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

        They are the head's logits, before what the model does to them; the estimated
        ones are those of :meth:`estimate`.
        """
        if self._answer is not None:
            return self._answer(x)
        rows_in = math.prod(x.shape[:-1])
        one_each = x.ndim < 3 or x.shape[-2] == 1
        if not one_each or self.prefers_dense(rows_in):
            return self.dense(x).astype(x.dtype)
        logits = self.fast(FlashHead._retrieve)(x.reshape(-1, x.shape[-1]))
        return logits.astype(x.dtype).reshape(*x.shape[:-1], self.vocab_size)

    def rows_read(self, batch_size: int = 1) -> int:
        """Rows, centroids included, that a decode step of a batch reads."""
        return self.n_clusters + batch_size * self.n_probes * self.cluster_size

    def bytes_read(self) -> int:
        """Bytes of the head that one decoded token reads."""
        rows = self.rows.nbytes * self.n_probes // self.n_clusters
        return rows + self.centroids.nbytes + self.spread.nbytes

    def dense(self, x: mx.array) -> mx.array:
        """Exact logits ``[..., V]`` of all rows for ``x [..., D]``, in vocabulary
        order and in the dtype that MLX's product gives."""
        y = self.rows.map(lambda a: a.reshape(-1, a.shape[-1])).matmul(x)
        if "bias" in self:
            y = y + self.bias.reshape(-1)
        return y[..., self._position]

    @property
    def centroid_bias(self) -> mx.array | None:
        """Mean bias of each cluster's tokens, float32 ``[C]``, where there is one."""
        return self._centroid_bias if "bias" in self else None

    def centroid_logits(self, x: mx.array) -> mx.array:
        """Logit of each cluster's centroid, float32 ``[B, C]``, for ``x [B, D]``."""
        logits = self._stage_1(x.dtype).matmul(x).astype(mx.float32)
        return logits if self.centroid_bias is None else logits + self.centroid_bias

    def _stage_1(self, dtype: mx.Dtype) -> Table:
        """The centroids as they are read: unpacked for float32 states on a CPU, where
        MLX's products with quantized weights take three times as long."""
        if not self.centroids.quantized or dtype != mx.float32 or on_gpu():
            return self.centroids
        if self._unpacked is None or self._unpacked[0] is not self.centroids.weight:
            rows = self.centroids.dequantize(mx.float32)
            mx.eval(rows)
            object.__setattr__(self, "_unpacked", (self.centroids.weight, Table(rows)))
        return self._unpacked[1]

    def log_weights(self, temperature: float) -> mx.array:
        """What turns a centroid's logit over the temperature into the log of its
        cluster's expected mass at that temperature, float32 ``[C]``, in nats. Linear in
        ``1 / T`` between the temperatures of the fit and beyond them; at infinite T
        nothing but the number of the cluster's tokens counts."""
        key = (temperature, self.tail_offset)
        if key not in self._log_weights:
            if len(self._log_weights) >= _REMEMBERED:
                self._log_weights.clear()
            inverse = np.array([0, *(1 / t for t in self.temperatures)])
            at = 1 / temperature
            high = min(max(int(np.searchsorted(inverse, at)), 1), len(inverse) - 1)
            share = (at - inverse[high - 1]) / (inverse[high] - inverse[high - 1])

            def between(values: np.ndarray | Sequence[float]) -> np.ndarray | float:
                below = values[high - 2] if high > 1 else 0
                return (1 - share) * below + share * values[high - 1]

            excess = np.array(self.excess.astype(mx.float32))
            weights = between(excess) + between(self.tail_offset)
            self._log_weights[key] = mx.array(weights, mx.float32) + self._log_sizes
            mx.eval(self._log_weights[key])
        return self._log_weights[key]

    def log_masses(
        self, centroid_logits: mx.array, temperature: float = 1.0
    ) -> mx.array:
        """Log of the expected ``sum(exp(logit / T))`` of each cluster, float32
        ``[B, C]``, the logits being the model's; for ``centroid_logits [B, C]``."""
        centroid_logits = (self.transform or Transform())(centroid_logits)
        return centroid_logits / temperature + self.log_weights(temperature)

    def estimate(self, centroid_logits: mx.array) -> mx.array:
        """Logit that stands for each token of a cluster that is not probed, float32
        ``[B, C]``: with it the cluster has its expected mass at temperature 1."""
        each = self.log_masses(centroid_logits) - self._log_sizes
        return (self.transform or Transform()).inverse(each)

    def select(
        self, centroid_logits: mx.array, n_probes: int | None = None
    ) -> mx.array:
        """The clusters to probe, uint32 ``[B, p]``, ascending in each row; among equal
        scores the lower index.

        Args:
            centroid_logits: float32 ``[B, C]``.
            n_probes: p, instead of the head's own number.
        """
        p = n_probes or self.n_probes
        return kernels.select_probes(centroid_logits, p, spread=self.spread)

    def score(self, x: mx.array, probes: mx.array) -> mx.array:
        """Exact logits, float32 ``[B, p, m]``, of the rows of ``probes``; ``-inf`` for
        padding.

        Args:
            x: Hidden states ``[B, D]``.
            probes: Clusters, uint32 ``[B, p]``.
        """
        if self.rows.has_kernel(x.dtype):
            y = self._probe(kernels.probe_logits, x, probes)
            y = y.reshape(*probes.shape, self.cluster_size)
        else:
            y = self.rows.gather_matmul(x, probes).astype(mx.float32)
            if self.padding:
                real = self.token_ids[probes] < self.vocab_size
                y = mx.where(real, y, -mx.inf)
        if "bias" in self:
            y = y + self.bias[probes]
        return y

    def best(self, x: mx.array, probes: mx.array) -> tuple[mx.array, mx.array]:
        """The token with the largest logit among ``probes [B, p]``, uint32 ``[B]``, and
        the logits of all, float32 ``[B, p * m]``; for hidden states ``x [B, D]``."""
        tokens = {"probes": probes, "token_ids": self.token_ids}
        if not self.rows.has_kernel(x.dtype) or "bias" in self:
            logits = self.score(x, probes).reshape(len(x), -1)
            return kernels.greedy(logits, **tokens), logits
        blocks = self._probe(kernels.probe_logits_stats, x, probes)
        best = kernels.greedy(blocks.block_max, indices=blocks.block_argmax, **tokens)
        return best, blocks.logits

    def _probe(self, kernel: Callable[..., T], x: mx.array, probes: mx.array) -> T:
        rows = self.rows
        return kernel(
            x,
            rows.weight,
            rows.get("scales"),
            rows.get("biases"),
            probes,
            group_size=rows.group_size,
            bits=rows.bits,
            n_rows=self.vocab_size,
        )

    def logits_of(self, x: mx.array, ids: mx.array) -> mx.array:
        """Exact logits, float32 ``[B, n]``, of tokens ``ids [n]`` for ``x [B, D]``."""
        rows = self.embed(ids).astype(mx.float32)
        logits = x.astype(mx.float32) @ rows.T
        if "bias" in self:
            logits = logits + self.bias.reshape(-1)[self._position[ids]]
        return logits

    def position(self, ids: mx.array) -> mx.array:
        """Where the rows of tokens stand in cluster order, uint32, in the shape of
        ``ids``."""
        return self._position[ids]

    def candidates(self, x: mx.array) -> Candidates:
        """Ids, uint32, and exact logits, float32, both ``[..., p * m]``, of what hidden
        states ``x [..., D]`` probe."""
        h = x.reshape(-1, x.shape[-1])
        probes = self.select(self.centroid_logits(h))
        shape = (*x.shape[:-1], self.n_probes * self.cluster_size)
        return Candidates(
            self.token_ids[probes].reshape(shape), self.score(h, probes).reshape(shape)
        )

    def embed(self, ids: mx.array) -> mx.array:
        """Rows ``[*ids.shape, D]`` of tokens, in the rows' dtype: the embeddings of a
        tied model."""
        flat = self.rows.map(lambda a: a.reshape(-1, a.shape[-1]))
        return flat.take(self._position[ids])

    def prefers_dense(self, n_rows: int, sorts: bool = False) -> bool:
        """Whether the dense product takes less time than retrieval for so many hidden
        states at once; ``sorts``: if the vocabulary is to be sorted after it.

        A rule from measurements (benchmarks/kernels.py, four shapes of models, NVIDIA
        H200): on a GPU the dense product reads its rows once for all states, retrieval
        for each; they broke even at 8 states, where retrieval read 0.55 of the rows.
        Candidates are sorted so much faster than the vocabulary that retrieval still
        took a quarter of the time at 32 states. On a CPU the time of both grows with
        the states."""
        if not on_gpu():
            return self.rows_read() >= self.vocab_size
        return self.rows_read(n_rows) >= (2.5 if sorts else 0.55) * self.vocab_size

    @contextmanager
    def answering(self, answer: Callable[[mx.array], mx.array]) -> Iterator[None]:
        """Context in which ``head(x)`` is ``answer(x)``."""
        before = self._answer
        object.__setattr__(self, "_answer", answer)
        try:
            yield
        finally:
            object.__setattr__(self, "_answer", before)

    def fast(self, function: Callable[..., T], *options: Any) -> Callable[..., T]:
        """``function(self, *options, ...)`` as a function of arrays alone, compiled
        where that pays: on a GPU the kernels take less time than building their graph
        anew each step would. On a CPU MLX would call a C++ compiler for it.
        ``options`` are hashable."""
        self.log_weights(1.0)  # not while tracing
        call = partial(function, self, *options)
        if not on_gpu():
            return call
        key = (
            function.__name__,
            options,
            self.n_probes,
            self.transform,
            kernels.kind(),
        )
        if key not in self._compiled:
            if len(self._compiled) >= _REMEMBERED:
                self._compiled.clear()
            self._compiled[key] = mx.compile(call, inputs=self)
        return self._compiled[key]

    def expand(self, found: Retrieved) -> mx.array:
        """Logits, float32 ``[B, V]``: exact where scored, estimated elsewhere."""
        centroid_logits, probes, exact = found
        # In cluster order first; the positions then leave the padding out.
        logits = mx.repeat(
            self.estimate(centroid_logits)[..., None], self.cluster_size, -1
        )
        exact = exact.reshape(*probes.shape, self.cluster_size)
        logits = mx.put_along_axis(logits, probes[..., None], exact, axis=1)
        return logits.reshape(centroid_logits.shape[0], -1)[:, self._position]

    def _retrieve(self, h: mx.array) -> mx.array:
        centroid_logits = self.centroid_logits(h)
        probes = self.select(centroid_logits)
        return self.expand(Retrieved(centroid_logits, probes, self.score(h, probes)))


class FlashEmbedding(nn.Module):
    """Stands in for the ``nn.Embedding`` of a tied model: one table serves both as
    the embedding and, through ``as_linear``, as the classification head.

    Args:
        head (FlashHead): The head.
        dtype (mx.Dtype, optional): That of the embeddings; by default the rows'.
    """

    def __init__(self, head: FlashHead, dtype: mx.Dtype | None = None):
        super().__init__()
        self.head = head
        self._dtype = dtype or head.rows.dtype

    def __call__(self, ids: mx.array) -> mx.array:
        """Embeddings ``[*ids.shape, D]`` of tokens."""
        return self.head.embed(ids).astype(self._dtype)

    def as_linear(self, x: mx.array) -> mx.array:
        """Logits ``[..., V]`` of hidden states ``x [..., D]``, in the dtype of x."""
        return self.head(x)


def default_n_probes(n_clusters: int) -> int:
    """A sixteenth of the clusters: with clusters of 16, an eighth of the rows read."""
    return max(1, n_clusters // 16)
