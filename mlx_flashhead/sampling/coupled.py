"""Draws of a draft and of its verification that share their noise.

Adding independent Gumbel noise to logits and taking the largest draws from their
softmax (Gumbel-max). Here it is done in two stages, first among the log-masses of
clusters, then among the rows of the one that wins, so that a draw needs one number for
each cluster and not for each token. The noise of a position is a function of that
position's key alone. So a draft, which knows some clusters exactly and estimates the
others, and the dense head, which knows all, mostly draw the same token; and what the
dense head draws does not depend on the draft, nor on how many tokens were drafted: it
is a draw from the dense head's own distribution. Nothing has to be accepted or rejected
by chance, as in speculative sampling (arXiv 2211.17192).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import mlx.core as mx

from .. import kernels
from ..head import FlashHead
from ..kernels import filters
from .draw import rules_of
from .settings import Bias, Processor, Settings, Tempered
from .steps import run

# Clusters that filters look at, those with the largest logits. They contain whatever a
# filter keeps, unless it keeps tokens below the largest logit of all other clusters.
N_FILTERED = 1024


class Drawn(NamedTuple):
    """Tokens of rows of logits, uint32 ``[k]``, and whether each is certain, bool
    ``[k]``: not where filters keep more than was looked at."""

    tokens: mx.array
    certain: mx.array


class Kept(NamedTuple):
    """What is left to draw from at k positions.

    Attributes:
        clusters: Which, ``[k, n]``; ``None`` for all of them.
        masses: Their log-masses at the temperature, float32 ``[k, n]``.
        logits: Their rows' logits, float32 ``[k, n, m]``; ``-inf`` for what is dropped.
        certain: As in :class:`Drawn`.
    """

    clusters: mx.array | None
    masses: mx.array
    logits: mx.array
    certain: mx.array


def draw(
    head: FlashHead,
    settings: Settings,
    logits: mx.array,
    keys: mx.array,
    n_filtered: int = N_FILTERED,
) -> Drawn:
    """What the dense head draws at k positions.

    Args:
        head: The head.
        settings: How to draw.
        logits: All the model's logits of each position, in cluster order, ``[k, V]``.
        keys: Key of each position, uint32 ``[k, 2]``.
        n_filtered: Clusters that filters look at; all are always enough.
    """
    return Drawn(*run(head, _draw, (settings, n_filtered), logits, keys))


def _draw(
    head: FlashHead,
    settings: Settings,
    n_filtered: int,
    logits: mx.array,
    keys: mx.array,
) -> tuple[mx.array, mx.array]:
    """:func:`draw`, of arrays alone."""
    if settings.greedy:
        if logits.dtype != mx.float32:
            # mlx-lm chooses among log-probabilities in these bits, ties included.
            logits = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
        ids = head.token_ids.reshape(-1)[: head.vocab_size]
        return kernels.lowest(logits, ids), mx.ones(len(logits), mx.bool_)
    if isinstance(settings, Tempered):
        settings, logits = settings.on(logits)
    noise = kernels.Noise.make(head.n_clusters, head.cluster_size, keys)
    kept = keep(head, settings, logits, noise.coins, n_filtered)
    return choose(head, settings, kept, noise), kept.certain


def keep(
    head: FlashHead,
    settings: Settings,
    logits: mx.array,
    coins: mx.array,
    n_filtered: int = N_FILTERED,
) -> Kept:
    """What k positions are drawn from: all that the filters leave.

    Args:
        head: The head.
        settings: How to draw; not greedy.
        logits: All the model's logits of each position, in cluster order, ``[k, V]``.
        coins: Uniform numbers ``[k]``, by which XTC drops or does not.
        n_filtered: Clusters that filters look at.
    """
    k = len(logits)
    certain = mx.ones(k, mx.bool_)
    whole = logits.astype(mx.float32)
    if head.padding:
        padding = mx.full((k, head.padding), -mx.inf)
        whole = mx.concatenate([whole, padding], axis=-1)
    clustered = whole.reshape(k, head.n_clusters, head.cluster_size)
    rules = rules_of(settings)
    if rules is None:
        every = mx.logsumexp(clustered / settings.temp, axis=-1)
        return Kept(None, every, clustered, certain)
    best = clustered.max(axis=-1)
    n = min(n_filtered, head.n_clusters)
    chosen = mx.argpartition(-best, kth=n - 1, axis=-1)[:, :n]
    outside = mx.put_along_axis(best, chosen, mx.array(-mx.inf), axis=-1)
    outside = outside.max(axis=-1)
    log_z = mx.logsumexp(whole, axis=-1)
    before = mx.take_along_axis(clustered, chosen[..., None], axis=1)
    inside = mx.logsumexp(before.reshape(k, -1), axis=-1)
    rest = log_z + mx.log(1 - mx.exp(mx.minimum(inside - log_z, 0)))
    q = settings.xtc_probability
    left, _ = filters.filtered(
        before.reshape(k, -1),
        rules,
        rest,
        coins <= q if q > 0 else None,
        settings.xtc_exempt(head.token_ids[chosen].reshape(k, -1)),
    )
    filtered = left.reshape(before.shape)
    every = mx.logsumexp(filtered / settings.temp, axis=-1)
    if settings.cuts:
        # Filters keep the likeliest. Where they have dropped one that is as likely
        # as any outside, all outside are dropped, too.
        kept = filtered > -mx.inf
        lowest = mx.where(kept, before, mx.inf).min(axis=(1, 2))
        below = (before < lowest[:, None, None]) & ~kept
        dropped = mx.where(below, before, -mx.inf).max(axis=(1, 2))
        certain = (dropped >= outside) | (outside == -mx.inf)
        return Kept(chosen, every, filtered, certain)
    # XTC alone drops nothing outside, if nothing there is above its threshold.
    certain = outside - log_z <= math.log(max(settings.xtc_threshold, 1e-30))
    whole_mass = mx.logsumexp(clustered / settings.temp, axis=-1)
    every = mx.put_along_axis(whole_mass, chosen, every, axis=-1)
    clustered = mx.put_along_axis(clustered, chosen[..., None], filtered, axis=1)
    return Kept(None, every, clustered, certain)


def choose(
    head: FlashHead, settings: Settings, kept: Kept, noise: kernels.Noise
) -> mx.array:
    """Tokens, uint32 ``[k]``, of what is kept and the noise of each position."""
    numbers = noise.clusters
    if kept.clusters is not None:
        numbers = mx.take_along_axis(numbers, kept.clusters, axis=-1)
    at = mx.argmax(kept.masses + numbers, axis=-1, keepdims=True)
    rows = mx.take_along_axis(kept.logits, at[..., None], axis=1)[:, 0]
    row = mx.argmax(rows / settings.temp + noise.rows, axis=-1)
    if kept.clusters is not None:
        at = mx.take_along_axis(kept.clusters, at, axis=-1)
    return head.token_ids[at[:, 0], row]


def process(
    head: FlashHead,
    processors: list[Processor],
    context: mx.array,
    logits: mx.array,
) -> mx.array:
    """Logits ``[1, V]`` in cluster order, as the processors make them.

    Args:
        head: The head.
        processors: Processors that are known.
        context: The tokens so far, ``[n]``; before there is one, mlx-lm asks none.
        logits: The model's, in cluster order.
    """
    for processor in processors if len(context) else ():
        if isinstance(processor, Bias):
            at = head.positions[processor.ids]
            logits = logits.at[:, at].add(processor.values.astype(logits.dtype))
        else:
            # To a penalty any numbering of the tokens is as good as another.
            logits = processor.apply(head.positions[context], logits)
    return logits
