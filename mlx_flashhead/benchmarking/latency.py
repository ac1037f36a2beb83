"""Latency of the head alone, and what the device's memory gives.

Steps depend on each other (each adds a multiple of the token it chose to the next
hidden state) and are evaluated together, so launches count and host round trips do
not. On a GPU every step, dense or not, goes through ``mx.compile``, as the head's own
does: building the graph anew would cost several times what the kernels do.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import TypedDict

import mlx.core as mx

from ..compute.device import on_gpu

# Longest chain. Each of its steps has a random key of its own.
MAX_STEPS = 256

Step = Callable[[mx.array, mx.array], mx.array]


def chained(
    step: Step, start: mx.array, steps: int, compiled: bool | None = None
) -> Callable[..., float]:
    """A chain of dependent steps, its first warm; each call runs it.

    Args:
        step: Maps hidden states ``[B, D]`` and a random key to tokens ``[B]``.
        start: The first hidden states ``[B, D]``.
        steps: Length of the chain, at most ``MAX_STEPS``.
        compiled: Whether a step goes through ``mx.compile``. Default: on a GPU.

    Returns:
        A function that gives seconds per step, of the whole chain or, given a number,
        of so many steps of it.
    """
    state = mx.random.state

    def advance(h: mx.array, key: mx.array) -> mx.array:
        token = step(h, key)
        return start + (token[:, None] % 7).astype(start.dtype) * 1e-3

    if on_gpu() if compiled is None else compiled:
        advance = mx.compile(advance, inputs=state, outputs=state)
    keys = list(mx.random.split(mx.random.key(0), MAX_STEPS))[:steps]
    # Not start itself, which the compiled function holds.
    first = start + 0
    mx.eval(first, keys)

    def run(n: int = steps) -> float:
        h = first
        mx.synchronize()
        begin = time.perf_counter()
        for key in keys[:n]:
            h = advance(h, key)
        mx.eval(h)
        return (time.perf_counter() - begin) / n

    run(1)
    return run


def chain(
    step: Step,
    start: mx.array,
    steps: int,
    repeats: int = 12,
    compiled: bool | None = None,
) -> float:
    """Microseconds per step of :func:`chained`, the best of ``repeats``."""
    run = chained(step, start, steps, compiled)
    run()
    return 1e6 * min(run() for _ in range(repeats))


def dense_sample(
    logits: mx.array, key: mx.array, top_p: float, temperature: float
) -> mx.array:
    """mlx-lm's top-p over the whole vocabulary, then a draw with a key of its own:
    tokens ``[B]`` for logits ``[B, V]``."""
    logprobs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    ordered = mx.sort(logprobs, axis=-1)
    probs = mx.exp(ordered.astype(mx.float32))
    above = mx.cumsum(probs, axis=-1, reverse=True, inclusive=False)
    dropped = (above >= top_p).sum(axis=-1, keepdims=True)
    edge = mx.take_along_axis(ordered, dropped, axis=-1)
    kept = mx.where(logprobs < edge, -mx.inf, logprobs)
    return mx.random.categorical(kept * (1 / temperature), key=key)


def copy_bandwidth(n_bytes: int | None = None) -> float:
    """Bytes per second, read and written, of a large copy on the default device.

    Args:
        n_bytes: Size of what is copied. Default: 1 GiB on a GPU, a quarter on a CPU.
    """
    n_bytes = n_bytes or (1 << 30 if on_gpu() else 1 << 28)
    a = mx.zeros((n_bytes // 4,), dtype=mx.uint32)
    mx.eval(a)
    best = float("inf")
    for i in range(6):
        begin = time.perf_counter()
        mx.eval(a + (i + 1))
        best = min(best, time.perf_counter() - begin)
    return 2 * a.nbytes / best


class Spread(TypedDict):
    """Median, least and greatest of some measurements, in their unit."""

    median: float
    min: float
    max: float


def spread(values: Iterable[float]) -> Spread:
    """The :class:`Spread` of at least one measurement."""
    ordered = sorted(values)
    middle = len(ordered) // 2
    median = (ordered[middle] + ordered[~middle]) / 2
    return {"median": median, "min": ordered[0], "max": ordered[-1]}
