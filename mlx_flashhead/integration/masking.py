"""Tokens that masks allow: drawn one by one, and in the chunks of exact decoding."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import mlx.core as mx

from ..head import FlashHead
from ..sampling import Drawn, Processor, Settings, draw, drawn_logprobs, masked
from ..sampling.masks import Allowed, TokenMask, allowed
from .slots import FlashLinear


def draw_allowed(
    slot: FlashLinear,
    settings: Settings,
    h: mx.array,
    key: mx.array,
    masks: Sequence[TokenMask],
    processors: Sequence[Processor],
    context: mx.array | None,
    whole: bool = True,
) -> masked.Choice | Drawn:
    """One token for each hidden state ``h [B, D]``; for one state alone where there are
    masks or processors, which look at the tokens so far, ``context [n]``. ``whole``:
    whether :func:`log_probabilities` come next."""
    if not masks or context is None:
        return draw(slot.head, settings, h, key, processors, context, whole)
    mx.async_eval(h)  # the device works while the masks are made
    so_far = values(context)
    may_come = allowed(slot.head, masks, so_far, slot.stop_tokens)
    return masked.choose(slot.head, settings, h, key, may_come, processors, so_far)


def log_probabilities(
    head: FlashHead, drawn: masked.Choice | Drawn
) -> Sequence[mx.array]:
    """Those of the whole vocabulary, ``[V]``, for each of B states."""
    if isinstance(drawn, masked.Choice):
        return [drawn.logprobs()[0]]
    return drawn_logprobs(head, drawn)


def values(tokens: mx.array) -> list[int]:
    """Tokens ``[n]``, waiting for them."""
    return cast(list[int], tokens.tolist())


class MaskedChunk:
    """The positions of a chunk whose tokens have to be allowed.

    Args:
        head: The head.
        masks: At least one.
        context: The tokens so far, ``[n]``.
        stop_tokens: Tokens that end a text.

    Attributes:
        allowed: What may come at each position that was looked at.
        sure: What is chosen at some: few tokens are allowed there, so the draft is what
          the dense head would choose.
    """

    def __init__(
        self,
        head: FlashHead,
        masks: Sequence[TokenMask],
        context: mx.array,
        stop_tokens: frozenset[int],
    ):
        self._head, self._masks, self._stops = head, masks, stop_tokens
        self._tokens = values(context)
        self.allowed: list[Allowed] = []
        self.sure: dict[int, masked.Choice] = {}

    def look(self, tokens: Sequence[mx.array]) -> bool:
        """Ask what may follow the drafted tokens, of which the last is new; the first
        is no draft. Where masks know nothing that may follow a draft, the answer is no:
        perhaps the draft does not stand.

        Raises:
            ValueError: As for :func:`mlx_flashhead.sampling.masks.allowed`, of what is
              no draft.
        """
        if self.allowed:
            self._tokens += values(tokens[-1])
        try:
            found = allowed(self._head, self._masks, self._tokens, self._stops)
        except ValueError:
            if not self.allowed:
                raise
            self._tokens.pop()
            return False
        self.allowed.append(found)
        return True

    @property
    def undecided(self) -> bool:
        """Whether the last position could be made sure, and is not yet."""
        last = len(self.allowed) - 1
        return last not in self.sure and masked.sure(self._head, self.allowed[last])

    def draft(
        self,
        settings: Settings,
        h: mx.array,
        key: mx.array,
        processors: Sequence[Processor],
    ) -> mx.array:
        """The token of the last position that was looked at, uint32 ``[1]``, as
        :func:`mlx_flashhead.sampling.masked.choose` takes the arguments."""
        choice = masked.choose(
            self._head, settings, h, key, self.allowed[-1], processors, self._tokens
        )
        if masked.sure(self._head, self.allowed[-1]):
            self.sure[len(self.allowed) - 1] = choice
        return choice.tokens
