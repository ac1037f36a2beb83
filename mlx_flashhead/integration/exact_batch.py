"""Exact decoding of mlx-lm's batches.

A sequence that is alone in its batch is drafted and verified as any other
(:mod:`.exact`). Several at once get one dense product in each step, undrafted: a draft
would have to be undone for all of them at the first difference in any, and on a CPU
retrieval takes its time for each sequence, while the dense product of a few takes
hardly longer than that of one.

Sequences join, leave and have their caches read between steps. Before that, the caches
are brought back to what was served. What was verified further on is kept and served
when its turn comes, without another choice.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any

import mlx.core as mx

from ..sampling import coupled, dense_logprobs
from ..sampling.draw import known_transform
from ..sampling.masks import allowed
from .exact import ExactDecoder, LogitsProcessor, Sampler, certainly
from .masking import values
from .slots import FlashLinear, hidden_state
from .tuner import exact_decoder

# A token [1], and its lazy log-probabilities [V].
Choice = tuple[mx.array, mx.array]


def options_of(batch: Any, e: int) -> tuple[Sampler, Sequence[LogitsProcessor]]:
    """Sampler and logits processors of a batch's sequence ``e``."""
    sampler = (batch.samplers or {e: None})[e] or batch.fallback_sampler
    return sampler, (batch.logits_processors or {e: None})[e] or ()


def exact_step(batch: Any, slot: FlashLinear) -> tuple[list[int], list[mx.array]]:
    """``GenerationBatch._step`` of mlx-lm, with tokens that are the dense head's own.

    Args:
        batch: The ``GenerationBatch``; it has sequences.
        slot: Where the model's head stood; what the model does to its logits is known.
    """
    sequences = range(len(batch.uids))
    decoders = [_decoder(batch, slot, e) for e in sequences]
    inputs, buffers = batch._next_tokens, batch._token_context
    contexts = [mx.zeros((0,), mx.int32)] * len(decoders)
    for e in sequences:
        if decoders[e].processors:
            latest = inputs[e : e + 1].astype(mx.int32)
            contexts[e] = mx.concatenate([buffers[e].tokens, latest])
    choices = choose(batch, decoders, contexts)
    batch._current_tokens, batch._current_logprobs = inputs, batch._next_logprobs
    batch._next_tokens = mx.concatenate([token for token, _ in choices])
    batch._next_logprobs = [logprobs for _, logprobs in choices]
    updated = [
        buffers[e].update_and_fetch(inputs[e : e + 1])
        for e in sequences
        if decoders[e].processors
    ]
    mx.async_eval(batch._next_tokens, updated)
    served: list[int] = inputs.tolist()
    for sequence, token in zip(batch.tokens, served, strict=True):
        sequence.append(token)
    return served, batch._current_logprobs


def choose(
    batch: Any, decoders: list[ExactDecoder], contexts: list[mx.array]
) -> list[Choice]:
    """What follows in each sequence of a batch, which has one at least.

    Args:
        batch: Of mlx-lm or mlx-vlm.
        decoders: Of its sequences.
        contexts: Their tokens so far, where they have processors.
    """
    if len(decoders) == 1 and decoders[0].drafts(batch.prompt_cache):
        return [_alone(batch, decoders[0], contexts[0])]
    return _together(batch, decoders, contexts)


def decoders_of(batch: Any) -> dict[int, ExactDecoder]:
    """Decoders of a batch's sequences, by ``uid``."""
    found: dict[int, ExactDecoder] = vars(batch).setdefault("_exact", {})
    return found


def _decoder(batch: Any, slot: FlashLinear, e: int) -> ExactDecoder:
    decoders, uid = decoders_of(batch), batch.uids[e]
    if uid not in decoders:
        decoders[uid] = exact_decoder(slot, batch.model, *options_of(batch, e))
    return decoders[uid]


def _alone(batch: Any, decoder: ExactDecoder, context: mx.array) -> Choice:
    left = batch.max_tokens[0] - batch._num_tokens[0]
    found = decoder.next(batch._next_tokens, batch.prompt_cache, context, left)
    return found.ids, found.logprobs


