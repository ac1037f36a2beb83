"""mlx-lm's decoding functions, with tokens drawn among a FlashHead's candidates.

mlx-lm's own functions stay in charge: caches, prompts, streams and stopping are theirs.
They are given a stand-in for the model that has already drawn the token when they ask
for logits, and a sampler that returns it. Where sampler or processors are not mlx-lm's,
the functions run untouched, on logits over the whole vocabulary.
"""

from __future__ import annotations

import inspect
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import wraps
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn

from ..head import FlashHead
from ..sampling import (
    Drawn,
    LogProbs,
    Processor,
    Settings,
    fits,
    masked,
)
from ..sampling.masks import TokenMask
from .exact import ExactDecoder, Verified
from .grammar import Processors
from .keys import Keys, group_of
from .locate import head_of, slot_of
from .masking import draw_allowed, log_probabilities
from .samplers import read_sampler
from .slots import FlashLinear, answered, dense_answer, densely, hidden_state
from .tuner import dense_is_faster, exact_decoder

# A function of mlx-lm's.
Step = Callable[..., Any]

# More positions at once than a draft has: a prompt.
_LONGEST_DRAFT = 32


@dataclass
class Acceptance:
    """Draft tokens of a speculative generation.

    Attributes:
        proposed: Tokens that the draft model made.
        accepted: Those that the model agreed with.
    """

    proposed: int = 0
    accepted: int = 0

    @property
    def rate(self) -> float:
        """Share of the proposed tokens that was accepted, 0 to 1."""
        return self.accepted / self.proposed if self.proposed else 0.0


_acceptance: ContextVar[Acceptance | None] = ContextVar(
    "mlx_flashhead_acceptance", default=None
)


@contextmanager
def acceptance() -> Iterator[Acceptance]:
    """Context that counts the draft tokens of the speculative generations within it."""
    count = Acceptance()
    token = _acceptance.set(count)
    try:
        yield count
    finally:
        _acceptance.reset(token)


def read_request(
    model: Any, sampler: Any, processors: Sequence[Any] | None
) -> tuple[FlashLinear, Settings, Processors] | None:
    """What a model's tokens are drawn with, if they can be drawn among candidates."""
    slot = slot_of(model)
    if slot is None or slot.decoding == "dense":
        return None
    head, settings = slot.head, read_sampler(sampler)
    read = Processors(processors, head.vocab_size)
    if settings is None or read.readable is None:
        return None
    return (slot, settings, read) if fits(head, settings) else None


_Drawn = masked.Choice | Drawn


class DenseStandIn:
    """Stands in for a model that decodes with the dense head where that is faster."""

    def __init__(self, model: nn.Module, head: FlashHead):
        self._model = model
        self._head = head
        self._answer = dense_answer(head)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def __call__(self, *args: Any, **kwargs: Any) -> mx.array:
        return answered(self._head, self._answer, self._model, *args, **kwargs)


class _Turn:
    """Links a stand-in's logits to the sampler's question for a token."""

    def __init__(self, sampler: Callable[[mx.array], mx.array] | None):
        self.own = sampler or (lambda x: mx.argmax(x, axis=-1))
        self.model: _StandIn | None = None  # that was called last
        self.drawn: _Drawn | None = None  # for its logits
        self.on_sample: Callable[[_Drawn | None], None] = lambda drawn: None

    def sampler(self, logits: mx.array) -> mx.array:
        self.on_sample(self.drawn)
        if self.drawn is None:
            return self.own(logits)
        return self.drawn.tokens[-logits.shape[0] :]


class _Unread(mx.array):
    """Logits of one position that nobody reads, evaluated: what mlx-lm makes of them
    before and after sampling are they themselves, so that it computes nothing."""

    def __init__(self) -> None:
        super().__init__([[[0.0]]])

    def __getitem__(self, index: Any) -> _Unread:
        return self

    def __sub__(self, other: Any) -> _Unread:
        return self

    def squeeze(self, *args: Any, **kwargs: Any) -> _Unread:
        return self


