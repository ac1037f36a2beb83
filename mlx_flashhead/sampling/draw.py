"""Draw tokens among what FlashHead retrieves, the whole vocabulary counted.

Probed tokens have exact logits, and the other clusters estimated masses (arXiv
2603.14591, section on sampling, draws clusters by their centroids' softmax instead). A
cluster is drawn by its mass, then a token among its rows, which are scored exactly
wherever the draw falls. So a token t of an unprobed cluster c has the probability

    mass(c) / (probed mass + mass of all others) * softmax(logits of c / T)[t]

and every token of the vocabulary can come, without waiting for the device. The noise of
a draw is Gumbel's, of clusters and of rows, by its key alone: what verifies a draft
(:mod:`mlx_flashhead.sampling.coupled`) draws with the same. What the filters keep of
candidates and of the rest is defined in :mod:`mlx_flashhead.kernels.filters`.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import mlx.core as mx

from .. import kernels
from ..head import FlashHead, Retrieved, Transform, masses
from ..kernels import filters
from . import processing
from .settings import Processor, Settings
from .steps import constant, run

# Candidates that the kernel of a draw takes, and clusters.
LIMIT = 131_072

# Ids ``[n]`` and logits ``[1, n]`` that logits processors have changed.
Edits = tuple[mx.array, mx.array]


class Drawn(NamedTuple):
    """Tokens, and what their probabilities follow from.

    Attributes:
        tokens (mx.array): uint32 ``[B]``.
        retrieved (Retrieved): What was scored.
        states (mx.array): The hidden states ``[B, D]``.
        edits (tuple, optional): What logits processors have changed.
    """

    tokens: mx.array
    retrieved: Retrieved
    states: mx.array
    edits: Edits | None = None


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
    weights: list[mx.array] = []
    if not settings.greedy:
        for temperature in (settings.temp, 1.0):
            weights.append(constant(head, masses.log_weights, temperature))
    if not processors:
        tokens, *scored = run(head, _draw, (settings,), h, key, *weights)
        return Drawn(tokens, Retrieved(*scored), h)
    edits = processing.apply(head, processors, context, h)
    tokens, *scored = _draw(head, settings, h, key, *weights, edits=edits)
    return Drawn(tokens, Retrieved(*scored), h, edits)


def _draw(
    head: FlashHead,
    settings: Settings,
    h: mx.array,
    key: mx.array,
    *weights: mx.array,
    edits: Edits | None = None,
) -> tuple[mx.array, ...]:
    """:func:`draw`, of arrays alone; ``weights`` are those of
    :func:`masses.log_weights` at the temperature and at 1."""
    transform = known_transform(head)
    centroid_logits = head.centroid_logits(h)
    probes = head.select(centroid_logits)
    if edits is not None:
        of_edited = head.positions[edits[0]] // head.cluster_size
        probes = mx.concatenate([probes, of_edited[None]], axis=1)
    exact = head.score(h, probes).reshape(len(h), -1)
    # As the dense head rounds, whose ties then agree.
    rounding = head.product_dtype(h.dtype)
    shaping = kernels.Shaping(rounding, transform.scale, transform.softcap)
    logits, rows = exact, head.kernel_rows(h)

    of_centroids, score = centroid_logits, partial(head.score, h)
    if edits is not None:
        # What the model makes of its logits comes before the processors.
        before, shaping = shaping, kernels.Shaping()
        logits = edited(head, probes, before(exact), *edits)
        of_centroids = before.transformed(centroid_logits.astype(mx.float32))
        score = partial(_model_scores, head, before, h)
        rows = rows if transform.identity else None
    if settings.greedy:
        tokens = kernels.draft_greedy(logits, probes, head.token_ids, shaping)
        return tokens, centroid_logits, probes, exact
    heated, at_one = weights
    all_probed = head.n_probes == head.n_clusters
    tail = kernels.Tail(of_centroids, heated, at_one, score, rows, all_probed)
    law = kernels.Law(settings.temp, rules_of(settings), settings.xtc_probability)
    exempt = None
    if settings.xtc_special_tokens:
        exempt = settings.xtc_exempt(head.token_ids[probes].reshape(exact.shape))
    keys = key[None] if len(h) == 1 else mx.random.split(key, len(h))
    tokens = kernels.draft_sampled(
        logits, probes, head.token_ids, shaping, keys, law, tail, exempt
    )
    return tokens, centroid_logits, probes, exact


def _model_scores(
    head: FlashHead, shaping: kernels.Shaping, h: mx.array, clusters: mx.array
) -> mx.array:
    """:meth:`FlashHead.score`, of the model's logits."""
    return shaping.transformed(head.score(h, clusters))


def rules_of(settings: Settings) -> filters.Rules | None:
    """The filters' settings; ``None`` where nothing is filtered."""
    if not settings.cuts and settings.xtc_probability == 0:
        return None
    return filters.Rules(
        settings.nucleus,
        settings.min_p,
        settings.min_tokens_to_keep,
        settings.top_k,
        settings.xtc_threshold,
    )


def edited(
    head: FlashHead,
    probes: mx.array,
    logits: mx.array,
    ids: mx.array,
    values: mx.array,
) -> mx.array:
    """Logits ``[1, q * m]`` of the clusters ``probes [1, q]`` with ``values [1, n]``
    where ``ids [n]`` stand, whose clusters are the last n. What stands twice counts
    where it stands first."""
    m, (q, n) = head.cluster_size, (probes.shape[1], ids.size)
    cluster, slot = mx.divmod(head.positions[ids], m)
    first = mx.argmax(cluster[:, None] == probes, axis=-1)
    stays = mx.concatenate(
        [mx.ones(q - n, mx.bool_), first == mx.arange(q - n, q)], axis=0
    )
    rows = mx.where(stays[:, None], logits.reshape(q, m), -mx.inf)
    # Repetitions go to a place that is cut off.
    at = mx.where(processing.repeated(ids), q * m, first * m + slot)
    flat = mx.concatenate([rows.reshape(-1), mx.zeros(1)])
    return mx.put_along_axis(flat, at, values[0], axis=0)[None, : q * m]


def logprobs(head: FlashHead, drawn: Drawn) -> mx.array:
    """Log-probabilities of the whole vocabulary, float32 ``[B, V]``: exact where
    scored and in the cluster of the token that was drawn, estimated elsewhere. Lazy:
    whoever does not look at them pays nothing."""
    logits = run(head, _logits, (), drawn.states, drawn.tokens, *drawn.retrieved)
    if drawn.edits is not None:
        ids, edited = drawn.edits
        again = processing.repeated(ids)  # the first of them counts
        edited = mx.where(again, edited[:, :1], edited)
        ids = mx.where(again, ids[0], ids)
        logits = mx.put_along_axis(logits, ids[None], edited, axis=1)
    return logits - mx.logsumexp(logits, axis=-1, keepdims=True)


def _logits(
    head: FlashHead,
    h: mx.array,
    tokens: mx.array,
    centroid_logits: mx.array,
    probes: mx.array,
    exact: mx.array,
) -> mx.array:
    """Logits ``[B, V]`` of what was retrieved, and of the tokens' clusters."""
    cluster = (head.positions[tokens] // head.cluster_size)[:, None]
    return _expand(
        head,
        centroid_logits,
        mx.concatenate([probes, cluster], axis=1),
        mx.concatenate([exact, head.score(h, cluster)[:, 0]], axis=1),
    )


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
