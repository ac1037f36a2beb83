"""For programs with a loop of their own: hidden states or tokens in, the next tokens
and their log-probabilities out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import make_prompt_cache

from ..head import FlashHead
from ..sampling import Drawn, Settings, coupled, draw, fits, split
from ..sampling.draw import known_transform
from .decode import DenseStandIn, read_request
from .exact import ExactDecoder, LogitsProcessor, Sampler
from .keys import Keys
from .locate import slot_of
from .masking import draw_allowed
from .slots import FlashLinear, hidden_state
from .tuner import dense_is_faster, exact_decoder

GREEDY = Settings()
# Tokens of a prompt that the model is given at once.
_AT_ONCE = 2048


class Sampled(NamedTuple):
    """Tokens that were drawn.

    Attributes:
        tokens (mx.array): uint32 ``[B]``.
        logprobs (mx.array): Their log-probabilities in nats, float32 ``[B]``: after
          logits processors, but at temperature 1 and before filters.
    """

    tokens: mx.array
    logprobs: mx.array


def hidden_states(model: nn.Module, *args: Any, **kwargs: Any) -> mx.array:
    """What a model's call gives its head, ``[B, L, D]``; no logits are computed.

    Args:
        model: A model with a FlashHead.
        args, kwargs: For the model: tokens ``[B, L]``, ``cache=``, ...

    Raises:
        ValueError: It has none.
    """
    return hidden_state(_slot(model).head, model, *args, **kwargs)


def sample(
    head: FlashHead,
    h: mx.array,
    settings: Settings = GREEDY,
    key: mx.array | None = None,
    *,
    exact: bool = False,
) -> Sampled:
    """One token for each hidden state.

    With the same key, an approximate draw and an exact one share their noise, and
    mostly are the same token: tokens that were drafted one after another, each with a
    key of its own, are verified by an exact draw of all their states and keys at once.

    Args:
        head: The head.
        h: Hidden states ``[B, D]``.
        settings: How to draw; greedy by default.
        key: Random key, uint32 ``[2]``, or one for each state, ``[B, 2]``; by default
          from MLX's generator.
        exact: Compute all logits, by one dense product of all states; else among the
          head's candidates, the rest of the vocabulary counted by its estimate, unless
          the former takes no longer here, as is measured once for so many states.

    Returns:
        Tokens and their log-probabilities: those of the whole vocabulary, exact or
        estimated as the logits are.

    Raises:
        ValueError: ``h`` has another shape, ``top_k`` is no smaller than the
          vocabulary, or what the model does to its logits is not known.
    """
    if h.ndim != 2 or h.shape[1] != head.hidden_size:
        raise ValueError(f"hidden states are [B, {head.hidden_size}], not {h.shape}")
    if not fits(head, settings):
        raise ValueError(
            f"tokens of this head cannot be drawn with {settings}: use the logits that "
            "the model gives"
        )
    if key is None:
        key = Keys().next(settings)
    if not exact and head.choice is not None:
        exact = head.choice(head, h, settings)
    if not exact:
        drawn = draw(head, settings, h, key)
        return Sampled(drawn.tokens, drawn.logprob)
    logits = known_transform(head)(head.clustered(h))
    keys = split(key, len(h))
    tokens, certain = coupled.draw(head, settings, logits, keys)
    if not settings.greedy and not certain.all().item():
        tokens = coupled.draw(head, settings, logits, keys, head.n_clusters).tokens
    at = head.positions[tokens][:, None]
    return Sampled(tokens, _logprobs(logits, at))


class Decoder:
    """Decodes one sequence of a model with a FlashHead, for a loop of your own.

    The model runs within :meth:`step`. Where its decoding is exact, some steps are
    drafts, which one dense product verifies, and what does not stand is undone in the
    cache; the tokens and log-probabilities are the dense head's own. Else tokens are
    drawn among the head's candidates.

    Args:
        model: The model, as :func:`mlx_flashhead.attach` or
          :func:`mlx_flashhead.load` gives it.
        cache: Its prompt cache, which may hold a text; by default a new one.
        sampler: mlx-lm's, or any function of log-probabilities ``[1, V]``; greedy by
          default. Those that are not mlx-lm's are given the whole vocabulary.
        logits_processors: mlx-lm's, or functions of the tokens so far ``[n]`` and
          logits ``[1, V]``.

    Attributes:
        cache: The prompt cache. Between steps it may be ahead of what was given: see
          :meth:`close`.

    Raises:
        ValueError: The model has no FlashHead.
    """

    def __init__(
        self,
        model: nn.Module,
        cache: list[Any] | None = None,
        *,
        sampler: Sampler | None = None,
        logits_processors: Sequence[LogitsProcessor] = (),
    ):
        slot = _slot(model)
        self.cache = make_prompt_cache(model) if cache is None else cache
        self._model = model
        self._sampler: Sampler = sampler or (lambda x: mx.argmax(x, axis=-1))
        self._processors = logits_processors
        self._context = mx.zeros((0,), mx.uint32)
        self._keys = Keys(model)
        self._latest: mx.array | None = None  # what the exact decoder said
        self._exact: ExactDecoder | None = None
        if slot.exact and slot.head.transform is not None:
            self._exact = exact_decoder(slot, model, sampler, logits_processors)
        self._plain: Any = model  # what gives logits, where nothing is drawn
        self._request = read_request(model, sampler, logits_processors)
        if self._request is not None and self._exact is None:
            settings = self._request[1]
            if dense_is_faster(slot, model, settings, sampler, 1):
                self._plain, self._request = DenseStandIn(model, slot.head), None

    def step(self, tokens: mx.array | Sequence[int]) -> Sampled:
        """Give the model tokens ``[n]``, and get the one that follows them, ``[1]``.

        Args:
            tokens: The prompt at first, then the token before, or what stands in its
              place; whatever was not given yet.

        Raises:
            ValueError: There is none.
        """
        given = tokens if isinstance(tokens, mx.array) else mx.array(list(tokens))
        given = given.astype(mx.uint32).reshape(-1)
        if not given.size:
            raise ValueError("step needs at least one token: the prompt, at first")
        if self._exact is not None and (
            self._latest is None or given.tolist() != self._latest.tolist()
        ):
            self._exact.restart()
        if self._processors:
            self._context = mx.concatenate([self._context, given])
        for i in range(0, len(given) - 1, _AT_ONCE):
            part = given[None, i : min(i + _AT_ONCE, len(given) - 1)]
            self._model(part, cache=self.cache)
            mx.eval([c.state for c in self.cache])
        return self._next(given[-1:])

    def _next(self, token: mx.array) -> Sampled:
        if self._exact is not None:
            found = self._exact.next(token, self.cache, self._context, 1 << 62)
            self._latest = latest = found.ids
            return Sampled(latest, found.logprobs[latest].astype(mx.float32))
        if self._request is not None:
            slot, settings, read = self._request
            h = hidden_state(slot.head, self._model, token[None], cache=self.cache)
            key, processors = self._keys.next(settings), read.readable or ()
            drawn = draw_allowed(
                *(slot, settings, h[:, -1], key, read.masks, processors, self._context),
                whole=False,
            )
            if isinstance(drawn, Drawn):
                return Sampled(drawn.tokens, drawn.logprob)
            logprobs = drawn.logprobs().astype(mx.float32)
            return Sampled(drawn.tokens, logprobs[:, drawn.tokens][0])
        logits = self._plain(token[None], cache=self.cache)
        logits = (logits if isinstance(logits, mx.array) else logits.logits)[:, -1]
        for processor in self._processors:
            logits = processor(self._context, logits)
        logprobs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
        chosen = self._sampler(logprobs).astype(mx.uint32)
        return Sampled(chosen, _logprobs(logprobs, chosen[:, None]))

    def close(self) -> None:
        """Leave the cache with those tokens that were given, and no others. Call it
        before anything else reads the cache; further steps may follow."""
        if self._exact is not None:
            self._exact.close()


def _slot(model: nn.Module) -> FlashLinear:
    slot = slot_of(model)
    if slot is None:
        raise ValueError(
            "the model has no FlashHead: put one in (mlx_flashhead.attach), or load a "
            "converted folder (mlx_flashhead.load)"
        )
    return slot


def _logprobs(logits: mx.array, at: mx.array) -> mx.array:
    """Log-probabilities, float32 ``[B]``, at places ``[B, 1]`` of ``logits [B, V]``."""
    wide = logits.astype(mx.float32)
    return mx.take_along_axis(wide, at, axis=1)[:, 0] - mx.logsumexp(wide, axis=1)
