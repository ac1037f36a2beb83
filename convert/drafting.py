"""How exact decoding is to draft: chosen by the bytes of each token that it keeps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from mlx_flashhead.compute.linalg import blocks
from mlx_flashhead.evaluation.drafts import bytes_per_token
from mlx_flashhead.evaluation.fidelity import Logits, Truth, centroid_logits, row_order
from mlx_flashhead.folder.section import Draft
from mlx_flashhead.head import FlashHead

# Numbers of clusters that are tried: one in so many.
ONE_IN = (4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128)
# Numbers of positions that one dense product verifies. From 6 to 12 on, by size, Metal
# reads the rows once for all of them.
VERIFY_EVERY = (16, 32)
# Fewer positions that cost no more than this are preferred: text appears sooner.
WORTH = 1.05
# Half of the texts that a draft is chosen for are sampled, at this temperature.
TEMPERATURE = 0.8


@dataclass(frozen=True)
class Found:
    """What a number of probes finds of what the dense head wants, 0 to 1.

    Attributes:
        n_probes: Clusters probed.
        best: Share of states whose best token is probed.
        mass: Mean probability of what is probed, at TEMPERATURE.
    """

    n_probes: int
    best: float
    mass: float


class Search:
    """What one in ONE_IN of the clusters finds, on text and on a model's own answers,
    which count alike.

    Args:
        head: The head.
    """

    def __init__(self, head: FlashHead):
        c, least_p = head.n_clusters, max(1, 2 * head.n_always)
        self._head = head
        self._ps = sorted({min(c, max(least_p, c // n)) for n in ONE_IN})
        self._spread = np.array(head.spread)
        self._seen: dict[bool, list[np.ndarray]] = {False: [], True: []}

    def look(self, truth: Truth, scores: mx.array, answers: bool = False) -> None:
        """See what the dense head makes of some states, and the scores ``[n, C]`` of
        the centroids."""
        c = self._head.n_clusters
        best = truth.best // self._head.cluster_size
        mass = Truth(truth.logits / TEMPERATURE).cluster_p
        total = np.array(scores) + self._spread
        own = np.take_along_axis(total, best[:, None], axis=1)[:, 0]
        # The least score that is probed, for each number of probes.
        at = [c - p for p in self._ps]
        least = np.partition(total, at, axis=1)[:, at].T
        sums = [(mass * (total >= t[:, None])).sum(axis=1) for t in least]
        self._seen[answers].append(np.stack([own >= least, sums]))

    def read(
        self,
        weight: np.ndarray,
        states: np.ndarray,
        bias: np.ndarray | None = None,
        step: Callable[[], None] = lambda: None,
    ) -> None:
        """See answers.

        Args:
            weight: Rows of the dense head, float32 ``[V, D]``.
            states: Hidden states, float32 ``[n, D]``.
            bias: The dense head's bias, float32 ``[V]``.
            step: Called after each of :func:`~.fidelity.n_blocks` blocks.
        """
        if not len(states):
            return
        order = row_order(self._head)
        bias = None if bias is None else bias[order]
        logits = Logits(self._head, weight[order], bias)
        scores = centroid_logits(self._head)
        for s in blocks(len(states), len(order)):
            self.look(Truth(logits(states[s])), scores(states[s]), answers=True)
            step()

    def found(self) -> list[Found]:
        """What each number of probes finds."""
        kinds = [np.concatenate(seen, 2) for seen in self._seen.values() if seen]
        # Of n states one more than was seen may miss.
        n = sum(seen.shape[2] for seen in kinds)
        mean = np.mean([seen.mean(axis=2) for seen in kinds], axis=0)
        best_share, mass_share = (mean * n + 1) / (n + 2)
        return [
            Found(p, float(b), float(m))
            for p, b, m in zip(self._ps, best_share, mass_share, strict=True)
        ]


def choose(
    head: FlashHead,
    found: Sequence[Found],
    dense_bytes: int,
    body_bytes: int,
    rows: str = "model",
) -> Draft:
    """The draft that reads the fewest bytes for each token that is kept, steps of the
    body that are thrown away included.

    Args:
        head: The head.
        found: What :meth:`Search.found` says.
        dense_bytes: Bytes of the rows that verify.
        body_bytes: Bytes of the rest of the model.
        rows: As in :class:`Draft`.
    """

    def cost(f: Found, k: int) -> float:
        drafts = (Draft(f.n_probes, k, share) for share in (f.best, f.mass))
        return sum(bytes_per_token(head, dense_bytes, d, body_bytes) for d in drafts)

    of_each = {k: min((cost(f, k), f.n_probes) for f in found) for k in VERIFY_EVERY}
    least = min(of_each.values())[0]
    k = next(k for k in VERIFY_EVERY if of_each[k][0] <= WORTH * least)
    best = next(f for f in found if f.n_probes == of_each[k][1])
    return Draft(best.n_probes, k, best.best, rows)
