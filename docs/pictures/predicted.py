"""What benchmarks/predict.py predicts for Apple's chips: tokens per second, greedy."""

from __future__ import annotations

from textwrap import fill

from drawing import (
    FAINT,
    FLASH,
    INK,
    READ,
    Picture,
    bars,
    legend,
    name_groups,
    paper,
    plain,
)
from predict import BODY_BITS, SHOWN, Prediction, by_chip, laws

SAMPLER, BITS = "greedy", 8
COLORS = {"dense": FAINT, "approximate": FLASH, "exact": READ}
LINES = "black lines: from the least to the most that is gained over the dense head"


def intervals(found: Prediction) -> list[tuple[float, float, float]]:
    """Tokens per second, least and most: dense, approximate, exact. What a head gains
    has an interval, the speed of the dense one not."""
    dense, *others = (1e6 / t for t in found.steps)
    gains = (found.approximate, found.exact)
    rest = [(v, *(g * dense for g in gain)) for v, gain in zip(others, gains)]
    return [(dense, dense, dense), *rest]


def draw() -> Picture:
    """The picture."""
    rows = by_chip(laws(), SAMPLER, BITS)
    figure = paper(10, 7)
    panels = figure.subplots(1, len(SHOWN), sharey=True)
    figure.subplots_adjust(0.14, 0.13, 0.985, 0.85, wspace=0.08)
    said = []
    for i, (ax, model) in enumerate(zip(panels, SHOWN)):
        plain(ax, "x")
        ax.set_title(model, fontsize=11, color=INK)
        each = [intervals(predictions[i]) for _, predictions in rows]
        for j, (way, color) in enumerate(COLORS.items()):
            speeds, least, most = zip(*(found[j] for found in each))
            at = bars(ax, speeds, j, len(COLORS), color=color, label=way)
            if way != "dense":
                ax.hlines(at, least, most, color=INK, lw=1.2)
        said += [
            f"{model} on {' or '.join(chips)}: {predictions[i]}"
            for chips, predictions in rows
        ]
        ax.locator_params(axis="x", nbins=4)
    # A chip's name stays in one line.
    joined = (
        ", ".join(c.replace(" ", "\N{NO-BREAK SPACE}") for c in chips)
        for chips, _ in rows
    )
    names = [fill(text, 18) for text in joined]
    name_groups(panels[0], names)
    what = (
        f"tokens per second, {SAMPLER}, body of {BODY_BITS} bits, head of {BITS}, "
        "one sequence"
    )
    figure.text(
        *(0.5, 0.955, "Predicted, not measured"),
        **{"ha": "center", "fontsize": 15, "weight": "bold", "color": "#b3261e"},
    )
    figure.text(0.5, 0.92, what, ha="center", fontsize=11, color=INK)
    legend(figure, panels[0])
    figure.text(0.5, 0.055, LINES, ha="center", fontsize=9, color=INK)
    return Picture(figure, f"Predicted, not measured: {what}. {'; '.join(said)}.")
