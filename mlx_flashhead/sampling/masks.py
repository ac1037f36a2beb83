"""Masks of allowed tokens, and what one leaves of a head's vocabulary."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from functools import cached_property, lru_cache
from typing import cast

import mlx.core as mx
import numpy as np

from ..head import FlashHead

# Allowed tokens up to so many are scored row by row. More are mostly cheaper to reach
# through their clusters, and what they decide among is verified.
_MOST_ROWS = 1024
# What masks left of a head's vocabulary, kept for those that were used last: a grammar
# allows the same tokens again and again.
_REMEMBERED = 32


class TokenMask:
    """A logits processor that leaves only some tokens: those that :meth:`allowed`
    names. mlx-lm's functions take it as any other, patched or not. Models with a
    FlashHead score only what it allows where that is little, and draft within it.

    Attributes:
        stop_tokens (frozenset[int]): Tokens that end a text. mlx-lm looks one step
          beyond it, where a mask may allow nothing.
    """

    stop_tokens: frozenset[int] = frozenset()

    def allowed(self, tokens: Sequence[int]) -> np.ndarray | mx.array:
        """Which tokens may come next, uint32 or int32 ``[ceil(V / 32)]``: bit ``t %
        32``, from the lowest, of word ``t // 32`` is token t's.

        It has to be a function of the tokens alone: exact decoding asks for what
        follows a draft, which then may not stand. What helps to answer can be kept.

        Args:
            tokens: The tokens so far, the prompt included.
        """
        raise NotImplementedError(f"{type(self).__name__} has no method allowed")

    def _sized(self, words: np.ndarray, vocab_size: int) -> np.ndarray:
        """What :meth:`allowed` gave, for a vocabulary of this size."""
        return words

    def __call__(self, tokens: mx.array, logits: mx.array) -> mx.array:
        """``logits [1, V]``, ``-inf`` for what is not allowed after ``tokens [n]``."""
        vocab_size = logits.shape[-1]
        words = _words(self, cast(list[int], tokens.tolist()), vocab_size)
        return mx.where(mx.array(_bits(words, vocab_size)), logits, -mx.inf)


def _words(
    mask: TokenMask,
    tokens: Sequence[int],
    vocab_size: int,
    stop_tokens: frozenset[int] = frozenset(),
) -> np.ndarray:
    """What a mask allows, checked, uint32 ``[ceil(V / 32)]``; everything where a text
    has ended and it allows nothing."""
    name, n_words = type(mask).__name__, -(-vocab_size // 32)
    words = mask._sized(np.asarray(mask.allowed(tokens)), vocab_size)
    if words.dtype not in (np.uint32, np.int32) or words.shape != (n_words,):
        raise ValueError(
            f"{name}.allowed gave {words.dtype} {list(words.shape)} where the "
            f"model's {vocab_size} tokens need uint32 [{n_words}]: return one bit "
            "for each of its logits, 32 to a word"
        )
    words = words.view(np.uint32)
    if vocab_size % 32:
        words = words.copy()
        words[-1] &= (1 << vocab_size % 32) - 1
    if words.any():
        return words
    if tokens and tokens[-1] in mask.stop_tokens | stop_tokens:
        return np.full(n_words, 0xFFFFFFFF, np.uint32)
    raise ValueError(
        f"{name} allows no token after {len(tokens)} tokens, and the text has not "
        "ended: let it allow a token that ends the text where it has nothing else"
    )


class Allowed:
    """The tokens of a head's vocabulary that may come.

    Attributes:
        vocabulary: The vocabulary.
        n: How many they are, at least one.
    """

    def __init__(self, vocabulary: _Vocabulary, words: bytes):
        self.vocabulary = vocabulary
        self._words = words
        self.n = int.from_bytes(words, "little").bit_count()

    def few(self, n_candidates: int) -> bool:
        """Whether their rows are scored one by one, where retrieval would score
        ``n_candidates``: their logits are all that there is then."""
        return self.n <= min(n_candidates, _MOST_ROWS)

    @cached_property
    def bits(self) -> np.ndarray:
        """Whether each token may come, bool ``[V]``."""
        words = np.frombuffer(self._words, np.uint32)
        return _bits(words, self.vocabulary.size)

    @cached_property
    def ids(self) -> np.ndarray:
        """The tokens, ascending, ints ``[n]``."""
        return np.flatnonzero(self.bits)

    @cached_property
    def _of_clusters(self) -> np.ndarray:
        return np.append(self.bits, False)[self.vocabulary.token_ids]

    @cached_property
    def by_cluster(self) -> mx.array:
        """Whether the token of each row may come, bool ``[C, m]``."""
        return mx.array(self._of_clusters)

    @cached_property
    def clustered(self) -> mx.array:
        """The same in cluster order, without padding, bool ``[V]``."""
        return self.by_cluster.reshape(-1)[: self.vocabulary.size]

    @cached_property
    def log_shares(self) -> mx.array:
        """Log of the share of each cluster's tokens that may come, float32 ``[C]``;
        ``-inf`` for none."""
        with np.errstate(divide="ignore"):
            shares = np.log(self._of_clusters.sum(1) / self.vocabulary.sizes)
        return mx.array(shares.astype(np.float32))


class _Vocabulary:
    """What masks need of a head's clusters."""

    def __init__(self, head: FlashHead):
        self.size = head.vocab_size
        self.token_ids = np.array(head.token_ids)
        self.positions = np.array(head.positions)
        self.sizes = (self.token_ids < self.size).sum(1)
        self.allowed = lru_cache(maxsize=_REMEMBERED)(self._allowed)

    def _allowed(self, words: bytes) -> Allowed:
        return Allowed(self, words)


_vocabularies: dict[int, _Vocabulary] = {}


def _vocabulary(head: FlashHead) -> _Vocabulary:
    found = _vocabularies.get(id(head))
    if found is None:
        found = _vocabularies.setdefault(id(head), _Vocabulary(head))
        weakref.finalize(head, _vocabularies.pop, id(head), None)
    return found


def allowed(
    head: FlashHead,
    masks: Sequence[TokenMask],
    tokens: Sequence[int],
    stop_tokens: frozenset[int] = frozenset(),
) -> Allowed:
    """What some masks, at least one, leave of a head's vocabulary.

    Args:
        head: The head.
        masks: A token has to be allowed by each.
        tokens: The tokens so far.
        stop_tokens: Tokens that end a text.

    Raises:
        ValueError: A mask has another dtype or length, or allows nothing though the
          text has not ended; or together they allow nothing.
    """
    words = _words(masks[0], tokens, head.vocab_size, stop_tokens)
    for mask in masks[1:]:
        words = words & _words(mask, tokens, head.vocab_size, stop_tokens)
    found = _vocabulary(head).allowed(words.tobytes())
    if not found.n:
        names = " and ".join(type(mask).__name__ for mask in masks)
        raise ValueError(
            f"{names} together allow no token after {len(tokens)} tokens: give one "
            "mask for what is to hold of both"
        )
    return found


def _bits(words: np.ndarray, vocab_size: int) -> np.ndarray:
    """uint32 ``[ceil(V / 32)]`` as bool ``[V]``."""
    little = words.astype("<u4", copy=False).view(np.uint8)
    return np.unpackbits(little, count=vocab_size, bitorder="little").view(bool)
