"""Heads of one body side by side: dense ones, and a FlashHead at numbers of probes.

Each gets the same hidden states, and is compared with the unquantized head. Nothing is
kept but sums, so that a text may be of any length.
"""

from __future__ import annotations

import inspect
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm import utils
from mlx_lm.models.cache import make_prompt_cache

from ..compute.linalg import blocks
from ..compute.table import Table
from ..folder.section import Draft
from ..head import FlashHead, masses
from ..integration.locate import answering, find_head, get_module, head_table
from .drafts import bytes_per_token
from .fidelity import (
    HeadLogits,
    Implied,
    Logits,
    Truth,
    centroid_logits,
    probed_clusters,
    row_order,
    stored_logits,
)

# Bits of the dense heads, and weights per scale, as mlx_lm.convert -q makes them.
DENSE_BITS = (8, 4)
DENSE_GROUP_SIZE = 64
# The name of exact decoding: FlashHead drafts, and the dense head verifies.
EXACT = "FlashHead exact"
# Numbers of probes, in those that are stored.
LADDER = (0.25, 0.5, 1, 2, 4)
# A first difference is a near-tie if the reference's logits of the two tokens are no
# further apart: the other token then has 90 % of the best one's probability or more.
NEAR_TIE = 0.1

# Means per token, and what each is, of a head compared with the reference.
MEASURES = {
    "recall": "share of tokens whose best token is probed, exact: by the draft",
    "top10_recall": "share of the ten best tokens that are probed",
    "agreement": "share of tokens whose best token is the head's choice",
    "probed_mass": "probability of what is probed",
    "kl": "KL(reference || head), nats",
    "total_variation": "sum |p - q| / 2",
}


@dataclass(frozen=True)
class Reference:
    """The unquantized head.

    Attributes:
        name: Where it came from.
        table: Its rows ``[V, D]`` in vocabulary order, as they are stored there.
        bias: float32 ``[V]``.
        exact: The same rows where ``table`` had to round them.
    """

    name: str
    table: Table
    bias: np.ndarray | None = None
    exact: Table | None = None

    @classmethod
    def of(cls, name: str, model: nn.Module, path: str) -> Reference:
        """The head of a model at a path, read from its file."""
        module = get_module(model, path)
        table = head_table(module)
        bias = None
        if "bias" in module:
            bias = np.array(module.bias.astype(mx.float32))
        mx.eval(table.parameters())
        return cls(name, table, bias)


def own_reference(folder: str | Path, path: str) -> Reference:
    """The dense head that a converted folder holds beside its FlashHead.

    Raises:
        ValueError: It is quantized.
    """
    model, table = _stored_model(folder), own_table(folder, path)
    if table.quantized:
        raise ValueError(
            f"{folder} holds its dense head in {table.bits} bits: name the model that "
            "it was converted from with --reference (a Hugging Face id, a folder or a "
            "GGUF file)"
        )
    return Reference.of(str(folder), model, path)


def own_table(folder: str | Path, path: str) -> Table:
    """The rows ``[V, D]`` of the dense head of a converted folder's plain model."""
    return head_table(get_module(_stored_model(folder), path))


def _stored_model(folder: str | Path) -> nn.Module:
    """The plain model, lazily, by mlx-lm's own loader, patched or not: everything is as
    it is in the files."""
    model, _ = inspect.unwrap(utils.load_model)(Path(folder), lazy=True)
    return model


