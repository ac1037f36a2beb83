"""Draws among the tokens that a mask allows.

Where they are few, their rows are scored and nothing else is: what is drawn is the
dense head's own choice. Where they are many, they are retrieved as without a mask, from
the clusters that have any; the masses of the others count for as much as the share of
their tokens that is allowed. The noise is that of :mod:`mlx_flashhead.sampling.coupled`
in both cases, so that the dense head, masked, draws the same.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np

from .. import kernels
from ..head import FlashHead, masses
from ..kernels import filters
from . import coupled, processing
from .draw import Edits, _draw, _logits, known_transform, rules_of
from .masks import Allowed
from .settings import Bias, Processor, Settings
from .steps import constant


class Choice(NamedTuple):
    """A token of one position, uint32 ``[1]``, and what makes the log-probabilities of
    the whole vocabulary, ``[1, V]``."""

    tokens: mx.array
    logprobs: Callable[[], mx.array]


def sure(head: FlashHead, allowed: Allowed) -> bool:
    """Whether :func:`choose` chooses as the dense head does."""
    return allowed.few(head.n_probes * head.cluster_size)


def choose(
    head: FlashHead,
    settings: Settings,
    h: mx.array,
    key: mx.array,
    allowed: Allowed,
    processors: Sequence[Processor] = (),
    context: Sequence[int] = (),
) -> Choice:
    """A token for one hidden state.

    Args:
        head: The head; :func:`mlx_flashhead.sampling.fits` holds.
        settings: How to draw.
        h: The hidden state ``[1, D]``.
        key: Random key, uint32 ``[2]``.
        allowed: The tokens that may come.
        processors: Logits processors.
        context: The tokens so far, for the processors.
    """
    if allowed.n == 1:
        ids = mx.array(allowed.ids.astype(np.uint32))
        certain = mx.zeros((1, 1))
        return Choice(ids, partial(_spread, head, allowed, certain))
    if sure(head, allowed):
        logits = _logits_of(head, h, allowed.ids)
        logits = _processed(processors, context, allowed.ids, logits)
        tokens = _choose_few(head, settings, key, allowed, logits)
        return Choice(tokens, partial(_spread, head, allowed, logits))
    return _retrieve(head, settings, h, key, allowed, processors, context)


# ---- few -----------------------------------------------------------------------------


def _logits_of(head: FlashHead, h: mx.array, ids: np.ndarray) -> mx.array:
    """The model's logits ``[1, n]`` of tokens ``ids [n]``, as it rounds them."""
    logits = processing.logits_of(head, h, mx.array(ids.astype(np.uint32)))
    return known_transform(head)(logits.astype(head.product_dtype(h.dtype)))


def _processed(
    processors: Sequence[Processor],
    context: Sequence[int],
    ids: np.ndarray,
    logits: mx.array,
) -> mx.array:
    """Logits ``[1, n]`` of ascending ``ids [n]``, as the processors make them."""
    if not processors:
        return logits

    def places(tokens: Any) -> mx.array:
        """Where tokens stand among the ids; those that do not, behind them."""
        tokens = np.asarray(tokens)
        at = np.minimum(np.searchsorted(ids, tokens), len(ids) - 1)
        return mx.array(np.where(ids[at] == tokens, at, len(ids)).astype(np.uint32))

    logits = mx.concatenate([logits, mx.zeros((1, 1), logits.dtype)], axis=1)
    for processor in processors:
        if isinstance(processor, Bias):
            at = places(processor.ids)
            logits = logits.at[:, at].add(processor.values.astype(logits.dtype))
        elif seen := context[-processor.context_size :]:
            logits = processor.apply(places(seen), logits)
    return logits[:, : len(ids)]


