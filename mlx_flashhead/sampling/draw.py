"""Draw tokens among candidates, the whole vocabulary counted.

Probed tokens have exact logits. All others stand behind one entry, the *tail*, whose
mass is the sum of the estimated masses of the clusters that were not probed (arXiv
2603.14591, section on sampling, draws clusters by their centroids' softmax instead).
One of these clusters is drawn in advance by its mass and scored with the probed ones;
where the draw falls on the tail, the token is drawn among its rows. So a token t of an
unprobed cluster c has the probability

    mass(c) / (probed mass + tail mass) * softmax(logits of c / T)[t]

and every token of the vocabulary can come, without waiting for the device. What the
filters keep of candidates and tail is defined in :mod:`mlx_flashhead.kernels.filters`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import mlx.core as mx

from .. import kernels
from ..head import FlashHead, Retrieved, Transform, masses
from . import processing
from .settings import Processor, Settings
from .steps import run

# Candidates that the sampling kernel takes, and clusters.
LIMIT = 131_072


class Drawn(NamedTuple):
    """Tokens, and what their probabilities follow from.

    Attributes:
        tokens (mx.array): uint32 ``[B]``.
        retrieved (Retrieved): What was scored.
        edits (tuple, optional): Ids ``[n]`` and logits ``[1, n]`` that logits
          processors have changed.
    """

    tokens: mx.array
    retrieved: Retrieved
    edits: tuple[mx.array, mx.array] | None = None


class Pool(NamedTuple):
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
    if not processors:
        tokens, *scored = run(head, _draw, (settings,), h, key)
        return Drawn(tokens, Retrieved(*scored))
    retrieved, pool = _retrieve(head, settings, h, key)
    ids, logits = processing.apply(head, processors, context, h)
    pool = _replace(head, retrieved.probes, pool, ids, logits)
    n_tail = 0 if pool.rest is None else head.cluster_size
    candidates = head.token_ids[retrieved.probes[0]].reshape(-1)
    split = candidates.size - n_tail
    candidates = mx.concatenate([candidates[:split], ids, candidates[split:]])
    at = _choose(settings, pool, key, candidates[None])
    return Drawn(candidates[at], retrieved, (ids, logits))


def logprobs(head: FlashHead, drawn: Drawn) -> mx.array:
    """Log-probabilities of the whole vocabulary, float32 ``[B, V]``: exact where
    scored, estimated elsewhere. Lazy: whoever does not look at them pays nothing."""
    logits = run(head, _expand, (), *drawn.retrieved)
    if drawn.edits is not None:
        ids, edited = drawn.edits
        again = processing.repeated(ids)  # the first of them counts
        edited = mx.where(again, edited[:, :1], edited)
        ids = mx.where(again, ids[0], ids)
        logits = mx.put_along_axis(logits, ids[None], edited, axis=1)
    return logits - mx.logsumexp(logits, axis=-1, keepdims=True)


def full_logits(head: FlashHead, h: mx.array) -> mx.array:
    """The model's logits, float32 ``[B, V]``, for hidden states ``[B, D]``, by
    retrieval."""
    return run(head, _full_logits, (), h)


def _full_logits(head: FlashHead, h: mx.array) -> mx.array:
    return _expand(head, *head.retrieve(h))


def _expand(head: FlashHead, *retrieved: mx.array) -> mx.array:
    return known_transform(head)(masses.expand(head, Retrieved(*retrieved)))


def known_transform(head: FlashHead) -> Transform:
    """What the model does to its logits; :func:`fits` has seen that it is known."""
    assert head.transform is not None
    return head.transform


def _draw(
    head: FlashHead, settings: Settings, h: mx.array, key: mx.array
) -> tuple[mx.array, ...]:
    """:func:`draw` without processors, of arrays alone."""
    if settings.greedy:
        return _draw_greedy(head, h)
    retrieved, pool = _retrieve(head, settings, h, key)
    ids = None
    if settings.xtc_special_tokens:
        ids = head.token_ids[retrieved.probes].reshape(len(h), -1)
    at = _choose(settings, pool, key, ids)
    tokens = kernels.to_tokens(at, retrieved.probes, head.token_ids)
    return tokens, *retrieved


def _draw_greedy(head: FlashHead, h: mx.array) -> tuple[mx.array, ...]:
    """The token with the largest logit among the probed, from the maximum of each
    cluster where the kernel gives it."""
    centroid_logits = head.centroid_logits(h)
    probes = head.select(centroid_logits)
    names = {"probes": probes, "token_ids": head.token_ids}
    if not head.rows.has_kernel(h.dtype) or "bias" in head:
        logits = head.score(h, probes).reshape(len(h), -1)
        tokens = kernels.greedy(logits, **names)
        return tokens, centroid_logits, probes, logits
    blocks = head.probe(kernels.probe_logits_stats, h, probes)
    tokens = kernels.greedy(blocks.block_max, indices=blocks.block_argmax, **names)
    return tokens, centroid_logits, probes, blocks.logits


def _retrieve(
    head: FlashHead, settings: Settings, h: mx.array, key: mx.array
) -> tuple[Retrieved, Pool]:
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
            every = masses.log_masses(head, centroid_logits, temperature)
            return mx.put_along_axis(every, probed, mx.array(-mx.inf), axis=-1)

        at_one = heated = mx.full((len(h),), -mx.inf)
        if counts:
            at_one = mx.logsumexp(unprobed(1.0), axis=-1)
        if has_tail:
            rest = unprobed(settings.temp)
            heated = mx.logsumexp(rest, axis=-1)
            cluster = kernels.sample(rest, _subkey(key, 1), temperature=1.0)
            probes = mx.concatenate([probes, cluster[:, None]], axis=-1)
        tail = mx.stack([heated, at_one], axis=-1)
    exact = head.score(h, probes).reshape(len(h), -1)
    # A cap would make padding finite.
    logits = mx.where(exact > -mx.inf, known_transform(head)(exact), -mx.inf)
    n = head.n_probes * head.cluster_size
    of_tail = logits[:, n:] if has_tail else None
    return Retrieved(centroid_logits, probes, exact), Pool(logits[:, :n], of_tail, tail)


def _choose(
    settings: Settings, pool: Pool, key: mx.array, ids: mx.array | None
) -> mx.array:
    """Draw from a pool: indices ``[B]`` into its logits and, after them, its rest.
    ``ids`` are the tokens of all, needed for XTC's special tokens."""
    logits, rest, tail = pool
    if settings.greedy:
        return kernels.greedy(logits)
    xtc: dict[str, Any] = {}
    if settings.xtc_probability > 0:
        xtc["xtc_probability"] = settings.xtc_probability
        xtc["xtc_threshold"] = settings.xtc_threshold
        if ids is not None:
            xtc["xtc_exempt"] = settings.xtc_exempt(ids[:, : logits.shape[1]])
    at = kernels.sample(
        logits,
        _subkey(key, 2),
        temperature=settings.temp,
        top_p=settings.nucleus,
        min_p=settings.min_p,
        min_tokens_to_keep=settings.min_tokens_to_keep,
        top_k=settings.top_k,
        tail=tail,
        **xtc,
    )
    if rest is None:
        return at
    inside = kernels.sample(rest, _subkey(key, 3), temperature=settings.temp)
    return mx.where(at < logits.shape[1], at, logits.shape[1] + inside)


