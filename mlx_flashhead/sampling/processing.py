"""Logits processors among candidates: the tokens that they touch, scored exactly."""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx

from ..head import FlashHead
from .settings import Bias, Processor


def apply(
    head: FlashHead,
    processors: Sequence[Processor],
    context: mx.array | None,
    h: mx.array,
) -> tuple[mx.array, mx.array]:
    """The ids ``[n]`` that the processors touch, some perhaps more than once, and the
    logits ``[1, n]`` that they make of them; ``-inf`` for a repetition.

    Args:
        head: The head; what the model does to its logits is known.
        processors: Logits processors, at least one.
        context: The tokens so far ``[n]``; ``None`` for none.
        h: One hidden state ``[1, D]``.
    """
    assert head.transform is not None
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
    logits = head.transform(logits_of(head, h, ids))
    start = 0
    for processor, part in zip(processors, parts):
        tokens = first[start : start + part.size]
        start += part.size
        if isinstance(processor, Bias):
            logits = logits.at[:, tokens].add(processor.values.astype(mx.float32))
        else:
            logits = processor.apply(tokens, logits)
    return ids, mx.where(repeated(ids), -mx.inf, logits)


def put(logits: mx.array, ids: mx.array, edited: mx.array) -> mx.array:
    """Logits ``[1, V]`` with what :func:`apply` made of some, ``edited [1, n]`` where
    ``ids [n]`` stand."""
    again = repeated(ids)  # the first of them counts
    edited = mx.where(again, edited[:, :1], edited)
    ids = mx.where(again, ids[0], ids)
    return mx.put_along_axis(logits, ids[None], edited, axis=1)


def logits_of(head: FlashHead, h: mx.array, ids: mx.array) -> mx.array:
    """The head's exact logits, float32 ``[B, n]``, of tokens ``ids [n]`` for ``h [B,
    D]``."""
    logits = h.astype(mx.float32) @ head.embed(ids, mx.float32).T
    if "bias" in head:
        logits = logits + head.bias.reshape(-1)[head.positions[ids]]
    return logits


def repeated(ids: mx.array) -> mx.array:
    """Which of ``ids [n]`` stood before, bool ``[n]``."""
    first = mx.argmax(ids[:, None] == ids[None], axis=-1)
    return first != mx.arange(ids.size)
