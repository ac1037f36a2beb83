"""What is fastest, of what was measured: pure functions of times."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

from .times import Cell, Times

# Fewer positions that cost no more than this are preferred: text appears sooner, and
# chunks grow to them sooner.
WORTH = 1.03
# What is not faster than dense decoding by this is not worth it: times are not exact,
# and nobody is to be slower.
GAIN = 1.02


class Plan(NamedTuple):
    """How exact decoding goes on.

    Attributes:
        n_probes: Clusters probed for a draft.
        verify_every: Positions that are verified at once; 0 for the dense product of
            one after another.
        seconds: What a token is expected to take.
    """

    n_probes: int
    verify_every: int
    seconds: float

    @property
    def dense(self) -> bool:
        """Whether nothing is drafted."""
        return self.verify_every == 0


def kept(acceptance: float, k: int) -> float:
    """Tokens that stand of k steps of the body, if misses fall independently: the
    first draft of another choice is put right, and what follows it is thrown away."""
    return sum(acceptance**i for i in range(k))


def cost(times: Times, n_probes: int, k: int, acceptance: float) -> float:
    """Seconds of a token that stands, where k positions are verified at once."""
    chunk = (k - 1) * times[Cell("draft", n_probes)] + times[Cell("verify", k)]
    return chunk / kept(acceptance, k)


def cheapest(
    times: Times, acceptance: Callable[[int], float], dense: bool = True
) -> Plan:
    """The fastest way of exact decoding that was measured.

    Args:
        times: At least one draft and one verification are in it.
        acceptance: Share of the drafts that are expected to stand, by the number of
            probes.
        dense: Whether decoding may be dense, too.
    """
    probes = sorted(cell.n for cell in times if cell.what == "draft")
    sizes = sorted(cell.n for cell in times if cell.what == "verify")
    plans = [
        Plan(p, k, cost(times, p, k, acceptance(p))) for k in sizes for p in probes
    ]
    least = min(plan.seconds for plan in plans)
    best = next(plan for plan in plans if plan.seconds <= WORTH * least)
    alone = times.get(Cell("dense", 1), math.inf) if dense else math.inf
    return best if GAIN * best.seconds < alone else Plan(best.n_probes, 0, alone)


def stock_wins(times: Times) -> bool:
    """Whether mlx-lm's own step is as fast as any that drafts, if all drafts stand."""
    drafting = cheapest(times, lambda p: 1.0, dense=False)
    return times.get(Cell("stock", 1), math.inf) <= GAIN * drafting.seconds


def dense_wins(times: Times, n: int) -> bool | None:
    """Whether a step of a batch of n sequences is as fast with mlx-lm's dense head as
    among candidates; ``None`` where that was not measured. Between two sizes that were,
    times are taken to be linear."""
    below = _both(times, max((s for s in _sizes(times) if s <= n), default=0))
    above = _both(times, min((s for s in _sizes(times) if s >= n), default=0))
    if below is None or above is None:
        return None
    (low, low_gain), (high, high_gain) = below, above
    share = (n - low) / (high - low) if high > low else 0.0
    return low_gain + share * (high_gain - low_gain) <= 0


def _sizes(times: Times) -> list[int]:
    both = [cell.n for cell in times if cell.what == "stock"]
    return [n for n in both if Cell("approximate", n) in times]


def _both(times: Times, n: int) -> tuple[int, float] | None:
    """A batch's size and the seconds that candidates save, beyond ``GAIN``."""
    if n == 0:
        return None
    return n, times[Cell("stock", n)] - GAIN * times[Cell("approximate", n)]
