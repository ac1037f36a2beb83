"""One measured run of mlx-lm's decoding: ``generate_step``, or a batch's generator."""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.tokenizer_utils import TokenizerWrapper

from ..integration.exact import Verification, verification
from .competitors import Sampler

# Not "from mlx_lm import generate": that name is a function's.
_generate = importlib.import_module("mlx_lm.generate")

TEXT = (
    "The history of the steam engine begins long before the railway. In 1712 Thomas "
    "Newcomen set up an engine that pumped water out of a coal mine near Dudley; it "
    "burned so much that it could only stand beside the coal it helped to dig. Half a "
    "century later James Watt, who repaired a model of it at the University of "
    "Glasgow, saw that most of the heat was lost in warming the cylinder again at "
    "every stroke, and let the steam condense in a vessel of its own. What follows is "
    "an account of the people, the workshops and the patents that came after.\n\n"
)


@dataclass(frozen=True)
class Run:
    """What one run took.

    Attributes:
        first_token: Seconds from the call to the first token of every sequence.
        step: Mean seconds per decode step after that; it makes a token per sequence.
        peak_bytes: Greatest memory use, with the parameters of this model only.
        begin, end: When the decode steps began and ended, by ``time.perf_counter``.
        verified: What exact decoding did.
    """

    first_token: float
    step: float
    peak_bytes: int
    begin: float
    end: float
    verified: Verification


def prompts(
    tokenizer: TokenizerWrapper, n_tokens: int, batch_size: int
) -> list[list[int]]:
    """English text of ``n_tokens`` tokens for each sequence of a batch. Each starts at
    another place."""
    ids = tokenizer.encode(TEXT)
    start = ids[:1] if ids[0] == getattr(tokenizer, "bos_token_id", None) else []
    ids = ids[len(start) :]
    n = n_tokens - len(start)

    def piece(i: int) -> list[int]:
        shift = i * len(ids) // batch_size
        turned = ids[shift:] + ids[:shift]
        return start + (turned * (n // len(ids) + 1))[:n]

    return [piece(i) for i in range(batch_size)]


def run(
    model: nn.Module,
    prompts: list[list[int]],
    sampler: Sampler,
    max_tokens: int,
    parameter_bytes: int = 0,
    clock: Callable[[], float] = time.perf_counter,
) -> Run:
    """Decode ``max_tokens`` tokens of each sequence, whatever they are.

    Args:
        model: The model.
        prompts: Token ids, of the same length.
        sampler: A sampler of mlx-lm's.
        max_tokens: Tokens per sequence, at least 2.
        parameter_bytes: What the model's parameters take, for the peak: other
            parameters may be in memory, too.
        clock: Gives the time, in seconds.

    Raises:
        RuntimeError: A sequence of a batch made no token.
    """
    mx.synchronize()
    mx.clear_cache()
    mx.reset_peak_memory()
    resident = mx.get_active_memory()
    with _generate.wired_limit(model), verification() as verified:
        begin = clock()
        times = []
        for _ in steps(model, prompts, sampler, max_tokens):
            times.append(clock())
            if len(times) == max_tokens:
                break
        # The step that was begun beyond the last token.
        mx.synchronize(_generate.generation_stream)
    peak = mx.get_peak_memory() - resident + parameter_bytes
    each = (times[-1] - times[0]) / (len(times) - 1)
    return Run(times[0] - begin, each, peak, times[0], times[-1], verified)


def steps(
    model: nn.Module, prompts: list[list[int]], sampler: Sampler, max_tokens: int
) -> Iterator[None]:
    """At each turn a token of every sequence, as in :func:`run`."""
    one = len(prompts) == 1
    return (_single if one else _batch)(model, prompts, sampler, max_tokens)


def _single(
    model: nn.Module, prompts: list[list[int]], sampler: Sampler, max_tokens: int
) -> Iterator[None]:
    """A token of the one sequence at each turn."""
    prompt = mx.array(prompts[0])
    # Looked up when called: the patch replaces it.
    found = _generate.generate_step(
        prompt, model, sampler=sampler, max_tokens=max_tokens
    )
    for _ in found:
        yield


def _batch(
    model: nn.Module, prompts: list[list[int]], sampler: Sampler, max_tokens: int
) -> Iterator[None]:
    """A token of every sequence at each turn."""
    n = len(prompts)
    batch = _generate.BatchGenerator(
        model,
        # More than are asked for: the last step of a sequence hands out its cache.
        max_tokens=max_tokens + 2,
        sampler=sampler,
        prefill_batch_size=n,
        completion_batch_size=n,
    )
    try:
        batch.insert(prompts)
        while responses := batch.next_generated():
            if len(responses) != n:
                raise RuntimeError(f"{len(responses)} of {n} sequences made a token")
            yield
    finally:
        batch.close()
