"""Decoding timed a few tokens of each way in turn.

A host's speed drifts, on some machines by a factor of two within a minute. What takes
turns drifts together, so ratios of one round say what whole runs one after another
cannot.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TypeVar

import mlx.core as mx
from mlx_lm.generate import generation_stream

# Tokens of one way of decoding before the next one's turn.
TURN = 32

Way = TypeVar("Way")


def in_turn(
    streams: Mapping[Way, Iterator[object]],
    prepare: Callable[[Way], None],
    rounds: int,
    turn: int = TURN,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[Way, list[float]]:
    """Seconds of a step by each way of decoding, round by round.

    Args:
        streams: Makes a token, or one of each sequence, at every turn; at least
            ``turn * (rounds + 1)``, of which the first ``turn`` do not count.
        prepare: Is called with a way before each of its turns.
        rounds: Turns of each that count.
        turn: Steps of a turn; several times as many as are verified at once.
        clock: Gives the time, in seconds.
    """
    found: dict[Way, list[float]] = {way: [] for way in streams}
    ways = list(streams)
    for i in range(rounds + 1):
        first = i % len(ways)
        for way in ways[first:] + ways[:first]:
            prepare(way)
            begin = clock()
            for _ in range(turn):
                next(streams[way])
            # The step that was begun beyond the last token.
            mx.synchronize(generation_stream)
            if i:
                found[way].append((clock() - begin) / turn)
    return found


def quartiles(found: Iterable[float]) -> list[float]:
    """The first, the median and the third."""
    ordered = sorted(found)
    return [ordered[len(ordered) * i // 4] for i in (1, 2, 3)]


def mean(seconds: list[float]) -> float:
    """Of all rounds: a way that verifies several tokens at once works for some turns
    ahead, so that a median would count whole verifications, more or fewer."""
    return sum(seconds) / len(seconds)


def ratio(seconds: list[float], others: list[float]) -> str:
    """The first over the second, of all rounds, and the quartiles of the rounds."""
    pairs = zip(seconds, others, strict=True)
    low, _, high = quartiles(a / b for a, b in pairs)
    return f"{mean(seconds) / mean(others):.2f} ({low:.2f} to {high:.2f})"
