"""Grammars as masks: those of llguidance, and what outlines and xgrammar give mlx-lm.

These packages' logits processors keep a state that goes on with each call, so they
cannot be asked about a draft that may not stand. But what they are made of can: a
matcher of a grammar takes tokens, can take them back, and says what may follow. None of
them is imported unless something of it is at hand.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np

from ..sampling.masks import TokenMask
from .samplers import read_processors

# Texts that a mask keeps the matchers of: the sequences of a batch may share it.
_REMEMBERED = 32


class Matcher(Protocol):
    """Where a text stands in a grammar.

    Attributes:
        stop_tokens: Tokens that end a text; the matcher is not given them.
    """

    stop_tokens: frozenset[int]

    def accept(self, token: int) -> bool:
        """Go on by a token; whether the grammar has it there."""

    def undo(self, n: int) -> bool:
        """Go back by n tokens; whether that was possible."""

    def words(self) -> np.ndarray:
        """What may follow, int32 or uint32, of any length."""


class _Text:
    """A prompt, the answer to it that was asked about last, and what of it the matcher
    was given."""

    def __init__(self, prompt: list[int], matcher: Matcher):
        self.prompt, self.matcher = prompt, matcher
        self.answer: list[int] = []
        self.given: list[int] = []

    def continues(self, tokens: list[int]) -> bool:
        """Whether tokens may be what follows the prompt: at most one is new."""
        n = len(self.prompt)
        if tokens[:n] != self.prompt:
            return False
        return len(tokens) - n <= _shared(self.answer, tokens[n:]) + 1


def _shared(a: list[int], b: list[int]) -> int:
    """How many tokens two texts share, from the first."""
    n = min(len(a), len(b))
    return n if a[:n] == b[:n] else next(i for i in range(n) if a[i] != b[i])


class GrammarMask(TokenMask):
    """The tokens with which an answer goes on in a grammar: from its beginning behind
    the prompt, which is what :meth:`allowed` is first given of a text. Several texts,
    those of a batch for instance, may share a mask.

    Args:
        new_matcher: Makes a matcher at the grammar's beginning.
    """

    def __init__(self, new_matcher: Callable[[], Matcher]):
        self._new = new_matcher
        self._texts: list[_Text] = []  # that which was asked for last is the last

    def allowed(self, tokens: Sequence[int]) -> np.ndarray:
        """As :meth:`TokenMask.allowed`; ``tokens`` that do not go on from a text which
        was asked for before are a prompt."""
        tokens = list(tokens)
        text = next((t for t in reversed(self._texts) if t.continues(tokens)), None)
        if text is None:
            text = _Text(tokens, self._new())
        else:
            self._texts.remove(text)
        text.answer = tokens[len(text.prompt) :]
        stops = text.matcher.stop_tokens
        ends = [i for i, token in enumerate(text.answer) if token in stops]
        self._give(text, text.answer[: ends[0]] if ends else text.answer)
        self._texts = [*self._texts[1 - _REMEMBERED :], text]
        return _only(stops) if ends else text.matcher.words()

    def _give(self, text: _Text, answer: list[int]) -> None:
        """Bring a text's matcher to where an answer ends. If that fails, the text is
        forgotten."""
        n = _shared(text.given, answer)
        if n < len(text.given) and not text.matcher.undo(len(text.given) - n):
            text.matcher, n = self._new(), 0
        del text.given[n:]
        for token in answer[n:]:
            if not text.matcher.accept(token):
                raise ValueError(
                    f"{type(self).__name__}: the grammar has no token {token} after "
                    f"{len(text.given)} tokens of the answer: make it with the "
                    "model's own tokenizer, and let nothing else choose tokens"
                )
            text.given.append(token)

    def _sized(self, words: np.ndarray, vocab_size: int) -> np.ndarray:
        """Models have more logits than their tokenizers have tokens, and what a
        tokenizer has not is not allowed."""
        n_words = -(-vocab_size // 32)
        return np.pad(words[:n_words], (0, max(0, n_words - len(words))))


def _only(tokens: frozenset[int]) -> np.ndarray:
    words = np.zeros(max(tokens, default=0) // 32 + 1, np.uint32)
    for token in tokens:
        words[token // 32] |= np.uint32(1 << token % 32)
    return words


# ---- llguidance ----------------------------------------------------------------------


class LLGuidanceMask(GrammarMask):
    """A grammar of llguidance (the extra ``grammar``): a JSON schema, a regular
    expression, or one in Lark's syntax.

    Args:
        tokenizer: mlx-lm's, a fast one of transformers, or an ``LLTokenizer``.
        grammar: A JSON schema as a dictionary; or a grammar as
            ``llguidance.LLMatcher.grammar_from_json_schema``, ``..._regex`` and
            ``..._lark`` give them.

    Raises:
        ImportError: llguidance is not installed.
        ValueError: The grammar is not one, or the tokenizer is not a fast one.
    """

    def __init__(self, tokenizer: Any, grammar: str | dict[str, Any]):
        try:
            from llguidance import LLMatcher
        except ImportError as e:
            raise ImportError(
                "LLGuidanceMask needs llguidance: install mlx-flashhead[grammar]"
            ) from e
        made: Any = grammar
        if isinstance(grammar, dict):
            made = LLMatcher.grammar_from_json_schema(grammar)
        of_tokens = _ll_tokenizer(tokenizer)
        if problem := LLMatcher.validate_grammar(made, of_tokens):
            raise ValueError(f"the grammar cannot be used: {_line(problem)}")
        super().__init__(lambda: _LLGuidance(of_tokens, made))


class _LLGuidance:
    """An ``LLMatcher`` as a :class:`Matcher`."""

    def __init__(self, tokenizer: Any, grammar: str):
        from llguidance import LLMatcher

        self.stop_tokens = frozenset(tokenizer.eos_tokens)
        self._matcher = LLMatcher(tokenizer, grammar, log_level=0)
        self._check()

    def accept(self, token: int) -> bool:
        return bool(self._matcher.consume_token(token))

    def undo(self, n: int) -> bool:
        return bool(self._matcher.rollback(n))

    def words(self) -> np.ndarray:
        words = np.frombuffer(self._matcher.compute_bitmask(), np.uint32)
        self._check()  # a grammar may turn out too large where it is used
        return words

    def _check(self) -> None:
        if self._matcher.is_error():
            problem = _line(self._matcher.get_error())
            raise ValueError(f"llguidance gives up on the grammar: {problem}")


# Making one takes a second or more.
_tokenizers: weakref.WeakKeyDictionary[Any, Any] = weakref.WeakKeyDictionary()


def _ll_tokenizer(tokenizer: Any) -> Any:
    """An ``LLTokenizer`` of a tokenizer."""
    import llguidance
    import llguidance.hf

    if isinstance(tokenizer, llguidance.LLTokenizer):
        return tokenizer
    # mlx-lm's wrapper knows of more tokens that end a text than what it wraps.
    ends = getattr(tokenizer, "eos_token_ids", None)
    inner = getattr(tokenizer, "_tokenizer", tokenizer)
    ends = sorted(ends) if ends else None
    known = _tokenizers.get(inner)
    if known is None or known[0] != ends:
        made = llguidance.hf.from_tokenizer(inner, eos_token=ends)
        _tokenizers[inner] = known = ends, made
    return known[1]


def _line(problem: str) -> str:
    """The first line of a message."""
    return problem.strip().split("\n")[0]


# ---- processors of other packages ----------------------------------------------------


class _OutlinesCore:
    """A ``Guide`` of outlines-core as a :class:`Matcher`. As in outlines, a finished
    one takes any token and stays."""

    stop_tokens: frozenset[int] = frozenset()

    def __init__(self, index: Any, n_words: int):
        from outlines_core import Guide

        self._guide = Guide(index)
        self._n_words = n_words
        self._steps: list[bool] = []  # whether the guide has gone on

    def accept(self, token: int) -> bool:
        goes_on = self._guide.accepts_tokens([token])
        if not goes_on and not self._guide.is_finished():
            return False
        if goes_on:
            self._guide.advance(token_id=token, return_tokens=False)
        self._steps.append(goes_on)
        return True

    def undo(self, n: int) -> bool:
        steps = sum(self._steps[-n:])
        if steps > self._guide.get_allowed_rollback():
            return False
        if steps:
            self._guide.rollback_state(steps)
        del self._steps[-n:]
        return True

    def words(self) -> np.ndarray:
        words = np.zeros(self._n_words, np.int32)
        self._guide.write_mask_into(words.ctypes.data, words.size, words.itemsize)
        return words


class _XGrammar:
    """A ``GrammarMatcher`` of xgrammar as a :class:`Matcher`."""

    def __init__(self, matcher: Any, vocab_size: int):
        self.stop_tokens = frozenset(matcher.stop_token_ids)
        self._matcher = matcher
        self._shape = (1, -(-vocab_size // 32))

    def accept(self, token: int) -> bool:
        return bool(self._matcher.accept_token(token))

    def undo(self, n: int) -> bool:
        self._matcher.rollback(n)
        return True

    def words(self) -> np.ndarray:
        words = np.full(self._shape, -1, np.int32)
        self._matcher.fill_next_token_bitmask(words)
        return words[0]


def _outlines_llguidance(processor: Any, vocab_size: int) -> Callable[[], Matcher]:
    tokenizer, grammar = processor.llg_tokenizer, processor.grammar
    return lambda: _LLGuidance(tokenizer, grammar)


def _outlines_core(processor: Any, vocab_size: int) -> Callable[[], Matcher]:
    index = processor.index
    return lambda: _OutlinesCore(index, -(-vocab_size // 32))


def _outlines_xgrammar(processor: Any, vocab_size: int) -> Callable[[], Matcher]:
    new, grammar = processor.xgr.GrammarMatcher, processor.compiled_grammar
    return lambda: _XGrammar(new(grammar), grammar.tokenizer_info.vocab_size)


def _xgrammar(processor: Any, vocab_size: int) -> Callable[[], Matcher]:
    at_start, size = processor.matcher.fork(), processor.vocab_size
    at_start.reset()
    return lambda: _XGrammar(at_start.fork(), size)


# By module and name; whoever has made a class of his own of one means something else.
_READERS = {
    "outlines.backends.llguidance.LLGuidanceLogitsProcessor": _outlines_llguidance,
    "outlines.backends.outlines_core.OutlinesCoreLogitsProcessor": _outlines_core,
    "outlines.backends.xgrammar.XGrammarLogitsProcessor": _outlines_xgrammar,
    "xgrammar.contrib.mlxlm.XGrammarLogitsProcessor": _xgrammar,
}
_read: weakref.WeakKeyDictionary[Any, tuple[int, GrammarMask]] = (
    weakref.WeakKeyDictionary()
)


class Processors:
    """What the logits processors of a request are.

    Args:
        processors: Functions of tokens and logits; ``None`` for none.
        vocab_size: Number of tokens.

    Attributes:
        all: The same, those of outlines and xgrammar replaced by masks that ask
          matchers of their own.
        masks: Those that are masks.
        readable: The others, where all are mlx-lm's; else ``None``.
    """

    def __init__(self, processors: Sequence[Any] | None, vocab_size: int):
        self.all = [_read_mask(p, vocab_size) or p for p in processors or ()]
        self.masks = [p for p in self.all if isinstance(p, TokenMask)]
        others = [p for p in self.all if not isinstance(p, TokenMask)]
        self.readable = read_processors(others, vocab_size)


def _read_mask(processor: Any, vocab_size: int) -> GrammarMask | None:
    kind = type(processor)
    reader = _READERS.get(f"{kind.__module__}.{kind.__qualname__}")
    if reader is None:
        return None
    known = _read.get(processor)
    if known is None or known[0] != vocab_size:
        try:
            new = reader(processor, vocab_size)
        except AttributeError:  # a release that has other parts
            return None
        _read[processor] = known = vocab_size, GrammarMask(new)
    return known[1]