def _together(
    batch: Any, decoders: list[ExactDecoder], contexts: list[mx.array]
) -> list[Choice]:
    """What follows in each sequence, by one dense product. Nothing waits for the device
    unless a filter may keep more than is looked at first."""
    for decoder in decoders:
        decoder.close()
    head, model = decoders[0].head, decoders[0].model
    inputs = batch._next_tokens[:, None]
    h = hidden_state(head, model, inputs, cache=batch.prompt_cache)[:, -1]
    mx.async_eval(h)
    choices: dict[int, Choice] = {}
    for e, decoder in enumerate(decoders):
        if (due := decoder.due) is not None:
            choices[e] = due.ids, due.logprobs
    rows = [e for e in range(len(decoders)) if e not in choices]
    if rows:
        states = h[mx.array(rows)] if choices else h
        logits = known_transform(head)(head.clustered(states))
        chosen = _choose(
            [decoders[e] for e in rows], logits, [contexts[e] for e in rows]
        )
        choices.update(zip(rows, chosen, strict=True))
    for decoder in decoders:
        decoder.advance()
    return [choices[e] for e in range(len(decoders))]


def _choose(
    decoders: list[ExactDecoder], logits: mx.array, contexts: list[mx.array]
) -> list[Choice]:
    """What the dense head chooses for ``logits [B, V]`` in cluster order: at once for
    the sequences that agree in their settings and have no processors."""
    head = decoders[0].head
    sampler = decoders[0].sampler
    if all(d.sampler is sampler and not d.known for d in decoders):
        # Called once, as mlx-lm calls it.
        each = zip(decoders, logits, contexts, strict=True)
        own = mx.concatenate([d.logprobs(row[None], c) for d, row, c in each])
        return list(zip(_rows(sampler(own)), own, strict=True))
    groups: dict[Any, list[int]] = {}
    for i, decoder in enumerate(decoders):
        simple = decoder.known and not decoder.processors
        groups.setdefault(decoder.settings if simple else i, []).append(i)
    choices: dict[int, Choice] = {}
    for rows in groups.values():
        own = logits if len(rows) == len(decoders) else logits[mx.array(rows)]
        decoder, context = decoders[rows[0]], contexts[rows[0]]
        if decoder.settings is None or decoder.readable is None:
            own = decoder.logprobs(own, context)
            drawn, lazy = decoder.sampler(own), list(own)
        else:
            if decoder.masks:
                tokens, stops = values(context), decoder.slot.stop_tokens
                may_come = allowed(head, decoder.masks, tokens, stops).clustered
                own = mx.where(may_come, own, -mx.inf)
            if decoder.readable:
                own = coupled.process(head, decoder.readable, context, own)
            keys = mx.stack([decoders[i].key for i in rows])
            drawn = certainly(head, decoder.settings, own, keys)
            lazy = [*dense_logprobs(head, own)]
        choices.update(zip(rows, zip(_rows(drawn), lazy, strict=True), strict=True))
    return [choices[i] for i in range(len(decoders))]


def _rows(tokens: mx.array) -> list[mx.array]:
    """Tokens ``[B]`` as a list of ``[1]``."""
    tokens = tokens.astype(mx.uint32)
    return [tokens[i : i + 1] for i in range(len(tokens))]


def settle(batch: Any) -> None:
    """Leave the caches of a batch as the steps that were taken would have."""
    for decoder in decoders_of(batch).values():
        decoder.close()


def leave(batch: Any) -> None:
    """The same, and forget what was verified: the batch is decoded otherwise now."""
    settle(batch)
    decoders_of(batch).clear()


def batch_extend(stock: Callable[..., Any]) -> Callable[..., Any]:
    """``GenerationBatch.extend`` of mlx-lm, both batches settled before."""

    @wraps(stock)
    def extend(self: Any, batch: Any) -> Any:
        settle(self)
        settle(batch)
        result = stock(self, batch)
        decoders_of(self).update(decoders_of(batch))
        return result

    return extend


def batch_filter(stock: Callable[..., Any]) -> Callable[..., Any]:
    """``GenerationBatch.filter`` of mlx-lm, the batch settled before."""

    @wraps(stock)
    def filter(self: Any, keep: list[int]) -> Any:
        settle(self)
        names = [n for n in ("samplers", "logits_processors") if hasattr(self, n)]
        given = [getattr(self, name) for name in names]
        result = stock(self, keep)
        # Before 0.32, mlx-lm forgets lists in which nobody asks for anything: who joins
        # next would be given the options of who has left.
        for name, each in zip(names, given, strict=True):
            if len(getattr(self, name) or ()) > len(self.uids):
                setattr(self, name, [each[i] for i in keep])
        decoders = decoders_of(self)
        for uid in decoders.keys() - set(self.uids):
            del decoders[uid]
        return result

    return filter


def batch_extract_cache(stock: Callable[..., Any]) -> Callable[..., Any]:
    """``GenerationBatch.extract_cache`` of mlx-lm, the batch settled before."""

    @wraps(stock)
    def extract_cache(self: Any, idx: int) -> Any:
        settle(self)
        return stock(self, idx)

    return extract_cache
