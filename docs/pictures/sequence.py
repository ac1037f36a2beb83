"""Eight tokens: dense, exact, and exact with a miss.

Widths are the megabytes that are read, with the sizes of Gemma 3 270M and all weights
in 8 bits; launches and the host take time besides.
"""

from __future__ import annotations

from drawing import FLASH, IDLE, INK, READ, Picture, paper, say
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle
from retrieval import megabytes, row_bytes

BODY_ROWS = 156_704  # as many weights as the body has, in rows of D
N_TOKENS = 8
MISS = 5
BODY, DENSE, DRAFT = IDLE, READ, FLASH


def widths() -> tuple[float, float, float]:
    """Megabytes of the body, of the dense head and of FlashHead."""
    mb = megabytes()
    body = BODY_ROWS * row_bytes(8) / 1e6
    return body, mb["dense"], mb["centroids"] + mb["rows"]


class Line:
    """Blocks from left to right."""

    def __init__(self, ax: Axes, y: float, name: str):
        self.ax, self.y, self.x = ax, y, 0.0
        say(ax, 0, y + 0.7, name, ha="left", fontsize=11, weight="bold")

    def block(self, width: float, color: str, text: str = "", wasted=False) -> None:
        """A block of so many megabytes; hatched where it is thrown away."""
        self.ax.add_patch(
            Rectangle(
                (self.x, self.y),
                width,
                0.5,
                facecolor=color,
                edgecolor="white",
                lw=0.8,
                hatch="////" if wasted else None,
            )
        )
        ink = INK if color == BODY else "white"
        say(self.ax, self.x + width / 2, self.y + 0.24, text, color=ink, fontsize=8.5)
        self.x += width

    def total(self) -> str:
        """What all of it reads."""
        text = f"{self.x:,.0f} MB"
        say(self.ax, self.x + 25, self.y + 0.24, text, ha="left")
        return text


def draw() -> Picture:
    """The picture."""
    body, dense, draft = widths()
    figure = paper(10, 4.2)
    ax = figure.add_axes((0.02, 0.02, 0.96, 0.96))
    ax.axis("off")

    line = Line(ax, 3.3, "Dense: each token reads all rows of the head")
    for i in range(N_TOKENS):
        line.block(body, BODY, str(i + 1))
        line.block(dense, DENSE)
    totals = [line.total()]
    ax.set(xlim=(-10, line.x + 260), ylim=(-0.75, 4.3))

    line = Line(ax, 1.9, f"Exact: {N_TOKENS} drafted, one dense product verifies them")
    for i in range(N_TOKENS):
        line.block(body, BODY, str(i + 1))
        # The last one's successor is the verification's own choice.
        if i < N_TOKENS - 1:
            line.block(draft, DRAFT)
    line.block(dense, DENSE, "verify")
    totals.append(line.total())

    line = Line(
        ax,
        0.5,
        f"With a miss: token {MISS + 1} was drafted otherwise, so what follows is "
        "undone and drafted again",
    )
    for i in range(N_TOKENS):
        line.block(body, BODY, str(i + 1), wasted=i >= MISS)
        if i < N_TOKENS - 1:
            line.block(draft, DRAFT, wasted=i >= MISS)
    line.block(dense, DENSE, "verify")
    for i in range(MISS, N_TOKENS):
        line.block(body, BODY, str(i + 1))
        if i < N_TOKENS - 1:
            line.block(draft, DRAFT)
    line.block(dense, DENSE, "verify")
    totals.append(line.total())

    at = 0.0
    for color, text in (
        (BODY, f"body, {body:.0f} MB"),
        (DENSE, f"dense head, {dense:.0f} MB"),
        (DRAFT, f"FlashHead, {draft:.0f} MB"),
    ):
        ax.add_patch(Rectangle((at, -0.5), 50, 0.3, facecolor=color))
        say(ax, at + 65, -0.36, text, ha="left", fontsize=9.5)
        at += 560
    ax.add_patch(
        Rectangle((at, -0.5), 50, 0.3, facecolor=BODY, edgecolor="white", hatch="////")
    )
    say(ax, at + 65, -0.36, "thrown away", ha="left", fontsize=9.5)
    return Picture(
        figure,
        f"{N_TOKENS} tokens of Gemma 3 270M read {totals[0]} with the dense head, "
        f"{totals[1]} decoded exactly, and {totals[2]} with a miss.",
    )
