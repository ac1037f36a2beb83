"""The tokenizer of the model folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import AddedToken, Tokenizer, processors

from .errors import error
from .tokenizer_bpe import byte_level_tokenizer
from .tokenizer_spm import sentencepiece_tokenizer
from .vocabulary import CONTROL, UNKNOWN, USER_DEFINED, Vocabulary


def build_tokenizer(path: Path, vocabulary: Vocabulary) -> Tokenizer:
    """The tokenizer of the file at ``path``; GGUFError where it contradicts itself."""
    try:
        if vocabulary.split is not None:
            tokenizer = byte_level_tokenizer(vocabulary, vocabulary.split)
        else:
            tokenizer = sentencepiece_tokenizer(vocabulary)
        # Cut out of the text before anything else.
        special = _added_tokens(vocabulary, (UNKNOWN, CONTROL), special=True)
        tokenizer.add_special_tokens(special)
        plain = _added_tokens(vocabulary, (USER_DEFINED,), special=False)
        tokenizer.add_tokens(plain)
        tokenizer.post_processor = _post_processor(vocabulary)
    except Exception as cause:  # the tokenizers package raises bare Exceptions
        problem = f"its tokenizer is not consistent ({cause})"
        raise error(path, problem) from cause
    return tokenizer


def tokenizer_config(vocabulary: Vocabulary, context: int) -> dict[str, Any]:
    """The tokenizer_config.json of a model of ``context`` positions."""
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": vocabulary.add_bos,
        "add_eos_token": vocabulary.add_eos,
        "clean_up_tokenization_spaces": False,
        "model_max_length": context,
    }
    for name in ("bos", "eos", "unk", "pad"):
        token = vocabulary.special(name)
        if token is not None:
            config[f"{name}_token"] = token
    return config


def _added_tokens(
    vocabulary: Vocabulary, types: tuple[int, ...], special: bool
) -> list[AddedToken]:
    return [
        AddedToken(vocabulary.tokens[i], normalized=False, special=special)
        for i in np.flatnonzero(np.isin(vocabulary.types, types))
    ]


def _post_processor(vocabulary: Vocabulary) -> processors.PostProcessor:
    """Puts bos before and eos after a text, where the file asks for it."""
    ids, tokens = vocabulary.special_ids, vocabulary.tokens
    first = [ids["bos"]] if vocabulary.add_bos else []
    last = [ids["eos"]] if vocabulary.add_eos else []

    def around(text: str, number: int) -> list[str]:
        before, after = ([f"{tokens[i]}:{number}" for i in x] for x in (first, last))
        return [*before, text, *after]

    return processors.TemplateProcessing(
        single=around("$A:0", 0),
        pair=around("$A:0", 0) + around("$B:1", 1),
        special_tokens=[(tokens[i], i) for i in {*first, *last}],
    )
