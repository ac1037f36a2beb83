"""What the pictures have in common: colours, text, axes, and how they are kept."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

READ, FLASH, TAIL, IDLE = "#1f6fb4", "#d9822b", "#3c9d5b", "#dfe3e8"
INK, FAINT = "#1c2733", "#66727f"


class Picture(NamedTuple):
    """A figure, and what it shows in words: for who does not see it, and for tests."""

    figure: Figure
    words: str

    def save(self, path: Path) -> None:
        """Write it: the same file each time, without a date and random names."""
        about = {"Date": None, "Description": self.words}
        with matplotlib.rc_context({"svg.hashsalt": "flashhead"}):
            self.figure.savefig(path, metadata=about)


def paper(width: float, height: float) -> Figure:
    """A figure of so many inches, white, so that a dark page does not swallow it."""
    return Figure((width, height), facecolor="white")


def say(ax: Axes, x: float, y: float, text: str, **options) -> None:
    """Text, by default centred."""
    options = {"color": INK, "ha": "center", "va": "center", "fontsize": 10} | options
    ax.text(x, y, text, **options)


def plain(ax: Axes, grid: str) -> None:
    """Axes of a chart: no frame, and a faint grid along "x", "y" or "both"."""
    ax.spines[:].set_visible(False)
    ax.grid(axis=grid, color=IDLE, lw=0.8)
    ax.set_axisbelow(True)
    ax.tick_params(length=0, labelcolor=INK, labelsize=9)


def bars(ax: Axes, values: Sequence[float], i: int, n: int, **options) -> list[float]:
    """In each group of n bars, from top to bottom, the i-th. Returns where they are."""
    height = 0.8 / n
    at = [group + (i - (n - 1) / 2) * height for group in range(len(values))]
    ax.barh(at, values, height, **options)
    return at


def name_groups(ax: Axes, names: Sequence[str]) -> None:
    """Names of the groups, the first one on top."""
    ax.set_yticks(range(len(names)), names)
    ax.set_ylim(len(names) - 0.5, -0.5)


def legend(figure: Figure, ax: Axes) -> None:
    """The legend of axes, below everything."""
    handles, labels = ax.get_legend_handles_labels()
    figure.legend(
        *(handles, labels),
        **{"loc": "lower center", "ncols": len(labels), "frameon": False},
        labelcolor=INK,
    )
