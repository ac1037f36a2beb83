"""mlx-vlm's decoding functions, with tokens that a FlashHead draws or drafts.

mlx-vlm has copies of mlx-lm's functions and its own models: a vision tower beside a
text model, which gets embeddings, positions and more as arguments and gives an object
with logits. As with mlx-lm, its own functions stay in charge of images, prompts, caches
and streams. They are given a stand-in for the text model that has found the token when
they ask for logits. Draft models, a quantized KV cache, budgets for thinking and
processors that keep a state are left to mlx-vlm: its logits are the slot's.
"""

from __future__ import annotations

import inspect
import sys
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial, wraps
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.sample_utils import make_sampler

from ..head import FlashHead
from ..sampling import Drawn, Processor, Settings, Tempered, draw, drawn_logprobs, fits
from . import exact_batch
from .batch import batch_draw
from .decode import DenseStandIn, Step
from .exact import ExactDecoder, LogitsProcessor, Sampler, Verified
from .keys import Keys
from .locate import slot_of
from .samplers import read_processors, read_sampler
from .slots import FlashLinear, densely, hidden_state
from .tuner import dense_is_faster, tuned

# Arguments of mlx-vlm's ``generate_step`` that choose a token: they become a sampler
# and processors here, and the function is given none of them.
_SAMPLING = ("min_p", "top_n_sigma", "p_less", "typical_p")
_PROCESSORS = (
    *("logit_bias", "repetition_penalty", "repetition_context_size"),
    *("presence_penalty", "presence_context_size"),
    *("frequency_penalty", "frequency_context_size"),
)
# Those that leave all of it to mlx-vlm.
_LEFT = (
    *("draft_model", "thinking_budget_criteria"),
    *("kv_bits", "kv_key_bits", "kv_value_bits"),
)


@dataclass(frozen=True)
class _Request:
    """What a sequence's tokens are drawn with.

    Attributes:
        sampler: mlx-lm's, mlx-vlm's or the user's; ``None`` is greedy.
        processors: Logits processors, likewise.
        seed: Of the keys, where the sampler has one.
        tempered: What it is like, where only the dense head draws so.
    """

    sampler: Sampler | None
    processors: Sequence[LogitsProcessor]
    seed: int | None = None
    tempered: Tempered | None = None

    @classmethod
    def read(cls, sampler: Any, processors: Sequence[Any] | None) -> _Request | None:
        """``None`` where mlx-vlm has to call them itself."""
        processors = list(processors or ())
        if any(hasattr(p, "process_last_token") for p in processors):
            return None
        if not hasattr(sampler, "sample_target"):
            return cls(sampler, processors)
        # mlx-vlm's, with a seed.
        temp, top_p, top_k = sampler.temperature, sampler.top_p, sampler.top_k
        tempered = None
        if 0 < top_p < 1 and top_k > 0:
            return None  # its filters come in another order than ours
        if 0 < top_p < 1 and temp != 1:
            tempered = Tempered(temp, top_p)
        alike = make_sampler(temp=temp, top_p=top_p, top_k=top_k)
        return cls(alike, processors, sampler.seed, tempered)

    def known(self, head: FlashHead) -> tuple[Settings, list[Processor]] | None:
        """Settings and processors, where one sequence's tokens can be drawn among
        candidates."""
        settings = None if self.tempered else read_sampler(self.sampler)
        readable = read_processors(self.processors, head.vocab_size)
        if settings is None or readable is None or not fits(head, settings):
            return None
        return settings, readable

    def decoder(
        self,
        slot: FlashLinear,
        text: Callable[..., Any],
        processors: Sequence[LogitsProcessor],
        position: int = 0,
    ) -> ExactDecoder:
        """Finds tokens that are the dense head's own, from ``position`` on."""
        return ExactDecoder(
            slot,
            text,
            self.sampler,
            processors,
            seed=self.seed,
            position=position,
            settings=self.tempered,
        )


