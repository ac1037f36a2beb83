"""What is measured: whole decode steps, host included, by what they are made of."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, NamedTuple

from ..sampling import Settings

What = Literal["dense", "draft", "verify", "stock", "approximate"]
WHATS: tuple[What, ...] = ("dense", "draft", "verify", "stock", "approximate")
# Samplers that take about the same time, those after each other longer in mlx-lm.
KINDS = ("greedy", "sampled", "sorted")


class Cell(NamedTuple):
    """A step of the model, its token included.

    Attributes:
        what: ``"stock"``, a token of each sequence by mlx-lm's dense head and sampler;
            ``"approximate"``, among FlashHead's candidates; of exact decoding
            ``"dense"``, one by the dense product between drafts, ``"draft"``, one that
            is drafted, and ``"verify"``, the last step of a draft and its verification,
            waited for.
        n: Of a draft, the clusters that are probed; of a verification, its positions;
            else the sequences.
    """

    what: What
    n: int


# Seconds of a step.
Times = Mapping[Cell, float]


def kind_of(settings: Settings) -> str:
    """One of ``KINDS``: samplers that take about the same time."""
    return "greedy" if settings.greedy else "sorted" if settings.sorts else "sampled"
