"""What the converter's recipes do, and its rules for what a user leaves open."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

# Of what a conversion gives: one more where the same input gives another folder, so
# that folders of before are not taken for those of now.
VERSION = 4

# Vocabularies up to this size get clusters of frequent tokens, probed at every step
# and beyond the default number of probes: there a single badly placed frequent token
# costs a point of recall.
SMALL_VOCABULARY = 160_000
# Low ids are frequent: byte-pair ids follow the order of the merges.
N_FREQUENT = 1024


@dataclass(frozen=True)
class Recipe:
    """How a head is clustered.

    Attributes:
        hidden_state_metric: Cluster in the metric of calibration states.
        fitted_centroids: Centroids are fitted to the log-mass of their cluster; else
            they are unit directions.
        spread: Add the calibrated bonus to a cluster's score.
        always: Keep clusters that are probed at every step.
    """

    hidden_state_metric: bool = True
    fitted_centroids: bool = True
    spread: bool = True
    always: bool = True


RECIPES = {
    "default": Recipe(),
    # The plain variant of arXiv 2603.14591, for comparison.
    "paper": Recipe(False, False, False, False),
}


@dataclass(frozen=True)
class Effort:
    """How much a conversion looks at.

    Attributes:
        n_tokens: Tokens of the calibration text, evenly over its documents.
        n_answers, n_answered: A chat model's own answers, and tokens of each, at most.
        n_rounds: Balanced rounds of the clustering.
        n_mass: States, at most, over which a cluster's mean mass is taken.
        n_reported: Held-out states that the report is about, at most.
        n_drafted: States of answers, besides these, by which the draft is chosen.
    """

    n_tokens: int = 8192
    n_answers: int = 64
    n_answered: int = 64
    n_rounds: int = 3
    n_mass: int = 1024
    n_reported: int = 1024
    n_drafted: int = 512


FULL = Effort()
QUICK = Effort(2048, 32, 32, 1, 256, 384, 128)


def always_tokens(
    vocab_size: int, cluster_size: int, n_probes: int, stop_tokens: Sequence[int]
) -> np.ndarray:
    """Tokens in the clusters that are probed at every step: those that end a text,
    so that no answer runs on for want of them, and in small vocabularies the most
    frequent. They take at most half of the probes."""
    n = N_FREQUENT if vocab_size <= SMALL_VOCABULARY else cluster_size
    n = min(max(n, cluster_size), n_probes // 2 * cluster_size)
    stops = [t for t in stop_tokens if 0 <= t < vocab_size]
    return np.array(list(dict.fromkeys([*sorted(stops), *range(vocab_size)]))[:n])


def default_group_size(hidden_size: int) -> int:
    """64 weights per scale where the hidden size allows it, else 32."""
    return 64 if hidden_size % 64 == 0 else 32
