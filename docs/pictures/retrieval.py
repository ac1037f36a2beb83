"""What FlashHead does, with Gemma 3 270M's sizes.

The megabytes follow from the sizes: rows of 8 bits, centroids of 4, a scale and an
offset of 16 bits for every 64 weights, one float for every bonus.
"""

from __future__ import annotations

from drawing import FLASH, IDLE, INK, READ, TAIL, Picture, paper, say
from matplotlib.axes import Axes
from matplotlib.patches import FancyArrowPatch, PathPatch, Rectangle
from matplotlib.path import Path

V, D = 262_144, 640
CLUSTER_SIZE = 16
C = V // CLUSTER_SIZE
P = C // 16
GROUP_SIZE = 64

# One drawn cluster in 16 is probed, as in the model.
COLUMNS, LINES = 12, 16
PROBED = {(0, 2), (1, 9), (2, 5), (3, 13), (5, 3), (5, 4), (6, 11), (7, 7)} | {
    (8, 1),
    (9, 12),
    (10, 6),
    (11, 10),
}
DRAWN_FROM_TAIL = (4, 8)


def row_bytes(bits: int) -> float:
    """Bytes of one row of D weights."""
    return D * bits / 8 + D / GROUP_SIZE * 4


def megabytes() -> dict[str, float]:
    """What a decoded token reads, in MB."""
    return {
        "dense": V * row_bytes(8) / 1e6,
        "centroids": C * (row_bytes(4) + 4) / 1e6,
        "rows": P * CLUSTER_SIZE * row_bytes(8) / 1e6,
    }


def _arrow(ax: Axes, start: tuple[float, float], end: tuple[float, float]) -> None:
    style = {"arrowstyle": "-|>", "mutation_scale": 12, "color": INK, "lw": 1.2}
    ax.add_patch(FancyArrowPatch(start, end, **style))


def _cells(ax: Axes, left: float, bottom: float, color_of) -> None:
    """The vocabulary as a grid of clusters, 4 wide and 5 high."""
    wide, high = 4 / COLUMNS, 5 / LINES
    cells: dict[str, list[Path]] = {}
    for column in range(COLUMNS):
        for line in range(LINES):
            x, y = left + column * wide, bottom + line * high
            r, t = x + 0.82 * wide, y + 0.78 * high
            cell = Path([(x, y), (r, y), (r, t), (x, t), (x, y)], closed=True)
            cells.setdefault(color_of((column, line)), []).append(cell)
    # One path for each colour: the file stays small.
    for color, paths in cells.items():
        whole = Path.make_compound_path(*paths)
        ax.add_patch(PathPatch(whole, facecolor=color, lw=0))


def _state(ax: Axes, x: float, y: float) -> None:
    ax.add_patch(Rectangle((x, y - 0.9), 0.28, 1.8, facecolor="white", edgecolor=INK))
    say(ax, x + 0.14, y, "h")


def draw() -> Picture:
    """The picture."""
    mb = megabytes()
    figure = paper(10, 4.5)
    ax = figure.add_axes((0, 0, 1, 1))
    ax.set(xlim=(0, 20), ylim=(0, 9))
    ax.axis("off")

    say(ax, 3.9, 8.4, "Dense head", fontsize=14, weight="bold")
    _state(ax, 0.5, 4.5)
    _arrow(ax, (0.9, 4.5), (1.65, 4.5))
    _cells(ax, 1.8, 2, lambda _: READ)
    _arrow(ax, (5.85, 4.5), (6.6, 4.5))
    say(ax, 7.1, 4.5, "token")
    say(ax, 3.8, 7.5, f"all {V:,} rows")
    say(ax, 3.9, 0.8, f"{mb['dense']:.1f} MB a token", fontsize=14, color=READ)

    ax.plot([8.1, 8.1], [0.5, 8.6], color=IDLE, lw=1.2)

    say(ax, 14.2, 8.4, "FlashHead", fontsize=14, weight="bold")
    _state(ax, 8.7, 4.5)
    _arrow(ax, (9.1, 4.5), (9.85, 4.5))
    for line in range(LINES):
        corner = (10, 2 + line * 5 / LINES)
        ax.add_patch(Rectangle(corner, 0.8, 0.78 * 5 / LINES, color=FLASH, lw=0))
    say(ax, 10.4, 7.5, f"1. all {C:,}\ncentroids", fontsize=9.5)
    say(ax, 10.4, 1.55, f"{mb['centroids']:.1f} MB", color=FLASH)
    _arrow(ax, (10.95, 4.5), (12.25, 4.5))
    say(ax, 11.55, 4.95, "best", fontsize=9)
    say(ax, 11.55, 4.1, f"{P:,}", fontsize=9)

    def color_of(cell: tuple[int, int]) -> str:
        if cell == DRAWN_FROM_TAIL:
            return TAIL
        return READ if cell in PROBED else IDLE

    _cells(ax, 12.4, 2, color_of)
    say(ax, 14.4, 7.5, f"2. the rows of these {P:,}\nclusters of {CLUSTER_SIZE}")
    say(ax, 14.4, 1.55, f"{mb['rows']:.1f} MB", color=READ)
    _arrow(ax, (16.45, 4.5), (17.2, 4.5))
    say(ax, 17.65, 4.5, "token")
    say(
        ax,
        18.25,
        6.5,
        "3. sampling: all else is\none entry, the tail. One\nof its clusters, drawn\n"
        "by mass, is scored, too.",
        color=TAIL,
        fontsize=9,
    )
    total = mb["centroids"] + mb["rows"]
    say(ax, 14.2, 0.8, f"{total:.1f} MB a token", fontsize=14, color=READ)
    return Picture(
        figure,
        f"A decoded token of Gemma 3 270M reads {mb['dense']:.1f} MB with the dense "
        f"head, {total:.1f} MB with FlashHead.",
    )