def generate_step(stock: Step) -> Step:
    """mlx-vlm's ``generate_step``, tokens drawn or drafted by a FlashHead."""

    @wraps(stock)
    def generate_step(
        input_ids: mx.array,
        model: nn.Module,
        pixel_values: Any,
        mask: Any,
        **kwargs: Any,
    ) -> Iterator[tuple[int, mx.array]]:
        slot = slot_of(model)
        request = None
        if slot is not None and slot.decoding != "dense" and len(input_ids) == 1:
            request = _read_options(model, kwargs)
        stand_in: _StandIn | None = None
        if slot is not None and request is not None:
            text = model.language_model
            if slot.exact and slot.head.transform is not None:
                stand_in = _Exact(slot, text, request, kwargs["max_tokens"])
            elif not slot.exact and (known := request.known(slot.head)):
                if dense_is_faster(slot, text, known[0], request.sampler, 1):
                    outer = _Model(model, DenseStandIn(text, slot.head))
                    yield from stock(input_ids, outer, pixel_values, mask, **kwargs)
                    return
                stand_in = _Drawing(slot, text, *known, Keys(model, request.seed))
        if stand_in is None or request is None:
            yield from stock(input_ids, model, pixel_values, mask, **kwargs)
            return
        kwargs |= dict.fromkeys(_PROCESSORS)
        kwargs.update(sampler=stand_in.sampler, logits_processors=None)
        outer = _Model(model, stand_in)
        steps = stock(input_ids, outer, pixel_values, mask, **kwargs)
        try:
            with closing(steps):
                for token, _ in steps:
                    yield token, stand_in.logprobs(token)
        finally:
            stand_in.close()

    return generate_step


def _read_options(model: nn.Module, kwargs: dict[str, Any]) -> _Request | None:
    """What arguments of ``generate_step`` say of sampling, as it reads them itself."""
    ar: Any = sys.modules["mlx_vlm.generate.ar"]
    text = inspect.signature(type(model.language_model).__call__)
    if "decoder_input_ids" in text.parameters:
        return None
    if any(kwargs.get(name) is not None for name in _LEFT):
        return None
    kwargs.setdefault("max_tokens", ar.DEFAULT_MAX_TOKENS)
    temp, top_p, top_k = ar.resolve_sampling_defaults(
        getattr(model, "config", None),
        **{name: kwargs.get(name) for name in ("temperature", "top_p", "top_k")},
    )
    temp = ar.clamp_temperature(temp)
    sampler = kwargs.get("sampler")
    filters = {name: kwargs[name] for name in _SAMPLING if name in kwargs}
    if sampler is None:
        sampler = ar.make_sampler(temp=temp, top_p=top_p, top_k=top_k, **filters)
        seed, plain = kwargs.get("seed"), ar.make_sampler(temp=1.0, **filters)
        if seed is not None and temp > 0 and read_sampler(plain) == Settings(temp=1.0):
            sampler = ar._PositionedTargetSampler(
                temperature=temp, top_p=top_p, top_k=top_k, seed=seed
            )
    options = {name: kwargs[name] for name in _PROCESSORS if name in kwargs}
    processors = ar.make_logits_processors(**options)
    processors += kwargs.get("logits_processors") or ()
    return _Request.read(sampler, processors)


class _Model:
    """A model whose text model is another."""

    def __init__(self, model: nn.Module, language_model: Any):
        self._model = model
        self.language_model = language_model

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)


class _Text:
    """A text model that is called with tokens and caches, the rest of its arguments
    added, and whose last output is kept: it may have what the next step needs."""

    def __init__(self, model: Any):
        self.model = model
        self.options: dict[str, Any] = {}
        self.output: Any = None

    def __call__(self, tokens: mx.array, cache: Any) -> None:
        self.output = self.model(tokens, cache=cache, **self.options)
        # Of a prompt, only for its own step.
        self.options = {k: v for k, v in self.options.items() if k in _LASTING}


# Arguments that every step has; embeddings, positions and masks are the prompt's.
_LASTING = {"logits_to_keep", "cross_attention_states", "encoder_outputs"}


