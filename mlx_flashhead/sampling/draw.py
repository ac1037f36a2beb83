"""Draw tokens among candidates, the whole vocabulary counted.

Probed tokens have exact logits. All others stand behind one entry, the *tail*, whose
mass is the sum of the estimated masses of the clusters that were not probed (arXiv
2603.14591, section on sampling, draws clusters by their centroids' softmax instead).
One of these clusters is drawn in advance by its mass and scored with the probed ones;
where the draw falls on the tail, the token is drawn among its rows. So a token t of an
unprobed cluster c has the probability

    mass(c) / (probed mass + tail mass) * softmax(logits of c / T)[t]

and every token of the vocabulary can come, without waiting for the device. The filters
are mlx-lm's: top-p, min-p, XTC and top-k look at temperature 1 and apply in this order.
The tail's mass counts in their totals; it ranks last in top-p, and min-p and top-k,
which keep the likeliest tokens, drop it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import mlx.core as mx

from .. import kernels
from ..head import FlashHead, Retrieved
from ..head.transform import Transform
from ..kernels.greedy import to_tokens
from .settings import Bias, Processor, Settings

# Candidates that the sampling kernel takes, and clusters.
LIMIT = 131_072


class Drawn(NamedTuple):
    """Tokens, and what their probabilities follow from.

    Attributes:
        tokens (mx.array): uint32 ``[B]``.
        found (Retrieved): What was scored.
        edits (tuple, optional): Ids ``[n]`` and logits ``[1, n]`` that logits
          processors have changed.
    """

    tokens: mx.array
    found: Retrieved
    edits: tuple[mx.array, mx.array] | None = None


class _Pool(NamedTuple):
    """What a token is drawn from: logits of the candidates ``[B, K]`` and of the tail
    cluster's rows ``[B, m]``, and the log-mass of the tail ``[B, 2]`` at the
    temperature and at 1; ``None`` for rows that cannot be drawn and masses that do not
    count."""

    logits: mx.array
    rest: mx.array | None
    tail: mx.array | None


def fits(head: FlashHead, settings: Settings) -> bool:
    """Whether tokens can be drawn among this head's candidates."""
    n_candidates = head.n_probes * head.cluster_size
    return (
        head.transform is not None
        and max(n_candidates, head.n_clusters) < LIMIT
        and settings.top_k < head.vocab_size
    )


def draw(
    head: FlashHead,
    settings: Settings,
    h: mx.array,
    key: mx.array,
    processors: Sequence[Processor] = (),
    context: mx.array | None = None,
) -> Drawn:
    """One token for each hidden state.

    Args:
        head: The head; :func:`fits` holds.
        settings: How to draw.
        h: Hidden states ``[B, D]``.
        key: Random key, uint32 ``[2]``.
        processors: Logits processors, for one hidden state.
        context: The tokens so far ``[n]``, for the processors.
    """
    if not settings.greedy:
        head.log_weights(settings.temp)
    if not processors:
        tokens, *scored = head.fast(_draw, settings)(h, key)
        return Drawn(tokens, Retrieved(*scored))
    found, pool = _find(head, settings, h, key)
    touched, logits = _process(head, processors, context, h)
    pool = _edited(head, found.probes, pool, touched, logits)
    n_tail = 0 if pool.rest is None else head.cluster_size
    ids = head.token_ids[found.probes[0]].reshape(-1)
    split = ids.size - n_tail
    ids = mx.concatenate([ids[:split], touched, ids[split:]])
    at = _choose(settings, pool, key, ids[None])
    return Drawn(ids[at], found, (touched, logits))


def logprobs(head: FlashHead, drawn: Drawn) -> mx.array:
    """Log-probabilities of the whole vocabulary, float32 ``[B, V]``: exact where
    scored, estimated elsewhere. Lazy: whoever does not look at them pays nothing."""
    logits = head.fast(_expanded)(*drawn.found)
    if drawn.edits is not None:
        ids, edited = drawn.edits
        again = _repeated(ids)  # the first of them counts
        edited = mx.where(again, edited[:, :1], edited)
        ids = mx.where(again, ids[0], ids)
        logits = mx.put_along_axis(logits, ids[None], edited, axis=1)
    return logits - mx.logsumexp(logits, axis=-1, keepdims=True)


def full_logits(head: FlashHead, h: mx.array) -> mx.array:
    """The model's logits ``[B, V]`` for hidden states ``[B, D]``, by retrieval."""
    return head.fast(_retrieved)(h)


def _retrieved(head: FlashHead, h: mx.array) -> mx.array:
    centroid_logits = head.centroid_logits(h)
    probes = head.select(centroid_logits)
    return _expanded(head, centroid_logits, probes, head.score(h, probes))


