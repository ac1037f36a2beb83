"""The hidden states that the head of a chat model sees while the model answers.

They are nearer to what decoding meets than those of a text that somebody else wrote.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import cycle

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.tokenizer_utils import TokenizerWrapper

from mlx_flashhead.compute.device import on_gpu, side_by_side
from mlx_flashhead.evaluation.states import finite
from mlx_flashhead.integration.locate import watching

from .recipes import FULL

# Tokens of a document that each is an answer to.
N_GIVEN = 16
# Answers that one core of a CPU writes.
GROUP = 32

# Stands for the user's words in a chat template.
_MARK = "\u2603"


def prompts(
    tokenizer: TokenizerWrapper, documents: Sequence[str], most: int = FULL.n_answers
) -> mx.array | None:
    """The beginnings of documents as a user's words, at most so many, ids ``[B, n]``;
    ``None`` if there is no chat template, or no document of N_GIVEN tokens."""
    frame = _chat_frame(tokenizer)
    words = [tokenizer.encode(d, add_special_tokens=False) for d in documents]
    words = [ids[:N_GIVEN] for ids in words if len(ids) >= N_GIVEN]
    if frame is None or not words:
        return None
    before, after = frame
    n = min(most, len(words))
    return mx.array([before + words[len(words) * i // n] + after for i in range(n)])


def _chat_frame(tokenizer: TokenizerWrapper) -> tuple[list[int], list[int]] | None:
    """The ids before and after a user's words; ``None`` if there is no chat template,
    or none that shows them as they are."""
    if not tokenizer.has_chat_template:
        return None
    message = {"role": "user", "content": _MARK}
    try:
        text = tokenizer.apply_chat_template(
            [message], tokenize=False, add_generation_prompt=True
        )
    except Exception:  # Whatever a model's own template raises.
        return None
    if text.count(_MARK) != 1:
        return None
    before, after = (
        tokenizer.encode(part, add_special_tokens=False) for part in text.split(_MARK)
    )
    return before, after


def states(
    model: nn.Module,
    head_path: str,
    prompts: mx.array,
    stop_tokens: Sequence[int],
    *,
    n_tokens: int = FULL.n_answered,
    step: Callable[[], None] = lambda: None,
) -> np.ndarray:
    """Draw answers at temperature 1, and keep what the model's head is given.

    Args:
        model: An mlx-lm model.
        head_path: Dotted path of its head.
        prompts: Ids ``[B, n]``.
        stop_tokens: Ids after which an answer has ended.
        n_tokens: Tokens of each answer, at most.
        step: Called after each of them.

    Returns:
        float32 ``[., D]``, the same for the same prompts.

    Raises:
        StatesError: There are NaN or infinite states.
    """
    size = len(prompts) if on_gpu() else GROUP
    parts = [prompts[i : i + size] for i in range(0, len(prompts), size)]
    caches = [make_prompt_cache(model) for _ in parts]
    writing = np.ones(len(prompts), bool)
    kept = []
    with side_by_side(len(parts)) as streams, watching(model, head_path) as seen:

        def logits(tokens: list[mx.array]) -> list[mx.array]:
            """The next ones of each part ``[b, n]``, float32 ``[b, V]``, lazy."""
            seen.clear()
            found = []
            for part, cache, stream in zip(tokens, caches, cycle(streams)):
                with mx.stream(stream):
                    found.append(model(part, cache=cache)[:, -1].astype(mx.float32))
            return found

        if prompts.shape[1] > 1:
            # Their logits are never computed.
            logits([part[:, :-1] for part in parts])
            mx.eval([c.state for cache in caches for c in cache])
        last = [part[:, -1:] for part in parts]
        for chances in np.random.default_rng(0).random((n_tokens, len(prompts))):
            if writing.any():
                found = logits(last)
                inputs = [x[:, -1].astype(mx.float32) for x in seen]
                mx.eval(found, inputs)
                own = np.concatenate([np.array(x) for x in inputs])
                kept.append(finite(own[writing]))
                chosen = [
                    draw(part, chances[i * size : (i + 1) * size])
                    for i, part in enumerate(found)
                ]
                last = [mx.array(tokens)[:, None] for tokens in chosen]
                writing &= ~np.isin(np.concatenate(chosen), list(stop_tokens))
            step()
    return np.concatenate(kept)


def draw(logits: mx.array, chances: np.ndarray) -> np.ndarray:
    """The tokens up to which probabilities sum to more than the chances, at
    temperature 1, ids ``[B]``: draws, where these are random numbers.

    Args:
        logits: float32 ``[B, V]``, evaluated.
        chances: From 0 to 1, ``[B]``.
    """
    if on_gpu():
        p = mx.softmax(logits, axis=-1)
        sums = mx.cumsum(p, axis=-1)
        wanted = mx.array(chances.astype(np.float32))[:, None] * sums[:, -1:]
        return np.array(mx.argmax(sums > wanted, axis=-1))
    # NumPy's exponentials take a fifteenth of the time there.
    z = np.array(logits)
    mass = np.cumsum(np.exp(z - z.max(axis=-1, keepdims=True)), -1, dtype=np.float64)
    return (mass > chances[:, None] * mass[:, -1:]).argmax(axis=-1)
