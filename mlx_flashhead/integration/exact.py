"""Exact decoding: FlashHead drafts, one dense product verifies.

A few tokens are drafted one after another, with FlashHead instead of the dense head.
The hidden states that the head was given are kept, and one dense product of all of them
says what the dense head would have chosen at each position. What comes out is the dense
head's choice in any case; up to the first difference the draft has saved the dense
product's time, and what follows it is undone in the prompt cache. The body runs once
for each drafted token, as it would anyway: only steps after a difference are wasted.
Where that does not pay, nothing is drafted, and nothing waits for the device.

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

from ..head import FlashHead, prefers_dense
from ..sampling import Processor, Settings, coupled, dense_logprobs, draw, fits
from ..sampling.draw import known_transform, rules_of
from ..tuning import Watch
from .grammar import Processors
from .keys import Keys
from .masking import MaskedChunk
from .rollback import Rollback, supported
from .samplers import read_sampler
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
    """A token that the dense head chose, an array ``[1]`` where the device may still be
    at work on it; and its log-probabilities over the whole vocabulary, ``[V]``,
    computed when they are looked at."""

    token: int | mx.array
    logprobs: mx.array

    @property
    def ids(self) -> mx.array:
        """The token, uint32 ``[1]``."""
        if isinstance(self.token, mx.array):
            return self.token.astype(mx.uint32)
        return mx.array([self.token], dtype=mx.uint32)


class ExactDecoder:
    """Decodes one sequence, a chunk at a time.

    Args:
        slot: Where the model's head stood.
        model: The model.
        sampler: mlx-lm's or the user's; it is given log-probabilities ``[1, V]``.
          ``None`` is greedy.
        processors: Logits processors, likewise.
        seed: Of the keys; ``None`` leaves it to MLX's generator.
        position: Of the first token that is chosen, for its key.
        settings: Those of the sampler, where they cannot be read.
        watch: Says how to draft; by default as the slot is set to.
    """

    def __init__(
        self,
        slot: FlashLinear,
        model: Callable[..., Any],
        sampler: Sampler | None,
        processors: Sequence[LogitsProcessor],
        *,
        seed: int | None = None,
        position: int = 0,
        settings: Settings | None = None,
        watch: Watch | None = None,
    ):
        self.slot, self.head, self.model = slot, slot.head, model
        self.sampler: Sampler = sampler or (lambda x: mx.argmax(x, axis=-1))
        read = Processors(processors, self.head.vocab_size)
        self.processors: list[LogitsProcessor] = read.all
        self.masks = read.masks
        # Those of the sampler, where they are known; the processors beside the masks,
        # where all are.
        self.settings: Settings | None = settings or read_sampler(sampler)
        self.readable: list[Processor] | None = read.readable
        self.keys = Keys(model, seed)
        self.watch = watch or Watch(self.head.n_probes, slot.verify_every)
        self.count = _verification.get() or Verification()
        self._ahead: deque[Verified] = deque()
        self._due: deque[Verified] = deque()  # the same, once their steps are undone
        self._rollback: Rollback | None = None
        self._served = 0  # steps of the chunk that the caller knows of
        self._position = position  # of the next token to be chosen, for its key

    @property
    def known(self) -> bool:
        """Whether sampler and processors are mlx-lm's own, whose settings are known."""
        return self.settings is not None and self.readable is not None

    def drafts(self, cache: Any) -> bool:
        """Whether FlashHead can draft for these settings, may save time, and what it
        drafts can be undone in this prompt cache."""
        settings = self.settings or Settings()
        measured = self.watch.times is not None
        return (
            fits(self.head, settings)
            and (measured or not prefers_dense(self.head, 1))
            and cache is not None
            and supported(cache)
        )

    def next(
        self,
        token: mx.array,
        cache: Any,
        context: mx.array,
        at_most: int,
        **options: Any,
    ) -> Verified:
        """What follows ``token [1]``, whose step this is.

        Args:
            token: The token before; ``[0]`` where ``options`` have its embedding.
            cache: The prompt cache, which is where that token left it.
            context: The tokens so far, that one included, ``[n]``.
            at_most: Further steps that the caller will take, at most.
            options: What the model is called with in this step, besides.
        """
        if self._due:
            self._step(token, cache, **options)
            return self._due.popleft()
        if not self._ahead:
            self.close()
            self._run(token, cache, context, at_most, **options)
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

    def restart(self) -> None:
        """The same, and forget what was verified: another token comes next."""
        self.close()
        self._due.clear()

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

    def _step(self, token: mx.array, cache: Any, **options: Any) -> None:
        """Only the body's step of a token whose successor is verified."""
        h = hidden_state(self.head, self.model, token[None], cache=cache, **options)
        mx.async_eval(h)
        self.count.steps += 1

    def _run(
        self,
        token: mx.array,
        cache: Any,
        context: mx.array,
        at_most: int,
        **options: Any,
    ) -> None:
        """Draft and verify a chunk that begins with ``token``."""
        plan = self.watch.next()
        size = max(1, min(plan.verify_every, at_most))
        if size > 1 and not self.drafts(cache):
            size = 1
        self._rollback = None
        if size == 1 and not self.masks:
            self._found([self.choose(token, cache, context, **options)], 1)
            return
        head = self.slot.probing(plan.n_probes)
        if size > 1:
            self._rollback = Rollback(cache)
            self._rollback.mark()
        states: list[mx.array] = []
        tokens = [token]
        masks = None
        if self.masks:
            stops = self.slot.stop_tokens
            masks = MaskedChunk(head, self.masks, context, stops)
        while True:
            if self._rollback is not None:
                self._rollback.step()
            latest = tokens[-1][None]
            h = hidden_state(self.head, self.model, latest, cache=cache, **options)
            options = {}
            states.append(h[:, -1])
            if masks is not None:
                mx.async_eval(states[-1])  # the device works while the mask is made
                if not masks.look(tokens):
                    del states[-1], tokens[-1]
                    break
            if len(states) == size or self._ends(tokens):
                break
            tokens.append(self.draft(head, states[-1], context, tokens, masks))
            mx.async_eval(tokens[-1])
        if masks is not None and self.known and masks.undecided:
            self.draft(head, states[-1], context, tokens, masks)
        chosen = self.verify(states, tokens, context, masks)
        n_drafted = min(len(chosen), len(tokens) - 1)
        n_accepted = n_drafted - (len(chosen) < len(states))
        self.watch.saw(plan.n_probes, n_drafted, n_accepted)
        self.count.drafted += n_drafted
        self.count.accepted += n_accepted
        self._found(chosen, len(states))

    def _found(self, chosen: list[Verified], n_steps: int) -> None:
        self.count.steps += n_steps
        self.count.tokens += len(chosen)
        self.count.verifications += 1
        self._position += len(chosen)
        self._ahead.extend(chosen)

    def choose(
        self, token: mx.array, cache: Any, context: mx.array, **options: Any
    ) -> Verified:
        """What follows ``token [1]``, by a dense product of its own, as :meth:`next` is
        given it. As in mlx-lm's own steps nothing waits for the device, unless a filter
        may keep more than is looked at first."""
        head = self.head
        h = hidden_state(head, self.model, token[None], cache=cache, **options)[:, -1]
        logits = known_transform(head)(head.clustered(h))
        if self.settings is None or self.readable is None:
            logprobs = self.logprobs(logits, context)
            return Verified(self.sampler(logprobs), logprobs[0])
        if self.readable:
            logits = coupled.process(head, self.readable, context, logits)
        drawn = certainly(head, self.settings, logits, self.key[None])
        return Verified(drawn, dense_logprobs(head, logits)[0])

    def _ends(self, tokens: list[mx.array]) -> bool:
        """Whether the last draft but one ends the text: the device works on the last
        one meanwhile."""
        stops = self.slot.stop_tokens
        return bool(stops) and len(tokens) > 2 and tokens[-2].item() in stops

    def draft(
        self,
        head: FlashHead,
        h: mx.array,
        context: mx.array,
        tokens: list[mx.array],
        masks: MaskedChunk | None = None,
    ) -> mx.array:
        """What is drafted after ``tokens``, a chunk's so far, ``[1]`` each, and the
        hidden state ``h [1, D]``."""
        # Of a sampler that is not known the likeliest token is the best guess.
        settings, readable = self.settings or Settings(), self.readable or []
        key = self._key(len(tokens) - 1)
        if masks is not None:
            return masks.draft(settings, h, key, readable)
        if readable:
            context = mx.concatenate([context, *tokens[1:]])
        return draw(head, settings, h, key, readable, context).tokens

    def _key(self, i: int) -> mx.array:
        return self.keys.at(self._position + i, self.settings or Settings())

    def verify(
        self,
        states: list[mx.array],
        tokens: list[mx.array],
        context: mx.array,
        masks: MaskedChunk | None = None,
    ) -> list[Verified]:
        """What the dense head chooses after each of a chunk's tokens, until it differs
        from the draft.

        Args:
            states: What the head was given, k of ``[1, D]``.
            tokens: The chunk, k tokens ``[1]``; all but the first are drafts.
            context: The tokens before, the first one included, ``[n]``.
            masks: What a grammar allows.
        """
        sure = masks.sure if masks is not None and self.known else {}
        rows = [i for i in range(len(states)) if i not in sure]
        logits = None
        if rows:
            these = mx.concatenate([states[i] for i in rows])
            logits = known_transform(self.head)(self.head.clustered(these))
        if self.known:
            return self._choose_together(logits, tokens, context, masks)
        assert logits is not None  # nothing is sure
        return self._choose_in_turn(logits, tokens, context)

    def _choose_together(
        self,
        logits: mx.array | None,
        tokens: list[mx.array],
        context: mx.array,
        masks: MaskedChunk | None,
    ) -> list[Verified]:
        """Tokens up to the first difference, for settings that are known: all positions
        at once. Those of which masks make sure have no logits."""
        head, settings, readable = self.head, self.settings, self.readable
        assert settings is not None and readable is not None
        sure = masks.sure if masks is not None else {}
        n = len(sure) + (0 if logits is None else len(logits))
        rows = [i for i in range(n) if i not in sure]
        drafts = mx.concatenate([mx.zeros((0,), mx.uint32), *tokens[1:]])
        if logits is not None:
            if masks is not None:
                may_come = mx.stack([masks.allowed[i].clustered for i in rows])
                logits = mx.where(may_come, logits, -mx.inf)
            if readable:
                so_far = mx.concatenate([context, *tokens[1:]])
                first = len(context)
                logits = mx.concatenate(
                    [
                        coupled.process(
                            head, readable, so_far[: first + i], logits[r : r + 1]
                        )
                        for r, i in enumerate(rows)
                    ]
                )
            keys = self.keys.several(self._position, n, settings)
            keys = keys if masks is None else keys[mx.array(rows)]
            drawn = coupled.draw(head, settings, logits, keys)
            # All at once: each wait for the device takes its time.
            mx.eval(drawn, drafts)
            found, certain = _values(drawn.tokens), _values(drawn.certain)
            lazy = dense_logprobs(head, logits)
        drafted = _values(drafts)
        chosen: list[Verified] = []
        for i in range(n):
            logprobs: mx.array
            if i in sure:
                token, logprobs = _value(sure[i].tokens), sure[i].logprobs()[0]
            else:
                assert logits is not None
                r = rows.index(i)
                row, token = logits[r : r + 1], found[r]
                if not certain[r]:
                    key, every = keys[r : r + 1], head.n_clusters
                    token = _value(coupled.draw(head, settings, row, key, every).tokens)
                logprobs = lazy[r]
            chosen.append(Verified(token, logprobs))
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
        # mlx-lm asks none before there is a token.
        for processor in self.processors if len(context) else ():
            row = processor(context, row)
        return row - mx.logsumexp(row, axis=-1, keepdims=True)


def certainly(
    head: FlashHead, settings: Settings, logits: mx.array, keys: mx.array
) -> mx.array:
    """Tokens ``[k]`` that the dense head draws, each a function of its key alone.

    Args:
        head: The head.
        settings: How to draw.
        logits: All logits of each position, in cluster order, ``[k, V]``.
        keys: Key of each position, uint32 ``[k, 2]``.
    """
    drawn = coupled.draw(head, settings, logits, keys)
    if rules_of(settings) is None or drawn.certain.all().item():
        return drawn.tokens
    return coupled.draw(head, settings, logits, keys, head.n_clusters).tokens


def _value(token: mx.array) -> int:
    """The one integer of an array, waiting for it."""
    return cast(int, token.item())


def _values(tokens: mx.array) -> list[int]:
    return cast(list[int], tokens.tolist())