def _expanded(head: FlashHead, *found: mx.array) -> mx.array:
    return _transform(head)(head.expand(Retrieved(*found)))


def _transform(head: FlashHead) -> Transform:
    assert head.transform is not None  # as fits() has seen
    return head.transform


def _draw(
    head: FlashHead, settings: Settings, h: mx.array, key: mx.array
) -> tuple[mx.array, ...]:
    """:func:`draw` without processors, of arrays alone."""
    if settings.greedy:
        centroid_logits = head.centroid_logits(h)
        probes = head.select(centroid_logits)
        tokens, logits = head.best(h, probes)
        return tokens, centroid_logits, probes, logits
    found, pool = _find(head, settings, h, key)
    ids = None
    if settings.xtc_special_tokens:
        ids = head.token_ids[found.probes].reshape(len(h), -1)
    at = _choose(settings, pool, key, ids)
    return to_tokens(at, found.probes, head.token_ids), *found


def _find(
    head: FlashHead, settings: Settings, h: mx.array, key: mx.array
) -> tuple[Retrieved, _Pool]:
    """What is scored for ``h``, the tail cluster last, and the pool it makes."""
    centroid_logits = head.centroid_logits(h)
    probes = probed = head.select(centroid_logits)
    unsure = not settings.greedy and head.n_probes < head.n_clusters
    # Min-p and top-k drop the tail, which top-p and XTC before them have counted.
    has_tail = unsure and settings.top_k == 0 and settings.min_p == 0
    counts = unsure and (settings.nucleus < 1 or settings.xtc_probability > 0)
    tail = None
    if has_tail or counts:

        def unprobed(temperature: float) -> mx.array:
            masses = head.log_masses(centroid_logits, temperature)
            return mx.put_along_axis(masses, probed, mx.array(-mx.inf), axis=-1)

        at_one = heated = mx.full((len(h),), -mx.inf)
        if counts:
            at_one = mx.logsumexp(unprobed(1.0), axis=-1)
        if has_tail:
            masses = unprobed(settings.temp)
            heated = mx.logsumexp(masses, axis=-1)
            cluster = kernels.sample(masses, _subkey(key, 1), temperature=1.0)
            probes = mx.concatenate([probes, cluster[:, None]], axis=-1)
        tail = mx.stack([heated, at_one], axis=-1)
    exact = head.score(h, probes).reshape(len(h), -1)
    # A cap would make padding finite.
    logits = mx.where(exact > -mx.inf, _transform(head)(exact), -mx.inf)
    n = head.n_probes * head.cluster_size
    rest = logits[:, n:] if has_tail else None
    return Retrieved(centroid_logits, probes, exact), _Pool(logits[:, :n], rest, tail)


def _choose(
    settings: Settings, pool: _Pool, key: mx.array, ids: mx.array | None
) -> mx.array:
    """Draw from a pool: indices ``[B]`` into its logits and, after them, its rest.
    ``ids`` are the tokens of all, needed for XTC's special tokens."""
    logits, rest, tail = pool
    if settings.greedy:
        return kernels.greedy(logits)
    kept: dict[str, Any] = {
        "top_p": settings.nucleus,
        "min_p": settings.min_p,
        "top_k": settings.top_k,
    }
    if settings.xtc_probability > 0 or settings.min_tokens_to_keep > 1:
        logits, tail = _filter(settings, pool, key, ids)
        kept = {}
    at = kernels.sample(
        logits, _subkey(key, 2), temperature=settings.temp, tail=tail, **kept
    )
    if rest is None:
        return at
    inside = kernels.sample(rest, _subkey(key, 3), temperature=settings.temp)
    return mx.where(at < logits.shape[1], at, logits.shape[1] + inside)