class _StandIn:
    """Stands in for a text model: it finds the tokens, and its logits are zeros."""

    def __init__(self, slot: FlashLinear, model: Any, processors: Sequence[Any]):
        self._slot, self._head = slot, slot.head
        self._text = _Text(model)
        self._context: list[mx.array] | None = [] if processors else None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._text.model, name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not args:  # a piece of the prompt, for whose logits nobody asks
            return self._text.model(**kwargs)
        inputs, cache = args[0], kwargs.pop("cache")
        self._text.options = kwargs
        context = mx.zeros((0,), mx.uint32)
        if self._context is not None:
            self._context = [mx.concatenate([*self._context, inputs.flatten()])]
            context = self._context[0]
        self._find(inputs, cache, context)
        return self._text.output

    def _find(self, inputs: mx.array, cache: Any, context: mx.array) -> None:
        """Find what follows ``inputs [1, L]``."""
        raise NotImplementedError

    def sampler(self, logits: mx.array) -> mx.array:
        """The token that was found last, uint32 ``[1]``."""
        raise NotImplementedError

    def logprobs(self, token: int) -> mx.array:
        """Log-probabilities ``[V]`` of the next token that mlx-vlm hands out."""
        raise NotImplementedError

    def close(self) -> None:
        """Leave the prompt cache as mlx-vlm's steps would have."""


class _Drawing(_StandIn):
    """Draws among candidates."""

    def __init__(
        self,
        slot: FlashLinear,
        model: Any,
        settings: Settings,
        processors: list[Processor],
        keys: Keys,
    ):
        super().__init__(slot, model, processors)
        self._settings, self._processors, self._keys = settings, processors, keys
        self._drawn: deque[Drawn] = deque()

    def _find(self, inputs: mx.array, cache: Any, context: mx.array) -> None:
        head, settings = self._head, self._settings
        h = hidden_state(head, self._text, inputs, cache=cache)[:, -1]
        key = self._keys.next(settings)
        self._drawn.append(
            draw(head, settings, h, key, self._processors, context, whole=True)
        )

    def sampler(self, logits: mx.array) -> mx.array:
        return self._drawn[-1].tokens

    def logprobs(self, token: int) -> mx.array:
        return drawn_logprobs(self._head, self._drawn.popleft())[0]


class _Exact(_StandIn):
    """Drafts and verifies."""

    def __init__(
        self, slot: FlashLinear, model: Any, request: _Request, max_tokens: int
    ):
        super().__init__(slot, model, request.processors)
        decoder = request.decoder(slot, self._text, request.processors)
        self._decoder = tuned(decoder, model)
        # mlx-vlm takes one step more than it yields tokens.
        self._left = max_tokens + 1 if max_tokens >= 0 else 1 << 62
        self._verified: deque[Verified] = deque()

    def _find(self, inputs: mx.array, cache: Any, context: mx.array) -> None:
        found = self._decoder.next(inputs[0], cache, context, self._left)
        self._left -= 1
        self._verified.append(found)

    def sampler(self, logits: mx.array) -> mx.array:
        return self._verified[-1].ids

    def logprobs(self, token: int) -> mx.array:
        if token in self._slot.stop_tokens:
            self.close()  # whoever stops here looks at the cache before it lets go
        return self._verified.popleft().logprobs

    def close(self) -> None:
        self._decoder.close()


def batch_step(stock: Step) -> Step:
    """``GenerationBatch._step`` of mlx-vlm: one token for each sequence of a batch."""

    @wraps(stock)
    def _step(self: Any) -> tuple[list[int], Any, Any, Any]:
        if not hasattr(self, "_slot"):
            self._slot = slot_of(self.model)
        slot = self._slot
        if slot is None or not self.uids:
            return stock(self)
        sampler = None if self.greedy_sampling else self.sampler
        request = _Request.read(sampler, _all_processors(self))
        if request is None or any(b is not None for b in self.thinking_budget_criteria):
            exact_batch.leave(self)
            return stock(self)
        if slot.exact and slot.head.transform is not None:
            return _exact_step(self, slot, request)
        exact_batch.leave(self)
        if slot.decoding != "approximate":
            return stock(self)
        if request.tempered or not fits(slot.head, Settings()):
            return stock(self)
        drawn = _approximate_step(self, slot, request)
        if drawn is not None:
            return drawn
        with densely(slot.head):
            return stock(self)

    return _step