class _StandIn:
    """Stands in for a model: it draws the tokens, and its logits are none.

    Args:
        model: The model.
        slot: Where its head stood; ``None`` leaves all to the model.
        longest: Positions at once that are drawn; more are a prompt.
        untold: Tokens at first that processors are not told of.
        before: Tokens of the prompt for which nothing is drawn.
        whole: Whether log-probabilities will be asked for.
    """

    def __init__(
        self,
        turn: _Turn,
        model: nn.Module,
        slot: FlashLinear | None,
        settings: Settings,
        keys: Keys,
        processors: Sequence[Processor] = (),
        longest: int = 1,
        untold: int = 0,
        masks: Sequence[TokenMask] = (),
        before: int = 0,
        whole: bool = True,
    ):
        self._turn = turn
        self._model = model
        self._slot = slot
        self._settings = settings
        self._keys = keys
        self._processors = processors
        self._longest = longest
        self._untold = untold
        self._masks = masks
        self._before = before
        self._whole = whole
        self._tokens: list[mx.array] = []
        self._logits = _Unread()
        # Whoever asks for the signature sees the model's; a call looks at the class.
        vars(self)["__call__"] = model.__call__

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def __call__(self, inputs: mx.array, **kwargs: Any) -> mx.array:
        self._turn.model, self._turn.drawn = self, None
        told = inputs.size and self._untold <= 0
        if told and (self._processors or self._masks):
            self._tokens = [mx.concatenate([*self._tokens, inputs[0]])]
        self._untold -= inputs.shape[1]
        embeddings = kwargs.get("input_embeddings")
        n = (inputs if embeddings is None else embeddings).shape[1]
        self._before -= n
        if self._slot is None or n > self._longest or self._before >= 0:
            return self._model(inputs, **kwargs)
        head = self._slot.head
        # Speculative decoding; else that was asked before.
        if self._longest > 1 and dense_is_faster(
            self._slot, self._model, self._settings, self._turn.own, n
        ):
            with densely(head):
                return self._model(inputs, **kwargs)
        h = hidden_state(head, self._model, inputs, **kwargs)
        key = self._keys.next(self._settings)
        states = h.reshape(-1, h.shape[-1])
        context = self._tokens[0] if self._tokens else None
        processors = () if context is None else self._processors
        self._turn.drawn = draw_allowed(
            *(self._slot, self._settings, states, key),
            *(self._masks, processors, context),
            whole=self._whole,
        )
        return self._logits if n == 1 else mx.zeros((*h.shape[:-1], 1))


def generate_step(stock: Step) -> Step:
    """mlx-lm's ``generate_step``, tokens drawn among candidates."""

    @wraps(stock)
    def generate_step(
        prompt: mx.array, model: nn.Module, *args: Any, **kwargs: Any
    ) -> Iterator[tuple[int, mx.array]]:
        options = kwargs.get("sampler"), kwargs.get("logits_processors")
        slot = slot_of(model)
        if slot is not None and slot.exact:
            yield from exact_generate_step(stock, slot, prompt, model, *args, **kwargs)
            return
        request = read_request(model, *options)
        embeddings = kwargs.get("input_embeddings")
        if request is None:
            yield from stock(prompt, model, *args, **kwargs)
            return
        slot, settings, read = request
        if embeddings is None and dense_is_faster(slot, model, settings, options[0], 1):
            yield from stock(prompt, DenseStandIn(model, slot.head), *args, **kwargs)
            return
        turn = _Turn(None)
        drawn: deque[_Drawn | None] = deque()
        turn.on_sample = drawn.append
        stand_in = _StandIn(
            turn,
            model,
            slot,
            settings,
            Keys(model),
            read.readable or (),
            untold=_untold(stock, len(prompt)),
            masks=read.masks,
            before=len(prompt if embeddings is None else embeddings) - 1,
        )
        kwargs.update(sampler=turn.sampler, logits_processors=None)
        steps = stock(prompt, stand_in, *args, **kwargs)
        with closing(steps):
            for token, _ in steps:
                latest = drawn.popleft()
                assert latest is not None  # one position is no prompt
                yield token, log_probabilities(slot.head, latest)[0]

    return generate_step


