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

from ..head import FlashHead, masses
from ..kernels import filters, fixed_point
from . import processing
from .settings import Bias, Processor, Settings
from .steps import run

# Clusters that filters look at, those with the largest logits. They contain whatever a
# filter keeps, unless it keeps tokens below the largest logit of all other clusters.
N_FILTERED = 1024


class Noise(NamedTuple):
    """Gumbel noise of one position: of clusters ``[C]`` and of a cluster's rows
    ``[m]``, float32, and one uniform number; or of k positions, stacked."""

    clusters: mx.array
    rows: mx.array
    coin: mx.array

    @classmethod
    def make(cls, head: FlashHead, key: mx.array) -> Noise:
        """The noise of a key, uint32 ``[2]``."""
        keys = mx.random.split(key, 3)
        return cls(
            mx.random.gumbel((head.n_clusters,), key=keys[0]),
            mx.random.gumbel((head.cluster_size,), key=keys[1]),
            mx.random.uniform(key=keys[2]),
        )


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


def draft(
    head: FlashHead,
    settings: Settings | None,
    h: mx.array,
    key: mx.array,
    processors: list[Processor] | None = None,
    context: mx.array | None = None,
) -> mx.array:
    """The token, uint32 ``[1]``, that the dense head is expected to draw.

    Args:
        head: The head; what the model does to its logits is known.
        settings: How to draw; ``None`` for a sampler that is not known, for which the
          likeliest token is the best guess.
        h: One hidden state ``[1, D]``.
        key: Key of the position, uint32 ``[2]``.
        processors: Logits processors that are known.
        context: The tokens so far ``[n]``, for the processors.
    """
    if not processors:
        return run(head, _draft, (settings,), h, key)
    return _draft(head, settings, h, key, processors, context)


def _draft(
    head: FlashHead,
    settings: Settings | None,
    h: mx.array,
    key: mx.array,
    processors: list[Processor] | None = None,
    context: mx.array | None = None,
) -> mx.array:
    """:func:`draft`, of arrays alone where there are no processors."""
    assert head.transform is not None
    centroid_logits = head.centroid_logits(h)
    probes = head.select(centroid_logits)[0]
    # As the dense head rounds: in the states' dtype, whose ties then agree.
    logits = head.score(h, probes[None])[0]
    logits = logits.astype(h.dtype).astype(mx.float32)
    logits = mx.where(logits > -mx.inf, head.transform(logits), -mx.inf)
    ids = head.token_ids[probes]
    if processors:
        logits = _processed(head, processors, context, h, probes, logits)
    if settings is None or settings.greedy:
        return _lowest(logits.reshape(1, -1), ids.reshape(-1), head.vocab_size)
    noise = Noise.make(head, key)
    every = masses.log_masses(head, centroid_logits, settings.temp)[0]
    rules = _rules(settings)
    if rules is not None:
        at_one = masses.log_masses(head, centroid_logits, 1.0)[0]
        rest = mx.logsumexp(mx.put_along_axis(at_one, probes, mx.array(-mx.inf), 0))
        filtered, tail = _filter(
            settings, rules, logits[None], ids[None], noise.coin[None], rest[None]
        )
        logits = filtered[0]
        every = mx.where(tail, every, -mx.inf)
    heated = logits / settings.temp
    every = mx.put_along_axis(every, probes, mx.logsumexp(heated, axis=-1), axis=0)
    cluster = mx.argmax(every + noise.clusters)[None]
    rows = mx.where((probes == cluster)[:, None], heated, -mx.inf).max(
        axis=0, keepdims=True
    )
    if settings.top_k == 0 and settings.min_p == 0:
        # The winner may be a cluster that was not probed: its rows are scored as well.
        scored = head.score(h, cluster[None].astype(mx.uint32))[0]
        scored = mx.where(scored > -mx.inf, head.transform(scored), -mx.inf)
        probed = (probes == cluster).any()
        rows = mx.where(probed, rows, scored / settings.temp)
    row = mx.argmax(rows[0] + noise.rows)
    return head.token_ids[cluster, row[None]]