def _all_processors(batch: Any) -> list[LogitsProcessor]:
    return [p for several in batch.logits_processors for p in several or ()]


def _processors_of(batch: Any, e: int) -> Sequence[LogitsProcessor]:
    """Logits processors of a batch's sequence ``e``."""
    return (batch.logits_processors or {e: None})[e] or ()


def _text_of(batch: Any) -> Callable[..., Any]:
    """A batch's text model, with the positions that images have left."""
    deltas = batch._rope_deltas
    options = {} if deltas is None else {"rope_deltas": deltas}
    return partial(batch._language_model, **options)


def _contexts(batch: Any) -> list[mx.array]:
    """Tokens of each sequence so far, where any has processors."""
    if not _all_processors(batch):
        return [mx.zeros((0,), mx.int32)] * len(batch.uids)
    batch._ensure_token_context()
    for context, token in zip(batch.token_context, batch._next_tokens.tolist()):
        context.append(token)
    return [mx.array(context) for context in batch.token_context]


def _exact_step(
    batch: Any, slot: FlashLinear, request: _Request
) -> tuple[list[int], Any, Any, Any]:
    """Tokens that are the dense head's own."""
    decoders, text = exact_batch.decoders_of(batch), _text_of(batch)
    for e, uid in enumerate(batch.uids):
        if uid not in decoders:
            own, position = _processors_of(batch, e), batch._num_tokens[e] + 1
            decoder = request.decoder(slot, text, own, position)
            decoders[uid] = tuned(decoder, batch._language_model)
        decoders[uid].model = text
    in_order = [decoders[uid] for uid in batch.uids]
    choices = exact_batch.choose(batch, in_order, _contexts(batch))
    tokens = mx.concatenate([token for token, _ in choices])
    return _finish(batch, tokens, [logprobs for _, logprobs in choices])


def _approximate_step(
    batch: Any, slot: FlashLinear, request: _Request
) -> tuple[list[int], Any, Any, Any] | None:
    """Tokens drawn among candidates; ``None`` where the dense head is as fast."""
    several = [_processors_of(batch, e) for e in range(len(batch.uids))]
    sampler = request.sampler or make_sampler()
    options = [(sampler, own) for own in several]
    drawing = batch_draw(slot, options, batch._language_model)
    if drawing is None:
        return None
    if not hasattr(batch, "_keys"):
        batch._keys = Keys(batch.model, request.seed)
    inputs = batch._next_tokens[:, None]
    h = hidden_state(slot.head, _text_of(batch), inputs, cache=batch.prompt_cache)
    contexts = _contexts(batch)
    whose = {e: contexts[e] for e, own in enumerate(several) if own}
    return _finish(batch, *drawing(h[:, -1], batch._keys, whose))


def _finish(
    batch: Any, tokens: mx.array, lazy: list[mx.array]
) -> tuple[list[int], Any, Any, Any]:
    """Make tokens ``[B]`` with log-probabilities, ``[V]`` each, the batch's next, and
    give what mlx-vlm's step gives of the ones before."""
    served = batch._next_tokens
    given = [batch._next_lps, batch._next_top_idx, batch._next_top_lp]
    if given[0] is None:
        given = [None] * 3
    batch._current_tokens, batch._current_lps = served, batch._next_lps
    batch._next_tokens = tokens
    batch._next_lps = batch._next_top_idx = batch._next_top_lp = None
    targets = [tokens]
    k = batch.top_logprobs_k
    if batch.compute_logprobs or k > 0:
        every = mx.stack(lazy)
        if batch.compute_logprobs:
            batch._next_lps = mx.take_along_axis(every, tokens[:, None], axis=1)[:, 0]
            targets.append(batch._next_lps)
        if k > 0:
            best = mx.argsort(every, axis=-1)[:, : -k - 1 : -1].astype(mx.int32)
            batch._next_top_idx = best
            batch._next_top_lp = mx.take_along_axis(every, best, axis=1)
            targets += [best, batch._next_top_lp]
    mx.async_eval(*targets)
    mx.eval(served, *[x for x in given if x is not None])
    values = [None if x is None else x.tolist() for x in given]
    return served.tolist(), values[0], values[1], values[2]
