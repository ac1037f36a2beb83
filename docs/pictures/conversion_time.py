"""How long conversion takes, by the size of the head: benchmarks/RESULTS.md,
"Conversion"."""

from __future__ import annotations

import re

from drawing import (
    FLASH,
    INK,
    READ,
    Picture,
    bars,
    legend,
    name_groups,
    paper,
    plain,
    say,
)
from results import section, table

SECONDS = {"wall": READ, "processor": FLASH}
LABELS = {"wall": "wall clock", "processor": "processor, all threads"}


def sizes() -> list[tuple[int, str, dict[str, float]]]:
    """V, the row's name, and its seconds; by V."""
    found = []
    for row in table(section("Conversion")):
        if shape := re.search(r"([\d,]+) x [\d,]+", row["size"]):
            seconds = {column: float(row[column]) for column in SECONDS}
            found.append((int(shape[1].replace(",", "")), row["size"], seconds))
    return sorted(found, key=lambda size: size[0])


def draw() -> Picture:
    """The picture."""
    rows = sizes()
    figure = paper(10, 1.4 + 0.6 * len(rows))
    ax = figure.subplots()
    figure.subplots_adjust(0.22, 0.85 / figure.get_figheight(), 0.97, 0.9)
    plain(ax, "x")
    for j, (column, color) in enumerate(SECONDS.items()):
        seconds = [found[column] for *_, found in rows]
        at = bars(ax, seconds, j, len(SECONDS), color=color, label=LABELS[column])
        for y, value in zip(at, seconds):
            say(ax, value, y, f" {value:,.0f} s", ha="left", fontsize=9)
    # A name, if it has one, stands above its sizes.
    name_groups(ax, [re.sub(r"^(\D[^,]*), ", r"\1\n", name) for _, name, _ in rows])
    ax.margins(x=0.08)
    ax.set_xlabel("seconds", color=INK)
    ax.set_title("Conversion, by V x D of the head", fontsize=11, color=INK)
    legend(figure, ax)
    said = [
        f"{name}: {found['wall']:,.0f} s, {found['processor']:,.0f} s of processor"
        for _, name, found in rows
    ]
    return Picture(figure, f"Conversion by vocabulary x width. {'; '.join(said)}.")
