"""Exact decoding: FlashHead drafts, one dense product verifies.

A few tokens are drafted one after another, with FlashHead instead of the dense head.
The hidden states that the head was given are kept, and one dense product of all of them
says what the dense head would have chosen at each position. What comes out is the dense
head's choice in any case; up to the first difference the draft has saved the dense
product's time, and what follows it is undone in the prompt cache. The body runs once
for each drafted token, as it would anyway: only steps after a difference are wasted.

mlx-lm's own loop stays in charge: it asks for one token after another, and is answered
from what is verified already.
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

from ..head import prefers_dense
from ..sampling import Processor, Settings, coupled, dense_logprobs, draw, fits
from ..sampling.draw import known_transform
from .keys import Keys
from .rollback import Rollback, supported
from .samplers import read_processors, read_sampler
from .slots import FlashLinear, hidden_state

Sampler = Callable[[mx.array], mx.array]
LogitsProcessor = Callable[[mx.array, mx.array], mx.array]


@dataclass
class Verification:
    """What exact decoding did, sequences that shared a batch with others left out: they
    are not drafted.

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
          ``None`` is greedy.
        processors: Logits processors, likewise.
    """

    def __init__(
        self,
        slot: FlashLinear,
        model: nn.Module,
        sampler: Sampler | None,
        processors: Sequence[LogitsProcessor],
    ):
        self.slot, self.head, self.model = slot, slot.head, model
        self.sampler: Sampler = sampler or (lambda x: mx.argmax(x, axis=-1))
        self.processors = processors
        # Those of the sampler, where they are known; the processors, where all are.
        self.settings: Settings | None = read_sampler(sampler)
        self.readable: list[Processor] | None = read_processors(
            processors, self.head.vocab_size
        )
        self.keys = Keys()
        self.longest = slot.verify_every
        self.count = _verification.get() or Verification()
        self._size = 1
        self._ahead: deque[Verified] = deque()
        self._due: deque[Verified] = deque()  # the same, once their steps are undone
        self._rollback: Rollback | None = None
        self._served = 0  # steps of the chunk that the caller knows of
        self._position = 0  # of the next token to be chosen, for its key

    @property
    def known(self) -> bool:
        """Whether sampler and processors are mlx-lm's own, whose settings are known."""
        return self.settings is not None and self.readable is not None

    def drafts(self, cache: Any) -> bool:
        """Whether FlashHead can draft for these settings, saves time, and what it
        drafts can be undone in this prompt cache."""
        settings = self.settings or Settings()
        return (
            fits(self.head, settings)
            and not prefers_dense(self.head, 1)
            and cache is not None
            and supported(cache)
        )

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
        if self._due:
            self._step(token, cache)
            return self._due.popleft()
        if not self._ahead:
            self.close()
            self._run(token, cache, context, at_most)
        self._served += 1
        return self._ahead.popleft()

    def close(self) -> None:
        """Leave the prompt cache as the steps that were taken would have. What is
        verified further on stays so: a sampler or processor of the user's own is asked
        once for each token."""
        if self._rollback is not None:
            self._rollback.to(self._served)
        self._rollback, self._served = None, 0
        self._due.extend(self._ahead)
        self._ahead.clear()

    @property
    def due(self) -> Verified | None:
        """The next token, where it is verified and the prompt cache is behind it."""
        return self._due[0] if self._due else None

    @property
    def key(self) -> mx.array:
        """Key of the next token to be chosen, uint32 ``[2]``."""
        return self._key(0)

    def advance(self) -> None:
        """Say that the next token was taken from :attr:`due`, or else that it was
        chosen with :attr:`key`, by somebody else."""
        if self._due:
            self._due.popleft()
        else:
            self._position += 1

    def _step(self, token: mx.array, cache: Any) -> None:
        """Only the body's step of a token whose successor is verified."""
        mx.async_eval(hidden_state(self.head, self.model, token[None], cache=cache))
        self.count.steps += 1

    def _run(
        self, token: mx.array, cache: Any, context: mx.array, at_most: int
    ) -> None:
        """Draft and verify a chunk that begins with ``token``."""
        size = max(1, min(self._size, at_most, self.longest))
        if size > 1 and not self.drafts(cache):
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
        choose = self._choose_together if self.known else self._choose_in_turn
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
        drafts = mx.concatenate(tokens)[1:]
        mx.eval(drawn, drafts)  # all at once: each wait for the device takes its time
        found, drafted = _values(drawn.tokens), _values(drafts)
        certain = _values(drawn.certain)
        lazy = dense_logprobs(head, logits)
        chosen: list[Verified] = []
        for i, token in enumerate(found):
            row = logits[i : i + 1]
            if not certain[i]:
                key, every = keys[i : i + 1], head.n_clusters
                token = _value(coupled.draw(head, settings, row, key, every).tokens)
            chosen.append(Verified(token, lazy[i]))
            if i < len(drafted) and token != drafted[i]:
                break
        return chosen

    def _choose_in_turn(
        self, logits: mx.array, tokens: list[mx.array], context: mx.array
    ) -> list[Verified]:
        """The same for a sampler or processors that are not known: they are called for
        one position after another, as without a draft, and for no further one after a
        difference, for they may keep a state."""
        drafts = [token.astype(context.dtype) for token in tokens[1:]]
        so_far = mx.concatenate([context, *drafts])
        first = len(context)
        chosen: list[Verified] = []
        for i in range(len(logits)):
            logprobs = self.logprobs(logits[i : i + 1], so_far[: first + i])
            chosen.append(Verified(_value(self.sampler(logprobs)), logprobs[0]))
            if i + 1 < len(tokens) and chosen[-1].token != _value(tokens[i + 1]):
                break
        return chosen

    def logprobs(self, logits: mx.array, context: mx.array) -> mx.array:
        """What a sampler of the user's own is given, ``[1, V]``: log-probabilities in
        vocabulary order, after the processors.

        Args:
            logits: The model's logits in cluster order, ``[1, V]``.
            context: The tokens so far, ``[n]``.
        """
        row = logits[:, self.head.positions]
        for processor in self.processors:
            row = processor(context, row)
        return row - mx.logsumexp(row, axis=-1, keepdims=True)


def _value(token: mx.array) -> int:
    """The one integer of an array, waiting for it."""
    return cast(int, token.item())


def _values(tokens: mx.array) -> list[int]:
    return cast(list[int], tokens.tolist())
