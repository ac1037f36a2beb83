"""The masses of clusters: what a centroid's logit says of the rows behind it.

A centroid is fitted so that its logit predicts the log of its cluster's mass, the sum
of ``exp(logit / T)`` over its rows. What it lacks on average was measured at several
temperatures when the head was made (``excess``, ``tail_offset``). From it follow the
mass of what is not probed, and a logit for each of its tokens.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import mlx.core as mx

from .transform import Transform

if TYPE_CHECKING:
    from .flash_head import FlashHead, Retrieved


def log_weights(head: FlashHead, temperature: float) -> mx.array:
    """What turns a centroid's logit over the temperature into the log of its cluster's
    expected mass at that temperature, float32 ``[C]``, in nats.

    The correction is linear in ``1 / T`` between the temperatures of the fit and beyond
    them; at infinite T nothing but the number of the cluster's tokens counts.
    """
    inverse = [0.0, *(1 / t for t in head.temperatures)]
    at = 1 / temperature
    high = 1
    while high < len(inverse) - 1 and inverse[high] < at:
        high += 1
    share = (at - inverse[high - 1]) / (inverse[high] - inverse[high - 1])
    weights = share * head.excess[high - 1].astype(mx.float32)
    offset = share * head.tail_offset[high - 1]
    if high > 1:
        weights = weights + (1 - share) * head.excess[high - 2].astype(mx.float32)
        offset += (1 - share) * head.tail_offset[high - 2]
    return weights + offset + head.log_sizes


def log_masses(
    head: FlashHead, centroid_logits: mx.array, temperature: float = 1.0
) -> mx.array:
    """Log of the expected ``sum(exp(logit / T))`` of each cluster, float32 ``[B, C]``,
    the logits being the model's; for ``centroid_logits [B, C]``."""
    centroid_logits = centroid_logits.astype(mx.float32)
    centroid_logits = (head.transform or Transform())(centroid_logits)
    return centroid_logits / temperature + log_weights(head, temperature)


def estimate(head: FlashHead, centroid_logits: mx.array) -> mx.array:
    """Logit that stands for each token of a cluster that is not probed, float32 ``[B,
    C]``: with it the cluster has its expected mass at temperature 1."""
    each = log_masses(head, centroid_logits) - head.log_sizes
    return (head.transform or Transform()).inverse(each)


def expand(head: FlashHead, retrieved: Retrieved) -> mx.array:
    """Logits of the whole vocabulary, float32 ``[B, V]``: exact where scored, estimated
    elsewhere."""
    centroid_logits, probes, exact = retrieved
    # In cluster order first; the positions then leave the padding out.
    estimates = estimate(head, centroid_logits)
    logits = mx.repeat(estimates[..., None], head.cluster_size, -1)
    exact = exact.reshape(*probes.shape, head.cluster_size)
    logits = mx.put_along_axis(logits, probes[..., None], exact, axis=1)
    return logits.reshape(len(probes), -1)[:, head.positions]