def _filter(
    settings: Settings, pool: _Pool, key: mx.array, ids: mx.array | None
) -> tuple[mx.array, mx.array | None]:
    """The pool's logits and tail with what the filters drop at ``-inf``: for settings
    that the sampling kernel does not know."""
    logits, _, tail = pool
    n = logits.shape[1]
    log_tail = tail[:, 1:] if tail is not None else mx.full((len(logits), 1), -mx.inf)

    def total(logits: mx.array, log_tail: mx.array) -> mx.array:
        return mx.logaddexp(mx.logsumexp(logits, axis=-1, keepdims=True), log_tail)

    if settings.nucleus < 1:
        ordered = -mx.sort(-logits, axis=-1)
        probs = mx.exp(ordered - total(logits, log_tail))
        upto = mx.cumsum(probs, axis=-1)
        last = (upto - probs < settings.nucleus).sum(axis=-1, keepdims=True) - 1
        edge = mx.take_along_axis(ordered, last, axis=-1)
        logits = mx.where(logits < edge, -mx.inf, logits)
        log_tail = mx.where(upto[:, -1:] < settings.nucleus, log_tail, -mx.inf)
    if settings.min_p > 0:
        floor = logits.max(axis=-1, keepdims=True) + math.log(settings.min_p)
        if 1 < settings.min_tokens_to_keep <= n:
            k = settings.min_tokens_to_keep
            floor = mx.minimum(floor, mx.topk(logits, k).min(axis=-1, keepdims=True))
        logits = mx.where(logits < floor, -mx.inf, logits)
        log_tail = mx.full(log_tail.shape, -mx.inf)
    if settings.xtc_probability > 0:
        probs = mx.exp(logits - total(logits, log_tail))
        above = probs > settings.xtc_threshold
        lowest = mx.where(above, probs, mx.inf).min(axis=-1, keepdims=True)
        mask = probs > lowest
        for token in settings.xtc_special_tokens:
            assert ids is not None  # as _draw() makes sure
            mask = mask & (ids[:, :n] != token)
        u = mx.random.uniform(shape=(len(logits), 1), key=_subkey(key, 4))
        drop = mask & (u <= settings.xtc_probability)
        logits = mx.where(drop, -mx.inf, logits)
    if 0 < settings.top_k < n:
        edge = mx.topk(logits, settings.top_k).min(axis=-1, keepdims=True)
        logits = mx.where(logits < edge, -mx.inf, logits)
    if tail is not None:
        tail = mx.where(mx.isinf(log_tail), -mx.inf, tail)
    return logits, tail


def _subkey(key: mx.array, i: int) -> mx.array:
    """Keys of Threefry that differ anyhow give independent numbers."""
    return key ^ mx.array([0, i << 28], dtype=mx.uint32)


# ---- logits processors -------------------------------------------------------------


def _process(
    head: FlashHead,
    processors: Sequence[Processor],
    context: mx.array | None,
    h: mx.array,
) -> tuple[mx.array, mx.array]:
    """The ids ``[n]`` that the processors touch, some perhaps more than once, and the
    logits ``[1, n]`` that they make of them; ``-inf`` for a repetition."""
    if context is None:
        context = mx.zeros((0,), mx.uint32)
    parts = [
        p.ids if isinstance(p, Bias) else context[-p.context_size :] for p in processors
    ]
    n = sum(part.size for part in parts)
    # Few different sizes, for which kernels are compiled.
    padding = mx.broadcast_to(parts[0][:1], (-n % 64,))
    ids = mx.concatenate([part.astype(mx.uint32) for part in (*parts, padding)])
    # A small vocabulary of its own: each token's number is where it first stands.
    first = mx.argmax(ids[:, None] == ids[None], axis=-1)
    logits = _transform(head)(head.logits_of(h, ids))
    start = 0
    for processor, part in zip(processors, parts):
        tokens = first[start : start + part.size]
        start += part.size
        if isinstance(processor, Bias):
            logits = logits.at[:, tokens].add(processor.values.astype(mx.float32))
        else:
            logits = processor.apply(tokens, logits)
    return ids, mx.where(_repeated(ids), -mx.inf, logits)


def _repeated(ids: mx.array) -> mx.array:
    first = mx.argmax(ids[:, None] == ids[None], axis=-1)
    return first != mx.arange(ids.size)


def _edited(
    head: FlashHead, probes: mx.array, pool: _Pool, ids: mx.array, logits: mx.array
) -> _Pool:
    """The pool with ``logits [1, n]`` of ``ids [n]`` as candidates of their own,
    instead of where they stood."""
    m = head.cluster_size
    cluster, slot = mx.divmod(head.position(ids), m)
    match = probes[0][None] == cluster[:, None]
    at = mx.argmax(match, axis=-1) * m + slot
    n = probes.shape[1] * m
    at = mx.where(match.any(axis=-1), at, n)
    parts = [pool.logits] + ([] if pool.rest is None else [pool.rest])
    stood = mx.concatenate([*parts, mx.zeros((1, 1))], axis=1)
    stood = mx.put_along_axis(stood, at[None], mx.array(-mx.inf), axis=1)
    k = pool.logits.shape[1]
    candidates = mx.concatenate([stood[:, :k], logits], axis=1)
    if pool.rest is None or pool.tail is None:
        return _Pool(candidates, None, pool.tail)
    rest = stood[:, k:n]
    # Where nothing is left of the tail cluster, nothing is drawn there.
    tail = mx.where(rest.max(axis=-1, keepdims=True) > -mx.inf, pool.tail, -mx.inf)
    return _Pool(candidates, rest, tail)
