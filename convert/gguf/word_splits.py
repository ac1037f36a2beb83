"""How byte-level tokenizers cut text into words, by their name in llama.cpp."""

from __future__ import annotations

from dataclasses import dataclass

_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_CASELESS_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_CASED_WORDS = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclass(frozen=True)
class WordSplit:
    """The patterns that isolate words, one after the other, and what goes with them.

    ``whole_words`` takes a word that is a token as it is, without merges;
    ``add_bos`` is the default for bos; ``compose`` normalizes the text to NFC.
    """

    patterns: tuple[str, ...]
    whole_words: bool = False
    add_bos: bool = False
    compose: bool = False


_DEFAULT = WordSplit((r"[\p{P}\$\+<=>\^~\|]+", _WORDS, r"\p{N}+", r"[0-9][0-9][0-9]"))
_GPT2 = WordSplit((_WORDS,))
_DIGITS = WordSplit((r"\p{N}", _WORDS))
_LLAMA3 = WordSplit((_CASELESS_WORDS % "{1,3}",), whole_words=True, add_bos=True)
_QWEN2 = WordSplit((_CASELESS_WORDS % "",), compose=True)
_TEKKEN = WordSplit((_CASED_WORDS,), whole_words=True, add_bos=True)

WORD_SPLITS = {
    "default": _DEFAULT,
    "gpt-2": _GPT2,
    "olmo": _GPT2,
    "exaone4": _GPT2,
    "smollm": _DIGITS,
    "starcoder": _DIGITS,
    "refact": _DIGITS,
    "command-r": _DIGITS,
    "codeshell": _DIGITS,
    "exaone": _DIGITS,
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "falcon3": _LLAMA3,
    "pixtral": _LLAMA3,
    "tekken": _TEKKEN,
    "qwen2": _QWEN2,
    "deepseek-r1-qwen": _QWEN2,
    "megrez": _QWEN2,
}
