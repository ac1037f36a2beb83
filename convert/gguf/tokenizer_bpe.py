"""The byte-level tokenizer: words, cut into bytes, joined by merges."""

from __future__ import annotations

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from .vocabulary import Vocabulary
from .word_splits import WordSplit


def byte_level_tokenizer(vocabulary: Vocabulary, split: WordSplit) -> Tokenizer:
    # The first character of a merge is never the separator.
    cuts = ((m, m.index(" ", 1)) for m in vocabulary.merges or [])
    tokenizer = Tokenizer(
        models.BPE(
            vocab=vocabulary.token_ids(),
            merges=[(merge[:cut], merge[cut + 1 :]) for merge, cut in cuts],
            ignore_merges=split.whole_words,
        )
    )
    if split.compose:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(p), "isolated") for p in split.patterns]
        + [pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer
