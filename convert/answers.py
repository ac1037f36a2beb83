"""The hidden states that the head of a chat model sees while the model answers.

They are nearer to what decoding meets than those of a text that somebody else wrote.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.tokenizer_utils import TokenizerWrapper

from mlx_flashhead.evaluation.states import finite
from mlx_flashhead.integration.locate import watching

# Answers written side by side, the tokens of a document that each is an answer to, and
# those of an answer at most.
N_ANSWERS = 64
N_GIVEN = 16
N_TOKENS = 64

# Stands for the user's words in a chat template.
_MARK = "\u2603"


def prompts(tokenizer: TokenizerWrapper, documents: Sequence[str]) -> mx.array | None:
    """The beginnings of documents as a user's words, ids ``[B, n]``; ``None`` if there
    is no chat template, or no document of N_GIVEN tokens."""
    frame = _chat_frame(tokenizer)
    words = [tokenizer.encode(d, add_special_tokens=False) for d in documents]
    words = [ids[:N_GIVEN] for ids in words if len(ids) >= N_GIVEN]
    if frame is None or not words:
        return None
    before, after = frame
    n = min(N_ANSWERS, len(words))
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
    n_tokens: int = N_TOKENS,
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
    keys = mx.random.split(mx.random.key(0), n_tokens)
    cache = make_prompt_cache(model)
    writing = np.ones(len(prompts), bool)
    kept = []
    if prompts.shape[1] > 1:
        # Their logits are never computed.
        model(prompts[:, :-1], cache=cache)
        mx.eval([c.state for c in cache])
    last = prompts[:, -1:]
    with watching(model, head_path) as states:
        for key in keys:
            if not writing.any():
                step()
                continue
            logits = model(last, cache=cache)[:, -1].astype(mx.float32)
            last = mx.random.categorical(logits, key=key)[:, None]
            last_states = states.pop()[:, -1].astype(mx.float32)
            mx.eval(last, last_states)
            kept.append(finite(np.array(last_states)[writing]))
            writing &= ~np.isin(np.array(last)[:, 0], list(stop_tokens))
            step()
    return np.concatenate(kept)