def _choose_few(
    head: FlashHead,
    settings: Settings,
    key: mx.array,
    allowed: Allowed,
    logits: mx.array,
) -> mx.array:
    """The token, uint32 ``[1]``, of the model's ``logits [1, n]`` of all that may come;
    as :func:`coupled.draw` draws it."""
    if settings.greedy:
        if logits.dtype != mx.float32:
            logits = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
        return kernels.lowest(logits, mx.array(allowed.ids.astype(np.uint32)))
    m = head.cluster_size
    at = allowed.vocabulary.positions[allowed.ids]
    clusters, which = np.unique(at // m, return_inverse=True)
    places = mx.array((which * m + at % m)[None].astype(np.uint32))
    rows = mx.full((1, len(clusters) * m), -mx.inf)
    rows = mx.put_along_axis(rows, places, logits.astype(mx.float32), axis=1)
    noise = kernels.Noise.make(head.n_clusters, m, key[None])
    chosen = mx.array(clusters.astype(np.uint32))[None]
    rules = rules_of(settings)
    if rules is not None:
        q = settings.xtc_probability
        drops = noise.coins <= q if q > 0 else None
        exempt = settings.xtc_exempt(head.token_ids[chosen].reshape(rows.shape))
        nothing = mx.array([-mx.inf])
        rows, _ = filters.filtered(rows, rules, nothing, drops, exempt)
    left = rows.reshape(1, len(clusters), m)
    heated = mx.logsumexp(left / settings.temp, axis=-1)
    kept = coupled.Kept(chosen, heated, left, mx.ones(1, mx.bool_))
    return coupled.choose(head, settings, kept, noise)


def _spread(head: FlashHead, allowed: Allowed, logits: mx.array) -> mx.array:
    """Log-probabilities ``[1, V]`` of ``logits [1, n]`` of all that may come."""
    whole = mx.full((1, head.vocab_size), -mx.inf, logits.dtype)
    ids = mx.array(allowed.ids.astype(np.uint32))[None]
    logits = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    return mx.put_along_axis(whole, ids, logits, axis=1)


# ---- many ----------------------------------------------------------------------------


class _MaskedHead:
    """A head as it is where only some tokens may come: clusters without any have no
    mass, and rows of others no logit."""

    def __init__(self, head: FlashHead, allowed: Allowed):
        self._head, self._allowed = head, allowed

    def __getattr__(self, name: str) -> Any:
        return getattr(self._head, name)

    def centroid_logits(self, x: mx.array) -> mx.array:
        logits = self._head.centroid_logits(x)
        return mx.where(self._allowed.log_shares > -mx.inf, logits, -mx.inf)

    def score(self, x: mx.array, probes: mx.array) -> mx.array:
        logits = self._head.score(x, probes)
        return mx.where(self._allowed.by_cluster[probes], logits, -mx.inf)

    def kernel_rows(self, x: mx.array) -> None:
        """None that a kernel may score: it knows of no mask."""
        return None

    def log_weights(self, temperature: float) -> mx.array:
        """:func:`masses.log_weights`, of the tokens that may come."""
        weights = constant(self._head, masses.log_weights, temperature)
        return weights + self._allowed.log_shares


def _retrieve(
    head: FlashHead,
    settings: Settings,
    h: mx.array,
    key: mx.array,
    allowed: Allowed,
    processors: Sequence[Processor],
    context: Sequence[int],
) -> Choice:
    masked: Any = _MaskedHead(head, allowed)
    heated, at_one = (
        masked.log_weights(t) for t in (1.0 if settings.greedy else settings.temp, 1.0)
    )
    edits = None
    if processors:
        so_far = mx.array(list(context), mx.uint32) if context else None
        ids, edited = processing.apply(head, processors, so_far, h)
        may_come = allowed.clustered[head.positions[ids]]
        edits = ids, mx.where(may_come, edited, -mx.inf)
    tokens, _, *scored = _draw(masked, settings, h, key, heated, at_one, edits)
    return Choice(tokens, partial(_logprobs, masked, h, tokens, scored, edits))


def _logprobs(
    masked: Any,
    h: mx.array,
    tokens: mx.array,
    scored: list[mx.array],
    edits: Edits | None,
) -> mx.array:
    allowed: Allowed = masked._allowed
    logits = _logits(masked, h, tokens, *scored)
    if edits is not None:
        logits = processing.put(logits, *edits)
    logits = mx.where(mx.array(allowed.bits), logits, -mx.inf)
    return logits - mx.logsumexp(logits, axis=-1, keepdims=True)