def _subkey(key: mx.array, i: int) -> mx.array:
    """Keys of Threefry that differ anyhow give independent numbers."""
    return key ^ mx.array([0, i << 28], dtype=mx.uint32)


def _replace(
    head: FlashHead, probes: mx.array, pool: Pool, ids: mx.array, logits: mx.array
) -> Pool:
    """The pool with ``logits [1, n]`` of ``ids [n]`` as candidates of their own,
    instead of where they stood."""
    m = head.cluster_size
    cluster, slot = mx.divmod(head.positions[ids], m)
    match = probes[0][None] == cluster[:, None]
    at = mx.argmax(match, axis=-1) * m + slot
    n = probes.shape[1] * m
    at = mx.where(match.any(axis=-1), at, n)
    parts = [pool.logits] + ([] if pool.rest is None else [pool.rest])
    before = mx.concatenate([*parts, mx.zeros((1, 1))], axis=1)
    before = mx.put_along_axis(before, at[None], mx.array(-mx.inf), axis=1)
    k = pool.logits.shape[1]
    candidates = mx.concatenate([before[:, :k], logits], axis=1)
    if pool.rest is None or pool.tail is None:
        return Pool(candidates, None, pool.tail)
    rest = before[:, k:n]
    # Where nothing is left of the tail cluster, nothing is drawn there.
    tail = mx.where(rest.max(axis=-1, keepdims=True) > -mx.inf, pool.tail, -mx.inf)
    return Pool(candidates, rest, tail)
