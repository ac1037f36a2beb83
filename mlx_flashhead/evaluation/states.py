"""The hidden states that a model's head sees on text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..integration.locate import watching

# Longest run of tokens that the model reads at once.
WINDOW = 256


class StatesError(ValueError):
    """A model makes hidden states that are no numbers."""


def stream_states(
    model: nn.Module, head_path: str, tokens: Sequence[int]
) -> Iterator[np.ndarray]:
    """What the head is given after each token but the first, window by window, float32
    ``[., D]``, ``n - 1`` rows in all; the first is the same for every text where there
    is a beginning-of-text token.

    Texts longer than WINDOW are read in windows of their own, each after that first
    token, so that a text may be of any length. The logits are never computed: MLX
    evaluates only the states.

    Args:
        model: An mlx-lm model.
        head_path: Dotted path of its head.
        tokens: Ids, n of them.

    Raises:
        StatesError: There are NaN or infinite states.
    """
    for window in windows(tokens):
        yield batch_states(model, head_path, [window])[0]


def windows(tokens: Sequence[int]) -> Iterator[list[int]]:
    """What :func:`stream_states` reads at once of a text."""
    for start in range(0, max(1, len(tokens) - 1), WINDOW):
        window = list(tokens[start : start + WINDOW + 1])
        if start:
            window[0] = tokens[0]
        yield window


def batch_states(
    model: nn.Module, head_path: str, tokens: list[list[int]]
) -> np.ndarray:
    """States ``[B, n - 1, D]`` after each token but the first of ``tokens [B, n]``,
    all read at once. See :func:`stream_states`."""
    return finite(np.array(lazy_states(model, head_path, tokens)))


def lazy_states(model: nn.Module, head_path: str, tokens: list[list[int]]) -> mx.array:
    """:func:`batch_states`, float32, not evaluated."""
    with watching(model, head_path) as states:
        model(mx.array(tokens))
    return states[-1][:, 1:].astype(mx.float32)


def finite(states: np.ndarray) -> np.ndarray:
    """The states, if all are finite.

    Raises:
        StatesError: They are not.
    """
    if not np.isfinite(states).all():
        raise StatesError(
            "the model's hidden states are not finite: its weights are damaged, or "
            "its dtype overflows (convert it with --dtype bfloat16)"
        )
    return states


def hidden_states(
    model: nn.Module, head_path: str, tokens: Sequence[int]
) -> np.ndarray:
    """All of :func:`stream_states`, float32 ``[n - 1, D]``."""
    return np.concatenate(list(stream_states(model, head_path, tokens)))
