"""How a token is drawn, and what is known of clusters that are not probed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import mlx.core as mx

from . import backend, filters
from .rows import Rows
from .shaping import Shaping

# Clusters that are not probed are looked at so many at a time.
STRETCH = 128


class Tail(NamedTuple):
    """What is known of clusters that are not probed.

    Attributes:
        centroid_logits: Logit of each centroid, ``[B, C]``, floating.
        heated: What turns such a logit, the model's, over the temperature into the
            cluster's log-mass there, float32 ``[C]``; for the greedy choice anything.
        at_one: The same at temperature 1, for filters and log-probabilities.
        score: Exact logits ``[B, 1, m]`` of the rows of clusters ``[B, 1]``.
        rows: The table that these come from; ``None`` where a kernel cannot read it.
        empty: Whether there are none.
    """

    centroid_logits: mx.array
    heated: mx.array
    at_one: mx.array
    score: Callable[[mx.array], mx.array]
    rows: Rows | None
    empty: bool = False


@dataclass(frozen=True)
class Law:
    """How a draft is drawn.

    Attributes:
        temperature: Above 0.
        rules: The filters; ``None`` for none.
        xtc_probability: How often XTC drops the likeliest.
        special: Ids that it never drops.
    """

    temperature: float = 1.0
    rules: filters.Rules | None = None
    xtc_probability: float = 0.0
    special: tuple[int, ...] = ()

    @property
    def drops_tail(self) -> bool:
        """Whether only probed tokens can come."""
        return self.rules is not None and (self.rules.top_k > 0 or self.rules.min_p > 0)


class Draw(NamedTuple):
    """What is asked of clusters: how a token will be drawn, and of what.

    Attributes:
        probes: Probed clusters, uint32 ``[B, p]``. One may stand there again, its
            logits then ``-inf``.
        token_ids: Token of each row, uint32 ``[C, m]``.
        shaping: What the model makes of logits.
        tail: What is known of clusters that are not probed.
        law: How to draw; ``None`` for the best.
        keys: Key of each row's noise, uint32 ``[B, 2]``; ``None`` for the best.
    """

    probes: mx.array
    token_ids: mx.array
    shaping: Shaping
    tail: Tail
    law: Law | None = None
    keys: mx.array | None = None

    @property
    def options(self) -> dict[str, bool]:
        """What of it is known when a kernel is compiled."""
        law = self.law
        rules = (law.rules if law is not None else None) or filters.Rules()
        return {
            "DRAWN": law is not None,
            "EMPTY": self.tail.empty,
            "TAIL": not (law is None or law.drops_tail or self.tail.empty),
            "TOTALS": law is not None and rules.top_p < 1,
        }

    @property
    def n_stretches(self) -> int:
        """Stretches of clusters that are not all probed."""
        return 0 if self.tail.empty else -(-len(self.token_ids) // STRETCH)

    def __str__(self) -> str:
        """What the code depends on, in words."""
        names = [n.lower() for n, on in self.options.items() if on]
        dtype = backend.short(self.tail.centroid_logits.dtype)
        return ", ".join([str(self.shaping), f"centroids {dtype}", *names])


class Draft(NamedTuple):
    """Tokens, uint32 ``[B]``, and their log-probabilities, float32 ``[B]``: normalized
    over the whole vocabulary at temperature 1 before any filter, as mlx-lm's are, with
    exact logits that are not rounded wherever some were scored."""

    tokens: mx.array
    logprobs: mx.array