def _untold(stock: Step, prompt_length: int) -> int:
    """Tokens of a prompt that mlx-lm's processors are not told of: before 0.32, all but
    the last."""
    new = "stream" in inspect.signature(stock).parameters
    return 0 if new else prompt_length - 1


def exact_generate_step(
    stock: Step,
    slot: FlashLinear,
    prompt: mx.array,
    model: nn.Module,
    *args: Any,
    **kwargs: Any,
) -> Iterator[tuple[int, mx.array]]:
    """mlx-lm's ``generate_step``, whose tokens are the dense head's own."""
    processors = kwargs.get("logits_processors") or []
    decoder = exact_decoder(slot, model, kwargs.get("sampler"), processors)
    # Processes that share a model have to draw alike, and masks make some tokens cheap.
    own = decoder.watch.stock and not decoder.masks and group_of(model) is None
    if own or slot.head.transform is None:
        # The slot answers with the dense product.
        yield from stock(prompt, model, *args, **kwargs)
        return
    stand_in = _ExactStandIn(stock, decoder, model, prompt, kwargs)
    kwargs.update(sampler=stand_in.sampler, logits_processors=None)
    steps = stock(prompt, stand_in, *args, **kwargs)
    try:
        with closing(steps):
            for token, _ in steps:
                yield token, stand_in.verified.popleft().logprobs
    finally:
        decoder.close()


class _ExactStandIn:
    """Stands in for a model whose tokens an :class:`ExactDecoder` finds: its logits are
    none.

    Args:
        stock: mlx-lm's ``generate_step``.
        decoder: Finds them.
        model: The model.
        prompt: Its tokens; empty where there are only embeddings.
        options: What ``generate_step`` was called with.
    """

    def __init__(
        self,
        stock: Step,
        decoder: ExactDecoder,
        model: nn.Module,
        prompt: mx.array,
        options: dict[str, Any],
    ):
        self._decoder = decoder
        self._model = model
        # The prompt's last token is the first step; the others come in pieces, which
        # may be of one token, too, and mlx-lm asks for nothing after them.
        embeddings = options.get("input_embeddings")
        self._before = len(prompt if embeddings is None else embeddings) - 1
        self._untold = _untold(stock, len(prompt))
        self.verified: deque[Verified] = deque()
        # mlx-lm takes one step more than it yields tokens.
        n = options.get("max_tokens", 256)
        self._left = n + 1 if n >= 0 else 1 << 62
        self._quantized_from: int | None = None
        if options.get("kv_bits") is not None:
            default = inspect.signature(stock).parameters["quantized_kv_start"].default
            self._quantized_from = options.get("quantized_kv_start", default)
        self._context: list[mx.array] = []
        self._logits = _Unread()
        vars(self)["__call__"] = model.__call__  # for its signature

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def __call__(self, inputs: mx.array, **kwargs: Any) -> mx.array:
        decoder = self._decoder
        if decoder.processors and inputs.size and self._untold <= 0:
            self._context = [mx.concatenate([*self._context, inputs[0]])]
        self._untold -= inputs.shape[1]
        if self._before > 0:
            embeddings = kwargs.get("input_embeddings")
            self._before -= (inputs if embeddings is None else embeddings).shape[1]
            return self._model(inputs, **kwargs)
        context = self._context[0] if self._context else mx.zeros((0,), mx.uint32)
        cache = kwargs.pop("cache", None)
        at_most = min(self._left, self._until_quantized(cache))
        self._left -= 1
        found = decoder.next(inputs[0], cache, context, at_most, **kwargs)
        self.verified.append(found)
        return self._logits

    def _until_quantized(self, cache: Any) -> int:
        """Steps that can be taken at once: mlx-lm quantizes the caches between steps,
        from a number of tokens on, and what is drafted must not be among them."""
        waiting = [c.offset for c in cache or () if hasattr(c, "to_quantized")]
        if self._quantized_from is None or not waiting:
            return 1 << 62
        return max(1, self._quantized_from - max(waiting) - 1)

    def sampler(self, logits: mx.array) -> mx.array:
        """The token that was found last."""
        return self.verified[-1].ids


