"""Log-probabilities that are made only as far as somebody looks at them.

mlx-lm gives every token with log-probabilities of the whole vocabulary. Its server asks
them for one number a token, the token's own, and now and then for the likeliest.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple, Protocol, cast

import mlx.core as mx

from ..head import FlashHead, Transform, masses
from .draw import Drawn, edited, known_transform, logprobs
from .steps import constant, run


class Known(Protocol):
    """What is known of a position's log-probabilities without making all of them."""

    def of(self, token: int) -> mx.array:
        """That of one token, a number."""

    def top(self, n: int) -> tuple[mx.array, mx.array] | None:
        """As :meth:`LogProbs.top`."""


class LogProbs(mx.array):
    """Log-probabilities of the vocabulary, ``[V]``: a lazy array as any other, but for
    single tokens, and for the likeliest perhaps, it has an answer of its own.

    Args:
        whole: All of them, lazy.
        known: What answers for single tokens.
    """

    _known: Known | None = None  # also where it was copied or unpickled

    def __init__(self, whole: mx.array, known: Known):
        super().__init__(whole)
        self._known = known

    def __getitem__(self, index: Any) -> mx.array:
        if self._known is None or type(index) is not int or not 0 <= index < self.size:
            return super().__getitem__(index)
        return self._known.of(index)

    def top(self, n: int) -> tuple[mx.array, mx.array] | None:
        """The n likeliest tokens and their log-probabilities, both ``[n]``, falling;
        ``None`` where all have to be made for it."""
        return None if self._known is None else self._known.top(n)


def _changing(name: str) -> Callable[..., Any]:
    """A method of arrays that changes them: what was known holds no longer."""
    stock = getattr(mx.array, name)

    def change(self: LogProbs, *args: Any) -> Any:
        self._known = None
        return stock(self, *args)

    return change


for _name in (
    *("setitem", "iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow"),
    *("imatmul", "iand", "ior", "ixor", "ilshift", "irshift"),
):
    setattr(LogProbs, f"__{_name}__", _changing(f"__{_name}__"))


# ---- of all logits -----------------------------------------------------------------


@dataclass(frozen=True)
class Dense:
    """Of logits of the whole vocabulary.

    Attributes:
        head: The head.
        logits: Of k positions in cluster order, ``[k, V]``.
        log_z: Their log-sum-exp, ``[k, 1]``.
        i: The position.
    """

    head: FlashHead
    logits: mx.array
    log_z: mx.array
    i: int

    def of(self, token: int) -> mx.array:
        logit = self.logits[self.i, self.head.positions[token]]
        return logit - self.log_z[self.i, 0]

    def top(self, n: int) -> None:
        return None


def dense_logprobs(head: FlashHead, logits: mx.array) -> list[LogProbs]:
    """Log-probabilities of k positions, in the logits' dtype.

    Args:
        head: The head.
        logits: The model's logits in cluster order, ``[k, V]``.
    """
    whole, log_z = run(head, _log_softmax, (), logits)
    return [
        LogProbs(whole[i], Dense(head, logits, log_z, i)) for i in range(len(logits))
    ]


def _log_softmax(head: FlashHead, logits: mx.array) -> tuple[mx.array, mx.array]:
    """In vocabulary order, ``[k, V]``, and their log-sum-exp."""
    log_z = mx.logsumexp(logits, axis=-1, keepdims=True)
    return logits[:, head.positions] - log_z, log_z


# ---- of candidates -----------------------------------------------------------------


class Scored(NamedTuple):
    """What a decode step knows of the model's logits.

    Attributes:
        clusters: Those with exact logits, that of the drawn token first, uint32
          ``[B, q]``; some may stand twice.
        logits: Of their rows, float32 ``[B, q, m]``; ``-inf`` for padding, and for a
          cluster that stood before.
        estimates: Of each token of a cluster, float32 ``[B, C]``; ``-inf`` where there
          are exact ones.
        log_z: Log of the mass of the whole vocabulary, float32 ``[B]``.
    """

    clusters: mx.array
    logits: mx.array
    estimates: mx.array
    log_z: mx.array