def draw(
    head: FlashHead,
    settings: Settings,
    logits: mx.array,
    keys: list[mx.array],
    n_filtered: int = N_FILTERED,
) -> Drawn:
    """What the dense head draws at k positions.

    Args:
        head: The head.
        settings: How to draw.
        logits: All the model's logits of each position, in cluster order, ``[k, V]``.
        keys: Key of each position, uint32 ``[2]``.
        n_filtered: Clusters that filters look at; all are always enough.
    """
    if settings.greedy:
        if logits.dtype != mx.float32:
            # mlx-lm chooses among log-probabilities in these bits, ties included.
            logits = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
        ids = head.token_ids.reshape(-1)[: head.vocab_size]
        certain = mx.ones(len(logits), mx.bool_)
        return Drawn(_lowest(logits, ids, head.vocab_size), certain)
    noises = [Noise.make(head, key) for key in keys]
    noise = Noise(*(mx.stack(list(parts)) for parts in zip(*noises)))
    kept = keep(head, settings, logits, noise.coin, n_filtered)
    return Drawn(choose(head, settings, kept, noise), kept.certain)


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
    rules = _rules(settings)
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
    ids = head.token_ids[chosen]
    filtered, _ = _filter(settings, rules, before, ids, coins, rest)
    every = mx.logsumexp(filtered / settings.temp, axis=-1)
    if _cuts(settings):
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


def choose(head: FlashHead, settings: Settings, kept: Kept, noise: Noise) -> mx.array:
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


def _lowest(logits: mx.array, ids: mx.array, vocab_size: int) -> mx.array:
    """The lowest of the ids ``[n]`` with the largest of ``logits [k, n]``."""
    best = logits == logits.max(axis=-1, keepdims=True)
    return mx.where(best, ids, vocab_size).min(axis=-1).astype(mx.uint32)


def _rules(settings: Settings) -> filters.Rules | None:
    """The filters' settings; ``None`` where nothing is filtered."""
    if not _cuts(settings) and settings.xtc_probability == 0:
        return None
    return filters.Rules(
        settings.nucleus,
        settings.min_p,
        settings.min_tokens_to_keep,
        settings.top_k,
        settings.xtc_threshold,
    )


def _cuts(settings: Settings) -> bool:
    """Whether a filter drops the least likely tokens."""
    return settings.nucleus < 1 or settings.min_p > 0 or settings.top_k > 0


def _filter(
    settings: Settings,
    rules: filters.Rules,
    logits: mx.array,
    ids: mx.array,
    coins: mx.array,
    rest: mx.array,
) -> tuple[mx.array, mx.array]:
    """Logits ``[k, p, m]`` of tokens ``ids``, ``-inf`` for what is dropped; and whether
    the tails, whose log-masses at temperature 1 are ``rest [k]``, are kept."""
    flat = logits.reshape(len(logits), -1)
    top = flat.max(axis=-1, keepdims=True)
    distance = fixed_point.levels_below(top, flat, fixed_point.LOG2E)
    drops = None
    if settings.xtc_probability > 0:
        drops = coins <= settings.xtc_probability
    exempt = settings.xtc_exempt(ids.reshape(flat.shape))
    kept, tail = filters.keep(distance, rules, top[:, 0] - rest, drops, exempt)
    return mx.where(kept.reshape(logits.shape), logits, -mx.inf), tail


def _processed(
    head: FlashHead,
    processors: list[Processor],
    context: mx.array | None,
    h: mx.array,
    probes: mx.array,
    logits: mx.array,
) -> mx.array:
    """Logits ``[p, m]`` of the probed clusters with what the processors make of those
    tokens that stand there."""
    ids, edited = processing.apply(head, processors, context, h)
    cluster, slot = mx.divmod(head.positions[ids], head.cluster_size)
    match = probes[None] == cluster[:, None]
    n = logits.size
    at = mx.where(
        match.any(axis=-1), mx.argmax(match, axis=-1) * head.cluster_size + slot, n
    )
    # What is not probed, and repetitions, go to a place that is cut off.
    at = mx.where(processing.repeated(ids), n, at)
    flat = mx.concatenate([logits.reshape(-1), mx.zeros(1)])
    return mx.put_along_axis(flat, at, edited[0], axis=0)[:n].reshape(logits.shape)


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
        context: The tokens so far, ``[n]``.
        logits: The model's, in cluster order.
    """
    for processor in processors:
        if isinstance(processor, Bias):
            at = head.positions[processor.ids]
            logits = logits.at[:, at].add(processor.values.astype(logits.dtype))
        else:
            # To a penalty any numbering of the tokens is as good as another.
            logits = processor.apply(head.positions[context], logits)
    return logits
