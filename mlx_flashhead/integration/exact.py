"""Exact decoding: FlashHead drafts, one dense product verifies.

A few tokens are drafted one after another, with FlashHead instead of the dense head.
The hidden states that the head was given are kept, and one dense product of all of them
says what the dense head would have chosen at each position. What comes out is the dense
head's choice in any case; up to the first difference the draft has saved the dense
product's time, and what follows it is undone in the prompt cache. The body runs once
for each drafted token, as it would anyway: only steps after a difference are wasted.

mlx-lm's own loop stays in charge: it calls a stand-in for the model once for each
token, which runs ahead and answers from what is verified already.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import astuple, dataclass
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn

from ..head import FlashHead, prefers_dense
from ..sampling import Processor, Settings, coupled, draw, fits
from ..sampling.draw import known_transform
from .keys import Keys
from .rollback import Rollback, supported
from .slots import FlashLinear, hidden_state

Sampler = Callable[[mx.array], mx.array]
LogitsProcessor = Callable[[mx.array, mx.array], mx.array]


@dataclass
class Verification:
    """What exact decoding did.

    Attributes:
        steps: Steps of the model's body, prompts left out.
        tokens: Tokens that were verified.
        verifications: Dense products.
        drafted: Tokens that were drafted and compared.
        accepted: Those that the dense head chose, too.
    """

    steps: int = 0
    tokens: int = 0
    verifications: int = 0
    drafted: int = 0
    accepted: int = 0

    def __add__(self, other: Verification) -> Verification:
        return Verification(
            *(a + b for a, b in zip(astuple(self), astuple(other), strict=True))
        )

    @property
    def acceptance(self) -> float:
        """Share of the drafted tokens that were compared and agreed, 0 to 1."""
        return self.accepted / self.drafted if self.drafted else 1.0

    @property
    def waste(self) -> float:
        """Share of the body's steps that were undone, 0 to 1."""
        return 1 - self.tokens / self.steps if self.steps else 0.0


_verification: ContextVar[Verification | None] = ContextVar(
    "mlx_flashhead_verification", default=None
)


@contextmanager
def verification() -> Iterator[Verification]:
    """Context that counts what exact decoding does within it."""
    count = Verification()
    token = _verification.set(count)
    try:
        yield count
    finally:
        _verification.reset(token)


@dataclass(frozen=True)
class Verified:
    """A token that the dense head chose, and its log-probabilities over the whole
    vocabulary, ``[V]``, computed when they are looked at."""

    token: int
    logprobs: mx.array


