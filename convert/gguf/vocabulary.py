"""The tokenizer's part of the metadata, checked."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from .errors import error, quote
from .metadata import Metadata
from .word_splits import WORD_SPLITS, WordSplit

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)

# Control tokens that end an answer, whether or not the metadata names them.
_ENDS = {
    "<eos>",
    "<end_of_turn>",
    "<end_of_utterance>",
    "<|endoftext|>",
    "<|end_of_text|>",
    "<|im_end|>",
    "<|eot_id|>",
    "<|eom_id|>",
    "<|end|>",
    "<EOT>",
    "_<EOT>",
}


@dataclass(frozen=True)
class Vocabulary:
    """Tokens and what to do with them.

    Attributes:
        split: of a byte-level tokenizer; None for a SentencePiece one.
        tokens: the text of each id.
        types: NORMAL, CONTROL and so on, of each token.
        scores: of each SentencePiece token, else None.
        merges: of a byte-level tokenizer, as "left right", best first; else None.
        special_ids: of bos, eos, unk and pad, as far as the file has them.
        ends: ids of the tokens that end an answer.
    """

    split: WordSplit | None
    tokens: list[str]
    types: np.ndarray
    scores: np.ndarray | None
    merges: list[str] | None
    special_ids: dict[str, int]
    ends: list[int]
    add_bos: bool
    add_eos: bool
    add_space: bool
    chat_template: str | None

    def token_ids(self) -> dict[str, int]:
        return {token: i for i, token in enumerate(self.tokens)}

    def special(self, name: str) -> str | None:
        return self.tokens[self.special_ids[name]] if name in self.special_ids else None

    def config_ids(self) -> dict[str, Any]:
        """The special tokens for config.json."""
        names = [name for name in ("bos", "pad") if name in self.special_ids]
        ids: dict[str, Any] = {f"{n}_token_id": self.special_ids[n] for n in names}
        if self.ends:
            ids["eos_token_id"] = self.ends if len(self.ends) > 1 else self.ends[0]
        return ids


def read_vocabulary(meta: Metadata) -> Vocabulary:
    split = _word_split(meta)
    byte_level = split is not None
    tokens = _token_texts(meta)
    types = _token_types(meta, len(tokens))
    scores = None
    if not byte_level:
        scores = meta.numbers("tokenizer.ggml.scores", len(tokens))
    ids = _special_ids(meta, types, byte_level)
    vocabulary = Vocabulary(
        split=split,
        tokens=tokens,
        types=types,
        scores=scores,
        merges=meta.strings("tokenizer.ggml.merges") if byte_level else None,
        special_ids=ids,
        ends=_end_ids(meta, tokens, types, ids),
        add_bos=meta.flag(
            "tokenizer.ggml.add_bos_token", split is None or split.add_bos
        ),
        add_eos=meta.flag("tokenizer.ggml.add_eos_token", False),
        add_space=meta.flag("tokenizer.ggml.add_space_prefix", not byte_level),
        chat_template=_chat_template(meta),
    )
    for name, wanted in (("bos", vocabulary.add_bos), ("eos", vocabulary.add_eos)):
        if wanted and name not in ids:
            raise meta.bad(f"tokenizer.ggml.{name}_token_id")
    return vocabulary


def _word_split(meta: Metadata) -> WordSplit | None:
    model = meta.text("tokenizer.ggml.model")
    if model not in ("gpt2", "llama"):
        problem = f"its tokenizer is of kind {quote(model)}"
        raise error(meta.path, problem, "use a file with a gpt2 or llama tokenizer")
    pre = meta.text("tokenizer.ggml.pre", "default")
    if model == "llama":
        return None
    if pre not in WORD_SPLITS:
        problem = f"its tokenizer splits words as {quote(pre)}"
        raise error(meta.path, problem, f"use one of {', '.join(WORD_SPLITS)}")
    return WORD_SPLITS[pre]


def _token_texts(meta: Metadata) -> list[str]:
    key = "tokenizer.ggml.tokens"
    # A token without text can never be met, but keeps its place.
    tokens = [t or f"[EMPTY_{i}]" for i, t in enumerate(meta.strings(key))]
    if not tokens:
        raise meta.bad(key)
    if len(set(tokens)) != len(tokens):
        raise error(meta.path, f"{key} has a token twice")
    return tokens


def _token_types(meta: Metadata, count: int) -> np.ndarray:
    key = "tokenizer.ggml.token_type"
    return meta.numbers(key, count) if key in meta else np.full(count, NORMAL)


def _chat_template(meta: Metadata) -> str | None:
    key = "tokenizer.chat_template"
    return meta.text(key) if key in meta else None


def _special_ids(meta: Metadata, types: np.ndarray, byte_level: bool) -> dict[str, int]:
    # What SentencePiece gives them unless told otherwise.
    defaults = {} if byte_level else {"unk": 0, "bos": 1, "eos": 2}
    keys = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    ids = {}
    for name, stem in keys.items():
        token = _token_id(meta, stem, types.size)
        default = defaults.get(name, types.size)
        fits = default < types.size and types[default] in (CONTROL, UNKNOWN)
        if token is None and fits:
            token = default
        if token is not None:
            ids[name] = token
    return ids


def _token_id(meta: Metadata, stem: str, count: int) -> int | None:
    key = f"tokenizer.ggml.{stem}_token_id"
    if key not in meta:
        return None
    token = meta.integer(key, smallest=0)
    if token >= count:
        raise meta.bad(key)
    return token


def _end_ids(
    meta: Metadata, tokens: list[str], types: np.ndarray, ids: dict[str, int]
) -> list[int]:
    """Every token that ends an answer, the tokenizer's own first."""
    named = [_token_id(meta, stem, len(tokens)) for stem in ("eot", "eom")]
    ends = [token for token in (ids.get("eos"), *named) if token is not None]
    ends += [int(i) for i in np.flatnonzero(types == CONTROL) if tokens[i] in _ENDS]
    return list(dict.fromkeys(ends))
