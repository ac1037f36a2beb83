"""The SentencePiece tokenizer, which comes as pieces and scores without merges."""

from __future__ import annotations

import numpy as np
from tokenizers import Tokenizer, decoders, models, normalizers

from .vocabulary import BYTE, NORMAL, Vocabulary

_SPACE = "\u2581"


def sentencepiece_tokenizer(vocabulary: Vocabulary) -> Tokenizer:
    tokenizer = Tokenizer(
        models.BPE(
            vocab=vocabulary.token_ids(),
            merges=_derive_merges(vocabulary),
            unk_token=vocabulary.special("unk"),
            fuse_unk=True,
            byte_fallback=bool((vocabulary.types == BYTE).any()),
        )
    )
    escape = normalizers.Replace(" ", _SPACE)
    steps = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if vocabulary.add_space:
        prepend = normalizers.Prepend(_SPACE)
        tokenizer.normalizer = normalizers.Sequence([prepend, escape])
        steps.append(decoders.Strip(" ", 1, 0))
    else:
        tokenizer.normalizer = escape
    # mlx-lm knows its quick streaming detokenizer by exactly these steps.
    tokenizer.decoder = decoders.Sequence(steps)
    return tokenizer


def _derive_merges(vocabulary: Vocabulary) -> list[tuple[str, str]]:
    """The merges SentencePiece would make, best first.

    SentencePiece joins the two neighbours whose union scores highest, so a
    piece's score ranks every way to cut it in two. Its pieces are joined from
    normal ones only: the others are never met in the text it merges.
    """
    assert vocabulary.scores is not None
    normal = np.flatnonzero(vocabulary.types == NORMAL)
    best_first = normal[np.argsort(-vocabulary.scores[normal], kind="stable")]
    tokens = vocabulary.tokens
    ids = {tokens[i]: i for i in normal.tolist()}
    merges = []
    for i in best_first.tolist():
        token = tokens[i]
        cuts = [(token[:c], token[c:]) for c in range(1, len(token))]
        pairs = [(a, b) for a, b in cuts if a in ids and b in ids]
        merges += sorted(pairs, key=lambda pair: (ids[pair[0]], ids[pair[1]]))
    return merges