def read_reference(name: str, head: FlashHead) -> Reference:
    """The head of a Hugging Face id, a folder or a GGUF file.

    Raises:
        ValueError: It cannot be read, is quantized, or does not fit the FlashHead.
    """
    # Here, so that the runtime does not import the converter.
    from ..convert.source import open_reference

    with tempfile.TemporaryDirectory(prefix="mlx-flashhead-") as workspace:
        source = open_reference(name, Path(workspace))
        model, _, _ = source.load(None)
        path = find_head(model)
        table = head_table(get_module(model, path))
        other = table.weight.shape[0], table.hidden_size
        if other != (head.vocab_size, head.hidden_size):
            raise ValueError(
                f"--reference {name}: its head is {other[0]} x {other[1]}, the "
                f"FlashHead's {head.vocab_size} x {head.hidden_size}; name the model "
                "that the folder was converted from"
            )
        if table.quantized:
            raise ValueError(
                f"--reference {name}: its head is quantized ({table.bits} bits); name "
                "an unquantized model"
            )
        reference = Reference.of(name, model, path)
        return replace(reference, exact=source.exact_rows())


@dataclass(frozen=True)
class Head:
    """One of the heads that are compared.

    Attributes:
        name: As tables and figures call it.
        kind: ``"dense"``, ``"flashhead"`` or ``"exact"``.
        bits: Of its rows.
        n_probes: Clusters probed, for a draft where it is exact; ``None`` for a dense
            head.
        stored: Whether it is the FlashHead as it is in the folder.
        rows_read: Rows read per token, centroids included.
        bytes_read: Bytes read per token.
    """

    name: str
    kind: str
    bits: int
    n_probes: int | None
    stored: bool
    rows_read: int
    bytes_read: int


@dataclass(frozen=True)
class Choices:
    """Greedy choices of a head, ``[n]`` each.

    Attributes:
        agree: Whether its best token is the reference's.
        gap: By how much the reference's best logit exceeds that of the head's token.
    """

    agree: np.ndarray
    gap: np.ndarray


@dataclass
class Sums:
    """Running sums over tokens.

    Attributes:
        tokens: How many.
        log_p: Of the reference's log-probability of the actual next token.
        heads: By head, of each of MEASURES and of ``log_q``, its log-probability.
    """

    tokens: int = 0
    log_p: float = 0.0
    heads: dict[str, dict[str, float]] = field(default_factory=dict)

    def add(self, other: Sums) -> None:
        """Count the tokens of another text, too."""
        self.tokens += other.tokens
        self.log_p += other.log_p
        for name, values in other.heads.items():
            mine = self.heads.setdefault(name, dict.fromkeys(values, 0.0))
            for key, value in values.items():
                mine[key] += value

    def figures(self) -> dict[str, Any]:
        """Means: ``tokens``, the ``reference``'s perplexity, and by head MEASURES,
        ``perplexity`` and ``perplexity_ratio``, the head's over the reference's."""
        heads = {}
        for name, values in self.heads.items():
            means = {key: values[key] / self.tokens for key in MEASURES}
            means["perplexity"] = _exp(-values["log_q"] / self.tokens)
            means["perplexity_ratio"] = _exp(
                (self.log_p - values["log_q"]) / self.tokens
            )
            heads[name] = means
        reference = {"perplexity": _exp(-self.log_p / self.tokens)}
        return {"tokens": self.tokens, "reference": reference, "heads": heads}


def _exp(x: float) -> float:
    return float(np.exp(min(x, 700.0)))


