"""What sampling keeps: mlx-lm's filters, with the tail.

This is the one definition of top-p, min-p, XTC and top-k in this package: the kernel
``draft_sampled`` computes the same integers, and the tests check it against float64. As
in mlx-lm the filters look at the distribution at temperature 1 and apply in this order.
The tail stands for everything that is not among the candidates: its mass counts in the
totals of top-p and XTC, it ranks last in top-p, and min-p and top-k, which keep the
likeliest tokens, drop it.
"""

import math
from dataclasses import dataclass

import mlx.core as mx

from .fixed_point import (
    FRACTION,
    LOG2E,
    TAIL_BITS,
    exp2_negative,
    levels_below,
    tail_levels,
)

# Top-p and top-k compare distances at this resolution, and keep whole sets of ties
# (logits within about 1e-5).
COARSE = 10
_NO_LIMIT = 0xFFFFFFFF


@dataclass(frozen=True)
class Rules:
    """Settings of the filters."""

    top_p: float = 1.0
    min_p: float = 0.0
    min_tokens_to_keep: int = 1
    top_k: int = 0
    xtc_threshold: float = 0.1

    @property
    def limit(self) -> int:
        """The largest distance from the top that min-p keeps."""
        if self.min_p == 0:
            return _NO_LIMIT
        return min(int(-math.log2(self.min_p) * 2**FRACTION), _NO_LIMIT - 1)

    @property
    def share(self) -> int:
        """The mass that top-p keeps, in units of 2^-31 of the total."""
        return max(1, int(min(self.top_p, 1.0) * 2**31))


def filtered(
    logits: mx.array,
    rules: Rules,
    rest: mx.array,
    coin: mx.array | None = None,
    exempt: mx.array | None = None,
) -> tuple[mx.array, mx.array]:
    """Logits of candidates, ``-inf`` for what is dropped, and whether the tail is left.

    Args:
        logits: float32 ``[B, K]``.
        rules, coin, exempt: As for :func:`keep`.
        rest: Log-mass of the tail at temperature 1, float32 ``[B]``.

    Returns:
        float32 ``[B, K]`` and bool ``[B]``.
    """
    top = logits.max(axis=-1, keepdims=True)
    distance = levels_below(top, logits, LOG2E)
    kept, tail = keep(distance, rules, top[:, 0] - rest, coin, exempt)
    return mx.where(kept, logits, -mx.inf), tail


def keep(
    distance: mx.array,
    rules: Rules,
    behind: mx.array | None = None,
    coin: mx.array | None = None,
    exempt: mx.array | None = None,
) -> tuple[mx.array, mx.array]:
    """Which candidates, and whether the tail, are left to draw from.

    Args:
        distance: How far below the best each candidate is, in powers of two with 26
          fractional bits, uint32 ``[B, K]``.
        rules: The settings.
        behind: By how many nats the tail's log-mass at temperature 1 is behind the best
          logit, float32 ``[B]``; ``None`` where there is no tail.
        coin: Rows in which XTC drops, bool ``[B]``; ``None`` for none.
        exempt: Candidates that XTC never drops, bool ``[B, K]``.

    Returns:
        bool ``[B, K]`` and ``[B]``.
    """
    B, K = distance.shape
    kept = mx.ones((B, K), dtype=mx.bool_)
    tail = mx.full((B,), behind is not None)
    mass = exp2_negative(distance, 0)
    tail_mass = mx.zeros((B,), dtype=mx.uint64)
    if behind is not None:
        tail_mass = exp2_negative(tail_levels(behind), TAIL_BITS)
    order = mx.argsort(distance, axis=-1)

    def shares() -> mx.array:
        """Of the mass that is left, in units of 2^-31."""
        left = mx.where(kept, mass, 0)
        total = left.sum(axis=-1) + mx.where(tail, tail_mass, 0)
        inverse = (mx.array(1, dtype=mx.uint64) << 63) // total
        return left * inverse[:, None] >> 32

    def until(counts: mx.array, target: int) -> tuple[mx.array, mx.array]:
        """What stands before the best candidates' counts have reached the target, ties
        included, and whether all together do."""
        counts = mx.take_along_axis(counts, order, axis=-1)
        before = mx.cumsum(counts, axis=-1) - counts
        last = (before < target).sum(axis=-1, keepdims=True) - 1
        edge = mx.take_along_axis(distance, mx.take_along_axis(order, last, -1), -1)
        return distance >> COARSE <= edge >> COARSE, counts.sum(axis=-1) >= target

    if rules.top_p < 1:
        nucleus, reached = until(shares(), rules.share)
        kept, tail = kept & nucleus, tail & ~reached
    if rules.min_p > 0:
        likely = distance <= rules.limit
        if rules.min_tokens_to_keep > 1:
            at = order[:, min(rules.min_tokens_to_keep, K) - 1 :][:, :1]
            likely = likely | (distance <= mx.take_along_axis(distance, at, axis=-1))
        kept, tail = kept & likely, mx.zeros_like(tail)
    if coin is not None:
        share = shares()
        above = share > int(rules.xtc_threshold * 2**31)
        lowest = mx.where(above, share, 1 << 40).min(axis=-1, keepdims=True)
        drop = (share > lowest) & coin[:, None]
        kept = kept & ~(drop if exempt is None else drop & ~exempt)
    if 0 < rules.top_k < K:
        best, _ = until(kept.astype(mx.uint64), rules.top_k)
        kept, tail = kept & best, mx.zeros_like(tail)
    return kept, tail
