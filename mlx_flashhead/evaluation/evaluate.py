"""How faithful FlashHead and dense quantized heads are, on texts and continuations.

All heads get the same hidden states of the same body, and each is compared with the
unquantized head: dense heads as ``mlx_lm.convert -q`` makes them, of 8 and of 4 bits,
and the FlashHead at several numbers of probes.

The figures, as :func:`evaluate` returns and ``--json`` writes them::

    {
      "domains": {NAME: {                 one for each text, by its file's name
        "tokens": int,
        "reference": {"perplexity": float},
        "heads": {HEAD: {
          "recall": float,                share of tokens whose best token is probed
          "top10_recall": float,          share of the ten best tokens that are probed
          "agreement": float,             share of tokens with the same best token
          "probed_mass": float,           the reference's probability of what is probed
          "kl": float,                    KL(reference || head), nats per token
          "total_variation": float,       mean of sum |p - q| / 2
          "perplexity": float,            of the text, by the head's distribution
          "perplexity_ratio": float       over the reference's
        }}
      }},
      "overall": {...},                   the same over all tokens of all texts;
                                          "reference" also has "name", "bits",
                                          "rows_read" and "bytes_read"
      "heads": [{
        "name": HEAD,
        "kind": "dense", "flashhead" or "exact",
        "bits": int,                      of its rows
        "n_probes": int or null,
        "stored": bool,                   the FlashHead as it is in the folder
        "rows_read": int,                 per token, centroids included
        "bytes_read": int,                per token
        "continuations": {                with --generate
          "prompts": int,
          "identical": float,             share of prompts
          "median_first_difference": float or null,   from 1
          "near_ties": float or null,     share of first differences where the gap of
                                          the reference's logits is within the margin
          "near_tie_margin": float,
          "first_difference": [int or null],
          "gap": [float or null]
        }
      }]
    }

A dense head probes everything. In exact decoding the rows of the dense head decide: its
recall is that of the drafts, its bytes those of a token that is kept. The distribution
of a FlashHead is the one that sampling at temperature 1 draws from, the whole
vocabulary's.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from ..compute.table import Table
from ..folder.format import load_head
from ..folder.section import Draft, Section, read_section
from ..head import FlashHead
from ..integration.loading import find_flashhead
from ..integration.locate import find_transform
from ..load import load
from .compare import (
    Comparison,
    Continuations,
    Sums,
    continue_greedily,
    own_reference,
    own_table,
    read_reference,
)
from .states import stream_states

TOKENS = 2000
MAX_TOKENS = 64


def evaluate(
    folder: str | Path,
    texts: Sequence[str | Path],
    *,
    tokens: int = TOKENS,
    reference: str | None = None,
    n_probes: Sequence[int] | None = None,
    prompts: Sequence[str] = (),
    max_tokens: int = MAX_TOKENS,
    exact: bool = True,
    verify_every: int | None = None,
    flashhead: str | Path | None = None,
    verbose: bool = True,
) -> dict[str, Any]:
    """Compare heads; memory does not grow with the number of tokens.

    Args:
        folder: A converted folder.
        texts: Text files.
        tokens: Tokens of each text, at most.
        reference: Where the unquantized head is: a Hugging Face id, a folder or a GGUF
          file. Default: the folder's own dense head.
        n_probes: Numbers of probes beside the stored one. Default: a quarter to four
          times it.
        prompts: To be continued greedily.
        max_tokens: Longest continuation.
        exact: Whether exact decoding is among what is compared.
        verify_every: Tokens that it verifies at once, instead of the stored number.
        flashhead: A FlashHead of the model in ``folder``, instead of the folder's own:
          its file, a folder that has one, or the Hugging Face id of either.
        verbose: Whether to show progress, on standard error.

    Returns:
        The figures; see the module.

    Raises:
        ValueError, OSError: One line that says what cannot be used.
    """
    if not Path(folder).is_dir():
        raise ValueError(f"{folder} is no folder; give that of a model")
    where = folder if flashhead is None else find_flashhead(flashhead)
    section = read_section(where)
    if section is None:
        raise ValueError(
            f"{folder} has no FlashHead; make one with mlx_flashhead.convert, or name "
            "it with --flashhead"
        )
    names = _names(texts)
    contents = [_read(path) for path in texts]
    path = section.head_path
    model, tokenizer = load(folder, dense=True, flashhead=flashhead)
    table = own_table(folder, path)
    head = load_head(where, section, find_transform(model, path), table)
    if reference is None:
        standard = own_reference(folder, path)
    else:
        standard = read_reference(reference, head)
    verifying = _verifying(table, section, head, verify_every) if exact else None
    comparison = Comparison(head, standard, n_probes, verifying)

    ids = [
        _encode(tokenizer, text, tokens, name)
        for text, name in zip(contents, texts, strict=True)
    ]
    domains: dict[str, Sums] = {}
    overall = Sums()
    with _bar(sum(len(i) - 2 for i in ids), "tok", verbose) as bar:
        for name, text in zip(names, ids, strict=True):
            sums = domains[name] = Sums()
            bar.set_description(name)
            for states in stream_states(model, path, text[:-1]):
                # The tokens after those that the states follow.
                start = 2 + sums.tokens
                following = np.array(text[start : start + len(states)])
                sums.add(comparison.measure(states, following))
                bar.update(len(states))
            overall.add(sums)

    heads = [asdict(h) for h in comparison.heads]
    if prompts:
        continuations = {h.name: Continuations() for h in comparison.heads}
        with _bar(len(prompts), "prompt", verbose) as bar:
            for prompt in prompts:
                _, states = continue_greedily(
                    model,
                    path,
                    tokenizer.encode(prompt),
                    comparison.best,
                    max_tokens=max_tokens,
                    stop_tokens=list(tokenizer.eos_token_ids),
                )
                for name, choices in comparison.choose(states).items():
                    continuations[name].add(choices)
                bar.update()
        for each in heads:
            each["continuations"] = continuations[each["name"]].figures()
    total = overall.figures()
    total["reference"] |= {
        "name": standard.name,
        "bits": standard.table.bits,
        "rows_read": head.vocab_size,
        "bytes_read": standard.table.nbytes,
    }
    return {
        "domains": {name: sums.figures() for name, sums in domains.items()},
        "overall": total,
        "heads": heads,
    }


def _verifying(
    table: Table, section: Section, head: FlashHead, verify_every: int | None
) -> tuple[Table, Draft]:
    """The rows ``[V, D]`` that verify in exact decoding, of the model's own ``table``
    or the FlashHead's, and how it drafts."""
    draft = section.drafting
    draft = replace(draft, verify_every=verify_every or draft.verify_every)
    if draft.rows == "stored":
        return head.rows.flat.map(lambda a: a[head.positions]), draft
    return table, draft


