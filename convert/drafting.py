"""How exact decoding is to draft: chosen by the bytes of each token that it keeps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

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


def search(
    head: FlashHead,
    weight: np.ndarray,
    states: np.ndarray,
    bias: np.ndarray | None = None,
    step: Callable[[], None] = lambda: None,
) -> list[Found]:
    """What one in ONE_IN of the clusters finds.

    Args:
        head: The head.
        weight: Rows of the dense head, float32 ``[V, D]``.
        states: Hidden states, float32 ``[n, D]``.
        bias: The dense head's bias, float32 ``[V]``.
        step: Called after each of :func:`~.fidelity.n_blocks` blocks.
    """
    order = row_order(head)
    logits = Logits(head, weight[order], None if bias is None else bias[order])
    of_centroids, spread = centroid_logits(head), np.array(head.spread)
    c, least_p = head.n_clusters, max(1, 2 * head.n_always)
    ps = sorted({min(c, max(least_p, c // n)) for n in ONE_IN})
    found = []
    for s in blocks(len(states), len(order)):
        true = logits(states[s])
        best = Truth(true).best // head.cluster_size
        mass = Truth(true / TEMPERATURE).cluster_p
        scores = np.array(of_centroids(states[s])) + spread
        own = np.take_along_axis(scores, best[:, None], axis=1)[:, 0]
        # The least score that is probed, for each number of probes.
        at = [c - p for p in ps]
        least = np.partition(scores, at, axis=1)[:, at].T
        sums = [np.sum(mass, axis=1, where=scores >= t[:, None]) for t in least]
        found.append(np.stack([own >= least, sums]))
        step()
    # Of n states one more than was seen may miss.
    whole = np.concatenate(found, axis=2)
    best_share, mass_share = (whole.sum(axis=2) + 1) / (whole.shape[2] + 2)
    return [
        Found(p, float(b), float(m))
        for p, b, m in zip(ps, best_share, mass_share, strict=True)
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
        found: What :func:`search` says.
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