class Comparison:
    """Dense heads of DENSE_BITS and a FlashHead, against a reference.

    Args:
        head: The FlashHead.
        reference: The unquantized head that it stands for.
        n_probes: Numbers of probes to compare beside the stored one. Default: LADDER
          times it.
        exact: The rows ``[V, D]`` that verify in exact decoding, and how it drafts;
          ``None`` leaves it out.

    Attributes:
        heads: What is compared.

    Raises:
        ValueError: A number of probes does not fit the FlashHead.
    """

    def __init__(
        self,
        head: FlashHead,
        reference: Reference,
        n_probes: Sequence[int] | None = None,
        exact: tuple[Table, Draft] | None = None,
    ):
        self._head = head
        self._order = row_order(head)
        order = mx.array(self._order)

        def logits(table: Table) -> Logits:
            bias = None if reference.bias is None else reference.bias[self._order]
            return Logits(head, table.map(lambda a: a[order]), bias)

        self._reference = logits(reference.exact or reference.table)
        self._dense: dict[str, Logits] = {}
        self._flash: dict[str, int] = {}
        self.heads: list[Head] = []
        d = head.hidden_size
        group_size = DENSE_GROUP_SIZE if d % DENSE_GROUP_SIZE == 0 else 32
        # mlx-lm leaves rows that no group fits as they are.
        for bits in DENSE_BITS if d % group_size == 0 else ():
            table = Table.from_dense(reference.table.weight, bits, group_size)
            name = f"dense {bits}-bit"
            self._dense[name] = logits(table)
            self.heads.append(
                Head(name, "dense", bits, None, False, head.vocab_size, table.nbytes)
            )
        self._stored = stored_logits(head)
        self._centroid_logits = centroid_logits(head)
        stored = head.n_probes
        for p in ladder(head) if n_probes is None else sorted({stored, *n_probes}):
            name = f"FlashHead {p}"
            try:
                head.n_probes = p
                self._flash[name] = p
                read = head.rows_read(), head.bytes_read()
            finally:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    head.n_probes = stored
            self.heads.append(
                Head(name, "flashhead", head.rows.bits, p, p == stored, *read)
            )
        self._exact: tuple[Logits, int] | None = None
        if exact is not None:
            table, draft = exact
            self._exact = logits(table), draft.n_probes
            # For each token: those of its draft, and its share of a verification.
            read = (
                head.n_clusters
                + draft.n_probes * head.cluster_size
                + head.vocab_size // draft.verify_every,
                int(bytes_per_token(head, table.nbytes, draft)),
            )
            self.heads.append(
                Head(EXACT, "exact", table.bits, draft.n_probes, True, *read)
            )

    def _each(
        self, h: np.ndarray
    ) -> Iterator[
        tuple[str, Truth, HeadLogits, np.ndarray, np.ndarray | None, np.ndarray]
    ]:
        """Name, reference, head, what counts with its own logits, estimated log-masses
        and what is probed, of each head for states ``[n, D]``."""
        truth = Truth(self._reference(h))
        everything = np.ones((len(h), self._head.n_clusters), bool)
        for name, logits in self._dense.items():
            yield name, truth, HeadLogits(logits(h)), everything, None, everything
        other = HeadLogits(self._stored(h))
        scores = self._centroid_logits(h)
        log_masses = np.array(masses.log_masses(self._head, scores))
        for name, p in self._flash.items():
            probes = self._head.select(scores, p)
            probed = probed_clusters(probes, self._head.n_clusters)
            yield name, truth, other, probed, log_masses, probed
        if self._exact is not None:
            verifying, p = self._exact
            drafted = probed_clusters(
                self._head.select(scores, p), self._head.n_clusters
            )
            yield EXACT, truth, HeadLogits(verifying(h)), everything, None, drafted

    def _blocks(self, states: np.ndarray) -> Iterator[slice]:
        return blocks(len(states), len(self._order))

    def measure(self, states: np.ndarray, tokens: np.ndarray) -> Sums:
        """Compare the heads on states.

        Args:
            states: float32 ``[n, D]``.
            tokens: The token that came after each, ints ``[n]``.
        """
        sums = Sums(len(states))
        for s in self._blocks(states):
            h = states[s]
            positions = np.array(self._head.positions[mx.array(tokens[s], mx.uint32)])
            positions = positions.astype(np.int64)
            log_p = 0.0
            for name, truth, other, counted, log_masses, probed in self._each(h):
                implied = Implied(truth, other, counted, log_masses)
                values = {
                    "recall": truth.recall(probed),
                    "top10_recall": truth.top_recall(probed),
                    "agreement": other.best(counted) == truth.best,
                    "probed_mass": implied.probed_mass,
                    "kl": implied.kl(),
                    "total_variation": implied.total_variation(),
                    "log_q": implied.log_q(positions),
                }
                totals = {k: float(np.sum(v, dtype=float)) for k, v in values.items()}
                sums.add(Sums(heads={name: totals}))
                log_p = float(truth.log_p(positions).sum())
            sums.log_p += log_p
        return sums

    def choose(self, states: np.ndarray) -> dict[str, Choices]:
        """The greedy choice of each head on states ``[n, D]``."""
        parts: dict[str, list[Choices]] = {}
        for s in self._blocks(states):
            for name, truth, other, counted, *_ in self._each(states[s]):
                best = other.best(counted)
                choices = Choices(best == truth.best, truth.gap(best))
                parts.setdefault(name, []).append(choices)
        return {
            name: Choices(
                np.concatenate([c.agree for c in other]),
                np.concatenate([c.gap for c in other]),
            )
            for name, other in parts.items()
        }

    def best(self, state: np.ndarray) -> int:
        """The reference's best token for a state ``[1, D]``."""
        return int(self._order[Truth(self._reference(state)).best[0]])