def _bar(total: int, unit: str, verbose: bool) -> tqdm[Any]:
    return tqdm(total=total, unit=unit, disable=not verbose, dynamic_ncols=True)


def _names(texts: Sequence[str | Path]) -> list[str]:
    """Names of the files without what is the same for all; whole where they clash."""
    stems = [Path(t).stem for t in texts]
    return [
        s if stems.count(s) == 1 else str(t) for s, t in zip(stems, texts, strict=True)
    ]


def _read(path: str | Path) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise ValueError(f"{path}: not a UTF-8 text file") from None
    except OSError as e:
        raise ValueError(f"{path}: {e.strerror or 'cannot be read'}") from None


def _encode(tokenizer: Any, text: str, tokens: int, path: str | Path) -> list[int]:
    """Ids of a text: one before the first state, and one after the last."""
    ids = tokenizer.encode(text)[: tokens + 2]
    if len(ids) < 3:
        raise ValueError(f"--text {path}: too short; give three tokens or more")
    return ids


def read_prompts(path: str | Path) -> list[str]:
    """Prompts of a file of JSON lines, each with a ``prompt``.

    Raises:
        ValueError: It is not such a file.
    """
    prompts = []
    # Not splitlines(), which also splits at separators inside a string.
    for i, line in enumerate(_read(path).split("\n"), 1):
        if not line.strip():
            continue
        try:
            prompt = json.loads(line)["prompt"]
        except (ValueError, KeyError, TypeError):
            prompt = None
        if not isinstance(prompt, str) or not prompt:
            raise ValueError(
                f'--generate {path}, line {i}: each must be JSON with a "prompt"'
            )
        prompts.append(prompt)
    if not prompts:
        raise ValueError(f"--generate {path} holds no prompts")
    return prompts