def _scored(
    head: FlashHead,
    h: mx.array,
    tokens: mx.array,
    centroid_logits: mx.array,
    probes: mx.array,
    exact: mx.array,
    log_weights: mx.array,
    *edits: mx.array,
) -> Scored:
    transform = known_transform(head)
    own = (head.positions[tokens] // head.cluster_size)[:, None]
    clusters = mx.concatenate([own, probes], axis=1)
    again = (probes == own)[..., None]
    exact = mx.where(again, -mx.inf, exact.reshape(*probes.shape, -1))
    exact = mx.concatenate([head.score(h, own), exact], axis=1)
    logits = _transformed(transform, exact)
    if edits:
        logits = edited(head, clusters, logits, *edits).reshape(exact.shape)
    each = transform(centroid_logits.astype(mx.float32)) + log_weights - head.log_sizes
    each = transform(transform.inverse(each))  # below a cap, where there is one
    each = mx.put_along_axis(each, clusters, mx.array(-mx.inf), axis=1)
    log_z = mx.logaddexp(
        mx.logsumexp(logits.reshape(len(h), -1), axis=1),
        mx.logsumexp(each + head.log_sizes, axis=1),
    )
    return Scored(clusters, logits, each, log_z)


def _transformed(transform: Transform, logits: mx.array) -> mx.array:
    """The model's logits; what is not there, ``-inf``, stays so."""
    if transform.identity:
        return logits
    return mx.where(logits > -mx.inf, transform(logits), -mx.inf)


class Decoded:
    """A step of B sequences, whose tokens were drawn among candidates."""

    def __init__(self, head: FlashHead, drawn: Drawn):
        self.head, self._drawn = head, drawn

    @cached_property
    def tokens(self) -> list[int]:
        """Those that were drawn; empty where the draw's log-probabilities are not quite
        those of :func:`logprobs`: it rounds edited logits otherwise, and knows of no
        cap where it adds up what was not scored."""
        drawn, transform = self._drawn, known_transform(self.head)
        if drawn.edits is not None or transform.softcap:
            return []
        return cast(list[int], drawn.tokens.tolist())

    @property
    def logprob(self) -> mx.array:
        """Their log-probabilities, float32 ``[B]``: the draw has found them."""
        return self._drawn.logprob

    @cached_property
    def scored(self) -> Scored:
        """What is known of them; computed at once for all, if anybody asks."""
        drawn = self._drawn
        log_weights = constant(self.head, masses.log_weights, 1.0)
        known: tuple[mx.array, ...] = (drawn.states, drawn.tokens)
        known += (*drawn.retrieved, log_weights)
        known += drawn.edits or ()
        return Scored(*run(self.head, _scored, (), *known))

    def score(self, b: int, clusters: mx.array) -> mx.array:
        """The model's exact logits of the rows of ``clusters [n]`` for sequence b,
        float32 ``[n, m]``; ``-inf`` for padding."""
        h = self._drawn.states[b : b + 1]
        logits = self.head.score(h, clusters[None])[0]
        return _transformed(known_transform(self.head), logits)


@dataclass(frozen=True)
class Candidates:
    """Sequence b of a step."""

    decoded: Decoded
    b: int

    @property
    def _own(self) -> Scored:
        return Scored(*(a[self.b] for a in self.decoded.scored))

    def of(self, token: int) -> mx.array:
        if self.decoded.tokens[self.b : self.b + 1] == [token]:
            return self.decoded.logprob[self.b]
        head, own = self.decoded.head, self._own
        cluster, row = mx.divmod(head.positions[token], head.cluster_size)
        found = own.clusters == cluster
        at = mx.argmax(found)
        exact = own.logits[at, row]
        return mx.where(found.any(), exact, own.estimates[cluster]) - own.log_z

    def top(self, n: int) -> tuple[mx.array, mx.array]:
        head, own = self.decoded.head, self._own
        # Exact ones: the likeliest of the other clusters are scored, too.
        n_more = min(n, head.n_clusters)
        more = mx.argpartition(-own.estimates, kth=n_more - 1)[:n_more]
        more = more.astype(mx.uint32)
        # Where all are scored already, these stand twice.
        further = mx.where(
            own.estimates[more, None] > -mx.inf,
            self.decoded.score(self.b, more),
            -mx.inf,
        )
        ids = head.token_ids[mx.concatenate([own.clusters, more])].reshape(-1)
        logits = mx.concatenate([own.logits, further]).reshape(-1)
        at = mx.argpartition(-logits, kth=n - 1)[:n]
        at = at[mx.argsort(-logits[at])]
        return ids[at], logits[at] - own.log_z


def drawn_logprobs(head: FlashHead, drawn: Drawn) -> list[LogProbs]:
    """Log-probabilities of B sequences, float32, as :func:`logprobs` makes them."""
    whole, decoded = logprobs(head, drawn), Decoded(head, drawn)
    return [LogProbs(whole[b], Candidates(decoded, b)) for b in range(len(whole))]