def speculative_generate_step(stock: Step) -> Step:
    """mlx-lm's ``speculative_generate_step``, with tokens of the draft, the target or
    both drawn among candidates. Logits processors leave it to mlx-lm."""

    @wraps(stock)
    def speculative_generate_step(
        prompt: mx.array,
        model: nn.Module,
        draft_model: nn.Module,
        *args: Any,
        **kwargs: Any,
    ) -> Iterator[tuple[int, mx.array, bool]]:
        count = _acceptance.get() or Acceptance()
        sampler, processors = kwargs.get("sampler"), kwargs.get("logits_processors")
        turn, keys = _Turn(sampler), Keys(model)

        def stand_in(model: nn.Module, longest: int, whole: bool) -> _StandIn:
            slot = slot_of(model)
            # A target of several positions has its dense product for the price of one.
            own = slot is not None and slot.decoding != "approximate" and longest > 2
            leave = processors or own
            request = None if leave else read_request(model, sampler, None)
            drawn_at, settings, _ = request or (None, Settings(), None)
            asked = turn, model, drawn_at, settings, keys, (), longest
            return _StandIn(*asked, whole=whole)

        target = stand_in(model, _LONGEST_DRAFT, True)
        draft = stand_in(draft_model, 2, False)
        # Of the tokens that were verified at once, those not yet yielded.
        lazy: deque[mx.array] = deque()

        def on_sample(drawn: _Drawn | None) -> None:
            if turn.model is draft:
                count.proposed += 1
                return
            lazy.clear()
            if drawn is not None:
                assert target._slot is not None
                lazy.extend(log_probabilities(target._slot.head, drawn))

        turn.on_sample = on_sample
        kwargs["sampler"] = turn.sampler
        steps = stock(prompt, target, draft, *args, **kwargs)
        with closing(steps):
            for token, plain, from_draft in steps:
                count.accepted += from_draft
                yield token, lazy.popleft() if lazy else plain, from_draft

    return speculative_generate_step


def exact(stock: Step) -> Step:
    """A function of a model, or a method of an object with a ``_model``, run with the
    dense head: scores of given text are to be the model's own, whatever the length of
    its pieces."""

    @wraps(stock)
    def scored(first: Any, *args: Any, **kwargs: Any) -> Any:
        head = head_of(getattr(first, "_model", first))
        if head is None:
            return stock(first, *args, **kwargs)
        with densely(head):
            return stock(first, *args, **kwargs)

    return scored


def top_logprobs(stock: Step) -> Step:
    """``_format_top_logprobs`` of mlx-lm's server, without making all of them."""

    @wraps(stock)
    def format(logprobs: mx.array, top_n: int, tokenizer: Any) -> Any:
        found = None
        if top_n > 0 and isinstance(logprobs, LogProbs):
            found = logprobs.top(top_n)
        if found is None:
            return stock(logprobs, top_n, tokenizer)
        ids, values = (cast(list[Any], a.tolist()) for a in found)
        texts = tokenizer.convert_ids_to_tokens(ids)
        return tuple(
            {"id": i, "token": text, "logprob": value}
            for i, text, value in zip(ids, texts, values, strict=True)
        )

    return format
