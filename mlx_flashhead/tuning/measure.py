"""Timing of several ways of one step, in turn, within a budget."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import TypeVar

Clock = Callable[[], float]
# Takes n steps and waits for the last of them.
Run = Callable[[int], None]
Name = TypeVar("Name")

# What is timed at once takes about so many seconds, and at most so many steps.
_SPELL = 0.02
_MOST_STEPS = 16


def in_turn(
    runs: Mapping[Name, Run],
    seconds: float,
    *,
    rounds: int = 5,
    compiles: bool = False,
    clock: Clock = time.perf_counter,
) -> dict[Name, float]:
    """Seconds of a step of each, the best of some rounds in which all take turns.

    Nothing is begun that is expected to end after the budget; what was never timed is
    expected to take as long as the longest that was. So a slow machine gets to the
    first few, and exceeds the budget by what these were underestimated.

    Args:
        runs: What is timed, the most important first.
        seconds: The budget.
        rounds: Times that each is timed, at most.
        compiles: Whether the first two steps of each compile something, and do not
            count.
        clock: Gives the time, in seconds.
    """
    begin = clock()
    found: dict[Name, float] = {}
    seen: set[Name] = set()
    for _ in range(rounds + compiles):
        for name, run in runs.items():
            each = found.get(name)
            warms = compiles and name not in seen
            n = 1 + warms if each is None else _n_steps(each)
            expected = n * each if each is not None else max(found.values(), default=0)
            left = seconds - (clock() - begin)
            if expected > left or left <= 0:
                if each is None:
                    break  # in order: what comes later counts less
                continue
            start = clock()
            run(n)
            took = (clock() - start) / n
            if not warms:
                found[name] = took if each is None else min(each, took)
            seen.add(name)
    return found


def _n_steps(each: float) -> int:
    return max(1, min(_MOST_STEPS, int(_SPELL / max(each, 1e-9))))
