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
        logprob (mx.array): Log-probability of each, float32 ``[B]``, as in
          :func:`logprobs`, which computes those of all tokens; but with ``edits``, the
          logits that they did not change are rounded as the model's are.
        retrieved (Retrieved): What was scored.
        states (mx.array): The hidden states ``[B, D]``.
        edits (tuple, optional): What logits processors have changed.
        whole (mx.array, optional): What :func:`logprobs` gives, where the draw was
          asked for it.
    """

    tokens: mx.array
    logprob: mx.array
    retrieved: Retrieved
    states: mx.array
    edits: Edits | None = None
    whole: mx.array | None = None


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
    whole: bool = False,
) -> Drawn:
    """One token for each hidden state.

    Args:
        head: The head; :func:`fits` holds.
        settings: How to draw.
        h: Hidden states ``[B, D]``.
        key: Random key, uint32 ``[2]``, or one for each hidden state, ``[B, 2]``.
        processors: Logits processors, for one hidden state.
        context: The tokens so far ``[n]``, for the processors.
        whole: Whether :func:`logprobs` will be asked for, which then costs no graph of
            its own; it stays lazy.
    """
    if processors:
        edits = processing.apply(head, processors, context, h)
        weights = _weights(head, settings)
        tokens, logprob, *scored = _draw(head, settings, h, key, *weights, edits)
        return Drawn(tokens, logprob, Retrieved(*scored), h, edits)
    step = _step_and_whole if whole else _step
    tokens, logprob, *found = run(head, step, (settings,), h, key)
    return Drawn(tokens, logprob, Retrieved(*found[:3]), h, None, *found[3:])


def _step(
    head: FlashHead, settings: Settings, h: mx.array, key: mx.array
) -> tuple[mx.array, ...]:
    """Tokens, their log-probabilities, and what is :class:`Retrieved`."""
    return _draw(head, settings, h, key, *_weights(head, settings))


def _step_and_whole(
    head: FlashHead, settings: Settings, h: mx.array, key: mx.array
) -> tuple[mx.array, ...]:
    """The same, and all log-probabilities."""
    tokens, logprob, *scored = _step(head, settings, h, key)
    whole = _log_softmax(_logits(head, h, tokens, *scored))
    return tokens, logprob, *scored, whole


def _weights(head: FlashHead, settings: Settings) -> tuple[mx.array, mx.array]:
    """:func:`masses.log_weights` at the temperature and at 1."""
    heat = 1.0 if settings.greedy else settings.temp
    return constant(head, masses.log_weights, heat), constant(
        head, masses.log_weights, 1.0
    )


def _draw(
    head: FlashHead,
    settings: Settings,
    h: mx.array,
    key: mx.array,
    heated: mx.array,
    at_one: mx.array,
    edits: Edits | None = None,
) -> tuple[mx.array, ...]:
    """:func:`draw`, of arrays alone; ``heated`` and ``at_one`` are the weights of
    :func:`masses.log_weights` at the temperature and at 1."""
    transform = known_transform(head)
    centroid_logits = head.centroid_logits(h)
    probes = head.select(centroid_logits)
    # As the dense head rounds, whose ties then agree.
    rounding = head.product_dtype(h.dtype)
    shaping = kernels.Shaping(rounding, transform.scale, transform.softcap)
    rows = head.kernel_rows(h)
    of_centroids, score = centroid_logits, partial(head.score, h)
    before = shaping
    if edits is not None:
        of_edited = head.positions[edits[0]] // head.cluster_size
        probes = mx.concatenate([probes, of_edited[None]], axis=1)
        # What the model makes of its logits comes before the processors.
        shaping = kernels.Shaping()
        of_centroids = before.transformed(centroid_logits.astype(mx.float32))
        score = partial(_model_scores, head, before, h)
    asked = kernels.Draw(
        probes,
        head.token_ids,
        shaping,
        kernels.Tail(
            *(of_centroids, heated, at_one, score),
            rows=rows if edits is None or transform.identity else None,
            empty=head.n_probes == head.n_clusters,
        ),
    )
    if not settings.greedy:
        asked = asked._replace(
            law=law_of(settings),
            keys=split(key, len(h)),
        )
    summary = None
    if edits is None and rows is not None:
        exact, summary = kernels.probe_blocks(rows, asked)
    else:
        exact = head.score(h, probes).reshape(len(h), -1)
    logits = exact
    if edits is not None:
        logits = edited(head, probes, before(exact), *edits)
    tokens, logprob = kernels.draft(logits, asked, summary)
    return tokens, logprob, centroid_logits, probes, exact


def split(key: mx.array, n: int) -> mx.array:
    """Keys of n draws, uint32 ``[n, 2]``: of one for all ``[2]``, or these."""
    if key.ndim == 2:
        return key
    return key[None] if n == 1 else mx.random.split(key, n)


def _model_scores(
    head: FlashHead, shaping: kernels.Shaping, h: mx.array, clusters: mx.array
) -> mx.array:
    """:meth:`FlashHead.score`, of the model's logits."""
    return shaping.transformed(head.score(h, clusters))


def law_of(settings: Settings) -> kernels.Law:
    """How tokens are drawn with settings that are not greedy."""
    special = settings.xtc_special_tokens if settings.xtc_probability > 0 else ()
    return kernels.Law(
        settings.temp, rules_of(settings), settings.xtc_probability, special
    )


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
    if drawn.whole is not None:
        return drawn.whole
    logits = run(head, _logits, (), drawn.states, drawn.tokens, *drawn.retrieved)
    if drawn.edits is not None:
        logits = processing.put(logits, *drawn.edits)
    return _log_softmax(logits)


def _log_softmax(logits: mx.array) -> mx.array:
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
