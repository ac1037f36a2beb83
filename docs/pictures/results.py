"""Figures as benchmarks/RESULTS.md has them, so that nobody types them twice."""

from __future__ import annotations

import re
from pathlib import Path

FILE = Path(__file__).parents[2] / "benchmarks/RESULTS.md"


def section(heading: str) -> str:
    """The text of a second-level section.

    Raises:
        ValueError: There is none.
    """
    text = FILE.read_text(encoding="utf-8")
    found = re.search(rf"^## {re.escape(heading)}\n(.*?)(?=^## |\Z)", text, re.M | re.S)
    if found is None:
        raise ValueError(f'{FILE}: no section "{heading}"; name it as it is now')
    return found[1]


def table(text: str) -> list[dict[str, str]]:
    """Rows of the first markdown table, cells by the column's title."""
    lines = re.search(r"(?:^\|.*\n)+", text, re.M)
    assert lines is not None, f"{FILE}: no table where one is expected"
    head, _, *rows = (
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in lines[0].splitlines()
    )
    return [dict(zip(head, row, strict=True)) for row in rows]


def evaluation(text: str, label: str) -> dict[str, dict[str, float]]:
    """What ``mlx_flashhead.evaluate`` printed over all texts, in the block below a
    label: by head, its figures by the column's title.

    Raises:
        ValueError: There is no such block.
    """
    block = re.search(rf"{re.escape(label)}:\n\n```\n(.*?)^```", text, re.M | re.S)
    if block is None:
        raise ValueError(f'{FILE}: no block below "{label}:"; label it as it is now')
    # The last table of the texts is the one over all.
    overall = re.split(r"^overall: .*\n", block[1], flags=re.M)[-1]
    head, *lines = overall.split("\n\n")[0].splitlines()
    titles = head.split()[1:]
    found = {}
    for line in lines:
        row = re.fullmatch(r"(.+?)(?: \*)?\s+([\d.]+)%\s+(.+)", line)
        assert row is not None, f"{FILE}: {line}"
        name, *figures = row[1], row[2], *row[3].split()
        found[name] = dict(zip(titles, map(float, figures)))
    return found