class ExactDecoder:
    """Decodes one sequence, a chunk at a time.

    Args:
        slot: Where the model's head stood.
        model: The model.
        sampler: mlx-lm's or the user's; it is given log-probabilities ``[1, V]``.
        processors: Logits processors, likewise.
        settings: Those of the sampler, where they are known.
        readable: The processors, where all are known.
        longest: Positions that one dense product verifies, at most.
    """

    def __init__(
        self,
        slot: FlashLinear,
        model: nn.Module,
        sampler: Sampler,
        processors: Sequence[LogitsProcessor],
        settings: Settings | None,
        readable: list[Processor] | None,
        longest: int,
    ):
        self.slot, self.head, self.model = slot, slot.head, model
        self.sampler, self.processors = sampler, processors
        self.settings, self.readable = settings, readable
        self.keys = Keys()
        self.longest = longest
        self.count = _verification.get() or Verification()
        self._size = 1
        self._ahead: deque[Verified] = deque()
        self._rollback: Rollback | None = None
        self._served = 0  # steps of the chunk that the caller knows of
        self._position = 0  # of the next token, for its key

    @property
    def drafts(self) -> bool:
        """Whether FlashHead can draft for these settings, and saves time."""
        settings = self.settings or Settings()
        return fits(self.head, settings) and not prefers_dense(self.head, 1)

    def next(
        self, token: mx.array, cache: Any, context: mx.array, at_most: int
    ) -> Verified:
        """What follows ``token [1]``, whose step this is.

        Args:
            token: The token before.
            cache: The prompt cache, which is where that token left it.
            context: The tokens so far, that one included, ``[n]``.
            at_most: Further steps that the caller will take, at most.
        """
        if not self._ahead:
            self.close()
            self._run(token, cache, context, at_most)
        self._served += 1
        return self._ahead.popleft()

    def close(self) -> None:
        """Leave the prompt cache as the steps that were taken would have."""
        if self._rollback is not None:
            self._rollback.to(self._served)
        self._rollback, self._served = None, 0
        self._ahead.clear()

    def _run(
        self, token: mx.array, cache: Any, context: mx.array, at_most: int
    ) -> None:
        """Draft and verify a chunk that begins with ``token``."""
        size = max(1, min(self._size, at_most, self.longest))
        if not self.drafts or cache is None or not supported(cache):
            size = 1
        self._size = min(2 * self._size, self.longest)
        self._rollback = None
        if size > 1:
            self._rollback = Rollback(cache)
            self._rollback.mark()
        states: list[mx.array] = []
        tokens = [token]
        while True:
            if self._rollback is not None:
                self._rollback.step()
            h = hidden_state(self.head, self.model, tokens[-1][None], cache=cache)
            states.append(h[:, -1])
            if len(states) == size or self._ends(tokens):
                break
            tokens.append(self._draft(states[-1], len(tokens) - 1, context, tokens))
            mx.async_eval(tokens[-1])
        self._verify(mx.concatenate(states), tokens, context)

    def _ends(self, tokens: list[mx.array]) -> bool:
        """Whether the last draft but one ends the text: the device works on the last
        one meanwhile."""
        stops = self.slot.stop_tokens
        return bool(stops) and len(tokens) > 2 and tokens[-2].item() in stops

    def _draft(
        self, h: mx.array, i: int, context: mx.array, tokens: list[mx.array]
    ) -> mx.array:
        if self.readable:
            context = mx.concatenate([context, *tokens[1:]])
        # Of a sampler that is not known the likeliest token is the best guess.
        settings, readable = self.settings or Settings(), self.readable or []
        return draw(self.head, settings, h, self._key(i), readable, context).tokens

    def _key(self, i: int) -> mx.array:
        return self.keys.at(self._position + i, self.settings or Settings())

    def _verify(
        self, states: mx.array, tokens: list[mx.array], context: mx.array
    ) -> None:
        """Choose as the dense head does, until it differs from the draft."""
        head = self.head
        logits = known_transform(head)(head.clustered(states))
        known = self.settings is not None and self.readable is not None
        choose = self._choose_together if known else self._choose_in_turn
        chosen = choose(logits, tokens, context)
        n_drafted = min(len(chosen), len(tokens) - 1)
        self.count.steps += len(states)
        self.count.tokens += len(chosen)
        self.count.verifications += 1
        self.count.drafted += n_drafted
        self.count.accepted += n_drafted - (len(chosen) < len(states))
        self._position += len(chosen)
        self._ahead.extend(chosen)

    def _choose_together(
        self, logits: mx.array, tokens: list[mx.array], context: mx.array
    ) -> list[Verified]:
        """Tokens up to the first difference, for settings that are known: all positions
        at once."""
        head, settings, readable = self.head, self.settings, self.readable
        assert settings is not None and readable is not None
        if readable:
            so_far = mx.concatenate([context, *tokens[1:]])
            first = len(context)
            logits = mx.concatenate(
                [
                    coupled.process(
                        head, readable, so_far[: first + i], logits[i : i + 1]
                    )
                    for i in range(len(logits))
                ]
            )
        keys = self.keys.several(self._position, len(logits), settings)
        drawn = coupled.draw(head, settings, logits, keys)
        mx.eval(drawn.tokens, drawn.certain, *tokens)
        drafts = [_value(token) for token in tokens[1:]]
        chosen: list[Verified] = []
        for i in range(len(logits)):
            token = drawn.tokens[i]
            if not drawn.certain[i].item():
                row, key, every = logits[i : i + 1], keys[i : i + 1], head.n_clusters
                token = coupled.draw(head, settings, row, key, every).tokens
            chosen.append(Verified(_value(token), _log_softmax(head, logits[i])))
            if i < len(drafts) and chosen[-1].token != drafts[i]:
                break
        return chosen

    def _choose_in_turn(
        self, logits: mx.array, tokens: list[mx.array], context: mx.array
    ) -> list[Verified]:
        """The same for a sampler or processors that are not known: they are called for
        one position after another, as without a draft, and for no further one after a
        difference, for they may keep a state."""
        positions = self.head.positions
        so_far = mx.concatenate([context, *tokens[1:]])
        first = len(context)
        chosen: list[Verified] = []
        for i in range(len(logits)):
            row = logits[i : i + 1][:, positions]
            for processor in self.processors:
                row = processor(so_far[: first + i], row)
            logprobs = row - mx.logsumexp(row, axis=-1, keepdims=True)
            chosen.append(Verified(_value(self.sampler(logprobs)), logprobs[0]))
            if i + 1 < len(tokens) and chosen[-1].token != _value(tokens[i + 1]):
                break
        return chosen


def _value(token: mx.array) -> int:
    """The one integer of an array, waiting for it."""
    return cast(int, token.item())


def _log_softmax(head: FlashHead, row: mx.array) -> mx.array:
    """Log-probabilities ``[V]`` in vocabulary order of logits in cluster order."""
    row = row[head.positions]
    return row - mx.logsumexp(row)
