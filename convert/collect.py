"""Calibration: the hidden states that a model's head sees on real text, and in a chat
model's own answers to it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.tokenizer_utils import TokenizerWrapper

from mlx_flashhead.compute.device import side_by_side
from mlx_flashhead.compute.linalg import matmul
from mlx_flashhead.evaluation.states import finite, lazy_states, windows

from . import answers
from .progress import Progress, silent
from .recipes import FULL, Effort

# Texts that the model reads at once, and at most so many times that side by side.
BATCH, N_STREAMS = 4, 8
# One document in this many is held out from the fit, for the report.
HOLD_OUT = 5

DEFAULT_TEXT = Path(__file__).with_name("calibration.jsonl")


class CalibrationError(ValueError):
    """The calibration text cannot be used."""


@dataclass(frozen=True)
class States:
    """Hidden states, float32.

    Attributes:
        fit: What heads are fitted to, ``[n, D]``.
        held_out: Of documents that nothing is fitted to, ``[., D]``.
        n_answered: States at the end of ``fit`` that are the model's own answers.
    """

    fit: np.ndarray
    held_out: np.ndarray
    n_answered: int = 0

    def reported(self, n: int) -> np.ndarray:
        """Held-out states, at most n, evenly over all."""
        return _some(self.held_out, n)

    def answers(self, n: int) -> np.ndarray:
        """States of the model's own answers, at most n, evenly over all."""
        return _some(self.fit[len(self.fit) - self.n_answered :], n)

    def second_moment(self) -> np.ndarray:
        """S = E[h h^T], float32 ``[D, D]``."""
        return matmul(np.ascontiguousarray(self.fit.T), self.fit) / len(self.fit)


def read_documents(path: str | Path | None) -> list[str]:
    """Documents of a text file (blank lines separate paragraphs, which are joined
    up to some 1,500 characters) or of JSON lines with a ``text`` field; without a
    path, of the text that ships with the package.

    Raises:
        CalibrationError: The file is missing, not UTF-8, or too short.
    """
    path = DEFAULT_TEXT if path is None else Path(path)

    def unusable(reason: str) -> CalibrationError:
        return CalibrationError(f"--calibration-data {path}: {reason}")

    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise unusable("not a UTF-8 text file") from None
    except OSError as e:
        raise unusable(e.strerror or "cannot be read") from None
    if path.suffix == ".jsonl":
        # Not splitlines(), which also splits at separators inside a string.
        lines = [line for line in text.split("\n") if line.strip()]
        try:
            documents = [json.loads(line)["text"] for line in lines]
        except (ValueError, KeyError, TypeError):
            documents = [None]
        if not all(isinstance(d, str) for d in documents):
            raise unusable('each line must be JSON with a "text" field')
    else:
        documents = _join_paragraphs(text.split("\n\n"))
    if len(documents) < HOLD_OUT or sum(map(len, documents)) < 5000:
        raise unusable(
            f"too short; give at least 5,000 characters in {HOLD_OUT} paragraphs"
        )
    return documents


def _join_paragraphs(paragraphs: list[str], size: int = 1500) -> list[str]:
    documents = [""]
    for paragraph in filter(str.strip, paragraphs):
        if len(documents[-1]) + len(paragraph) > size and documents[-1]:
            documents.append("")
        documents[-1] += paragraph + "\n\n"
    return documents


def collect(
    model: nn.Module,
    tokenizer: TokenizerWrapper,
    head_path: str,
    documents: list[str],
    effort: Effort = FULL,
    progress: Progress = silent,
) -> States:
    """Run the model over the documents and keep what its head is given, also while a
    model with a chat template answers their beginnings.

    Args:
        model: An mlx-lm model.
        tokenizer: Its tokenizer.
        head_path: Dotted path of its head.
        documents: Texts; each takes an even share of the tokens.
        effort: How many tokens, of the documents and of answers.
        progress: Shows the stages.
    """
    share = max(16, effort.n_tokens // len(documents))
    texts = [tokenizer.encode(text)[: share + 1] for text in documents]
    states = read(model, head_path, texts, progress)
    held_out = states[HOLD_OUT - 1 :: HOLD_OUT]
    fit = [s for i, s in enumerate(states) if i % HOLD_OUT != HOLD_OUT - 1]
    fitted = [d for i, d in enumerate(documents) if i % HOLD_OUT != HOLD_OUT - 1]
    prompts = None
    if effort.n_answers:
        prompts = answers.prompts(tokenizer, fitted, effort.n_answers)
    if prompts is not None:
        with progress("Calibration: answers", effort.n_answered) as step:
            fit.append(
                answers.states(
                    model,
                    head_path,
                    prompts,
                    list(tokenizer.eos_token_ids),
                    n_tokens=effort.n_answered,
                    step=step,
                )
            )
    n_answered = 0 if prompts is None else len(fit[-1])
    return States(np.concatenate(fit), np.concatenate(held_out), n_answered)


def _some(states: np.ndarray, n: int) -> np.ndarray:
    """At most n states, evenly over all."""
    return states[:: -(-len(states) // n)] if len(states) else states


def read(
    model: nn.Module,
    head_path: str,
    texts: list[list[int]],
    progress: Progress = silent,
) -> list[np.ndarray]:
    """:func:`hidden_states` of each text, windows of the same length BATCH at once."""
    pieces = [(i, window) for i, text in enumerate(texts) for window in windows(text)]
    by_length: dict[int, list[int]] = {}
    for k, (_, window) in enumerate(pieces):
        by_length.setdefault(len(window), []).append(k)
    batches = [
        alike[start : start + BATCH]
        for alike in by_length.values()
        for start in range(0, len(alike), BATCH)
    ]
    found: list[np.ndarray] = [np.empty(0)] * len(pieces)
    title = "Calibration: hidden states"
    with (
        progress(title, len(batches)) as step,
        side_by_side(N_STREAMS) as streams,
    ):
        for first in range(0, len(batches), len(streams)):
            some = batches[first : first + len(streams)]
            lazy = []
            for stream, batch in zip(streams, some, strict=False):
                with mx.stream(stream):
                    tokens = [pieces[k][1] for k in batch]
                    lazy.append(lazy_states(model, head_path, tokens))
            mx.eval(lazy)
            for batch, states in zip(some, lazy, strict=True):
                for k, own in zip(batch, finite(np.array(states)), strict=True):
                    found[k] = own
                step()
    owner = [i for i, _ in pieces]
    return [
        np.concatenate([s for i, s in zip(owner, found, strict=True) if i == text])
        for text in range(len(texts))
    ]
