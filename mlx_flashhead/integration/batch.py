"""mlx-lm's batches, with each sequence's tokens drawn among candidates as it asks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial, wraps
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ..sampling import Processor, Settings, fits, full_logits
from ..sampling.masks import TokenMask
from ..tuning import KINDS, kind_of
from .exact import LogitsProcessor, Sampler
from .exact_batch import exact_step, leave, options_of
from .grammar import Processors
from .keys import Keys
from .locate import slot_of
from .masking import draw_allowed, log_probabilities
from .samplers import read_sampler
from .slots import FlashLinear, densely, hidden_state
from .tuner import dense_is_faster

# A sequence's sampler and logits processors.
Options = tuple[Sampler, Sequence[LogitsProcessor]]
BatchDraw = Callable[
    [mx.array, Keys, dict[int, mx.array]], tuple[mx.array, list[mx.array]]
]


def batch_step(stock: Callable[..., Any]) -> Callable[..., Any]:
    """``GenerationBatch._step`` of mlx-lm: one token for each sequence of a batch, each
    drawn as its request asks."""

    @wraps(stock)
    def _step(self: Any) -> tuple[list[int], list[mx.array]]:
        if not hasattr(self, "_flash"):
            self._flash = slot_of(self.model), Keys(self.model)
        slot, keys = self._flash
        if slot is None or not self.uids:
            return stock(self)
        head = slot.head
        if slot.exact and head.transform is not None:
            return exact_step(self, slot)
        leave(self)
        if slot.decoding != "approximate":
            return stock(self)  # the slot answers densely
        options = [options_of(self, e) for e in range(len(self.uids))]
        drawing = batch_draw(slot, options, self.model)
        if drawing is None:
            if not fits(head, Settings()):
                return stock(self)
            with densely(head):
                return stock(self)
        self._current_tokens = inputs = self._next_tokens
        self._current_logprobs = self._next_logprobs
        h = hidden_state(head, self.model, inputs[:, None], cache=self.prompt_cache)
        h = h[:, -1]
        contexts: dict[int, mx.array] = {}
        for e, (_, processors) in enumerate(options):
            if processors:
                context = self._token_context[e]
                contexts[e] = context.update_and_fetch(inputs[e : e + 1])
        tokens, lazy = drawing(h, keys, contexts)
        self._next_tokens, self._next_logprobs = tokens, lazy
        mx.async_eval(tokens, list(contexts.values()))
        mx.eval(inputs)
        inputs = inputs.tolist()
        for sequence, token in zip(self.tokens, inputs):
            sequence.append(token)
        return inputs, self._current_logprobs

    return _step


@dataclass
class _Request:
    """How the tokens of one sequence of a batch are to be drawn; ``settings`` and
    ``readable`` are ``None`` where sampler and processors are not mlx-lm's own."""

    sampler: Sampler
    processors: Sequence[LogitsProcessor]
    settings: Settings | None
    readable: list[Processor] | None
    masks: list[TokenMask]

    @classmethod
    def read(cls, options: Options, vocab_size: int) -> _Request:
        sampler, processors = options
        read = Processors(processors, vocab_size)
        settings = read_sampler(sampler)
        return cls(sampler, read.all, settings, read.readable, read.masks)


def _dense_is_faster(
    slot: FlashLinear, model: nn.Module, requests: list[_Request]
) -> bool:
    """As :func:`.tuner.dense_is_faster`, by the sequence that takes longest densely."""
    settings: Settings = Settings()
    sampler = None
    for request in requests:
        own = request.settings
        if own is not None and fits(slot.head, own) and _rank(own) > _rank(settings):
            settings, sampler = own, request.sampler
    return dense_is_faster(slot, model, settings, sampler, len(requests))


def _rank(settings: Settings) -> int:
    return KINDS.index(kind_of(settings))


def batch_draw(
    slot: FlashLinear, options: Sequence[Options], model: nn.Module
) -> BatchDraw | None:
    """How the tokens of a batch are drawn among candidates.

    Args:
        slot: Where the model's head stood.
        options: Sampler and logits processors of each sequence.
        model: The model, or text model, whose steps may be measured.

    Returns:
        A function of hidden states ``[B, D]``, keys and, by the number of their
        sequence, the tokens so far of those that have processors. It gives tokens
        ``[B]`` and lazy log-probabilities, ``[V]`` each. ``None`` where the dense
        product is as fast.
    """
    head = slot.head
    requests = [_Request.read(one, head.vocab_size) for one in options]
    if not fits(head, Settings()) or _dense_is_faster(slot, model, requests):
        return None
    return partial(_draw_batch, slot, requests)


def _draw_batch(
    slot: FlashLinear,
    requests: list[_Request],
    h: mx.array,
    keys: Keys,
    contexts: dict[int, mx.array],
) -> tuple[mx.array, list[mx.array]]:
    """Tokens ``[B]`` and lazy log-probabilities, a list of ``[V]``, for ``h [B, D]``:
    at once for the sequences that agree in their settings and have no processors."""
    head = slot.head
    groups: dict[Any, list[int]] = {}
    for e, request in enumerate(requests):
        simple = request.settings is not None and fits(head, request.settings)
        groups.setdefault(
            request.settings if simple and not request.processors else e, []
        ).append(e)
    order: list[int] = []
    tokens: list[mx.array] = []
    lazy: list[mx.array] = []
    for rows in groups.values():
        states = h if len(rows) == len(requests) else h[mx.array(rows)]
        request = requests[rows[0]]
        settings, processors = request.settings, request.readable
        if settings is not None and processors is not None and fits(head, settings):
            context = contexts.get(rows[0])
            key = keys.next(settings)
            drawn = draw_allowed(
                *(slot, settings, states, key, request.masks, processors, context)
            )
            tokens.append(drawn.tokens)
            lazy += log_probabilities(head, drawn)
        else:
            logits = full_logits(head, states)
            for processor in request.processors:
                logits = processor(contexts[rows[0]], logits)
            logits = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
            tokens.append(request.sampler(logits))
            lazy += list(logits)
        order += rows
    back = sorted(range(len(order)), key=order.__getitem__)
    whole = tokens[0] if len(tokens) == 1 else mx.concatenate(tokens)[mx.array(back)]
    return whole, [lazy[i] for i in back]