def ladder(head: FlashHead) -> list[int]:
    """LADDER times the stored number of probes, as far as it makes sense: no more than
    there are clusters, and twice those that are probed always, or more."""
    always = head.n_always
    steps = {min(int(head.n_probes * x), head.n_clusters) for x in LADDER}
    return sorted({head.n_probes} | {p for p in steps if p >= max(1, 2 * always)})


def continue_greedily(
    model: nn.Module,
    head_path: str,
    prompt: Sequence[int],
    best: Callable[[np.ndarray], int],
    *,
    max_tokens: int,
    stop_tokens: Sequence[int] = (),
) -> tuple[list[int], np.ndarray]:
    """Decode with a head of one's own.

    Args:
        model: An mlx-lm model; its body makes the states.
        head_path: Where its head is.
        prompt: Ids.
        best: Token for a state ``[1, D]``.
        max_tokens: Longest continuation.
        stop_tokens: Ids that end it.

    Returns:
        The tokens, a stop token included, and the state before each, float32
        ``[n, D]``.
    """
    seen: list[mx.array] = []

    def answer(x: mx.array) -> mx.array:
        seen.append(x[:, -1])
        return mx.zeros((*x.shape[:-1], 1), x.dtype)

    cache = make_prompt_cache(model)
    tokens: list[int] = []
    states = []
    following = list(prompt)
    with answering(model, head_path, answer):
        while len(tokens) < max_tokens and not (tokens and tokens[-1] in stop_tokens):
            model(mx.array([following]), cache=cache)
            states.append(np.array(seen.pop().astype(mx.float32)))
            tokens.append(best(states[-1]))
            following = tokens[-1:]
    return tokens, np.concatenate(states)


@dataclass
class Continuations:
    """Where a head's greedy continuations first differ from the reference's.

    Up to there both have the same tokens behind them and so the same states: the
    head's choices on the reference's states tell it.

    Attributes:
        first_difference: By prompt, the first token that differs, from 1; ``None``
          where none does.
        gap: By prompt, what the reference's logits of the two tokens differ by there.
    """

    first_difference: list[int | None] = field(default_factory=list)
    gap: list[float | None] = field(default_factory=list)

    def add(self, choices: Choices) -> None:
        """Count one more prompt."""
        differs = np.flatnonzero(~choices.agree)
        first = int(differs[0]) if len(differs) else None
        self.first_difference.append(None if first is None else first + 1)
        self.gap.append(None if first is None else float(choices.gap[first]))

    def figures(self) -> dict[str, Any]:
        """What is reported, for JSON; shares are of 1."""
        firsts = [f for f in self.first_difference if f is not None]
        ties = sum(g is not None and g <= NEAR_TIE for g in self.gap)
        n = len(self.first_difference)
        return {
            "prompts": n,
            "identical": (n - len(firsts)) / n,
            "median_first_difference": float(np.median(firsts)) if firsts else None,
            "near_ties": ties / len(firsts) if firsts else None,
            "near_tie_margin": NEAR_TIE,
            "first_difference": self.first_difference,
            "gap": self.gap,
        }
