"""Record a command's terminal as a picture that plays: docs/pictures/demo.svg.

    python docs/pictures/recording.py [--out FILE.svg] [COMMAND ...]

The command, by default ``make demo``, runs in a terminal of its own; what it
writes appears in the picture as it did then, only waits are cut to a second. Run the
command once before, so that nothing is converted or compiled.
"""

from __future__ import annotations

import os
import pathlib
import pty
import re
import select
import subprocess
import time
from html import escape

import click

FILE = pathlib.Path(__file__).with_name("demo.svg")
DEMO = ("make", "demo")

COLUMNS, FONT_SIZE, LINE = 92, 13, 18
LONGEST_WAIT, STAY = 1.0, 8.0  # seconds
PAPER, INK, PROMPT = "#1c2733", "#e6eaee", "#7fb4e0"
# What moves the cursor or colours is left out.
_CONTROLS = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|\r(?!\n)|\x07")

Piece = tuple[float, str]


def record(command: tuple[str, ...]) -> list[Piece]:
    """Seconds from the start, and what was written then."""
    ours, theirs = pty.openpty()
    environment = os.environ | {"COLUMNS": str(COLUMNS), "TERM": "dumb"}
    process = subprocess.Popen(
        command, stdin=theirs, stdout=theirs, stderr=theirs, env=environment
    )
    os.close(theirs)
    begin, pieces, rest = time.monotonic(), [], b""
    while True:
        ready, _, _ = select.select([ours], [], [], 0.5)
        try:
            read = os.read(ours, 1 << 16) if ready else b""
        except OSError:  # Linux says so that the other end is closed
            break
        if ready and not read:
            break
        text, rest = _decoded(rest + read)
        if text:
            pieces.append((time.monotonic() - begin, text))
    os.close(ours)
    if process.wait():
        said = "".join(text for _, text in pieces)[-500:]
        raise click.ClickException(f"{command[0]} failed: {said}")
    return pieces


def _decoded(data: bytes) -> tuple[str, bytes]:
    """The text of whole characters, and the bytes of one that is not yet."""
    for cut in range(4):
        end = len(data) - cut
        try:
            return data[:end].decode("utf-8"), data[end:]
        except UnicodeDecodeError:
            continue
    return data.decode("utf-8", "replace"), b""


def hurried(pieces: list[Piece]) -> list[Piece]:
    """The same without the longest waits."""
    found, before, now = [], 0.0, 0.0
    for at, text in pieces:
        now += min(at - before, LONGEST_WAIT)
        before = at
        found.append((now, text))
    return found


def lines(pieces: list[Piece]) -> list[list[Piece]]:
    """Pieces by the line of the terminal in which they stand."""
    found: list[list[Piece]] = [[]]
    width = 0
    for at, text in pieces:
        text = _CONTROLS.sub("", text).replace("\r\n", "\n")
        for i, part in enumerate(text.split("\n")):
            if i:
                found.append([])
                width = 0
            while part:
                if width == COLUMNS:
                    found.append([])
                    width = 0
                piece, part = part[: COLUMNS - width], part[COLUMNS - width :]
                width += len(piece)
                found[-1].append((at, piece))
    while found and not found[-1]:
        found.pop()
    return found


def svg(command: tuple[str, ...], pieces: list[Piece]) -> str:
    """A picture that shows the pieces at their times, again and again. Where nothing
    plays, all of it is there."""
    shown = lines(pieces)
    length = (pieces[-1][0] if pieces else 0) + STAY
    width = round(COLUMNS * FONT_SIZE * 0.602) + 32
    height = LINE * (len(shown) + 1) + 34
    times = sorted({at for line in shown for at, _ in line})
    style = "".join(
        f".t{i}{{animation:t{i} {length:.2f}s infinite}}"
        f"@keyframes t{i}{{0%,{100 * at / length:.3f}%{{fill-opacity:0}}"
        f"{100 * at / length + 0.001:.3f}%,100%{{fill-opacity:1}}}}"
        for i, at in enumerate(times)
    )
    rows = [f'<text x="16" y="30" fill="{PROMPT}">$ {escape(" ".join(command))}</text>']
    for n, line in enumerate(shown, 1):
        spans = "".join(
            f'<tspan class="t{times.index(at)}">{escape(text)}</tspan>'
            for at, text in line
        )
        rows.append(f'<text x="16" y="{30 + n * LINE}">{spans}</text>')
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
        f'width="{width}" height="{height}" font-size="{FONT_SIZE}" fill="{INK}" '
        'font-family="ui-monospace,Menlo,Consolas,monospace" xml:space="preserve">'
        f"<style>{style}</style>"
        f'<rect width="{width}" height="{height}" rx="8" fill="{PAPER}"/>'
        f"{''.join(rows)}</svg>\n"
    )


@click.command(context_settings={"ignore_unknown_options": True})
@click.option("--out", default=str(FILE), help="Where to.  [default: beside this]")
@click.argument("command", nargs=-1)
def main(out: str, command: tuple[str, ...]) -> None:
    """Record a command's terminal as a picture that plays."""
    command = command or DEMO
    pieces = hurried(record(command))
    pathlib.Path(out).write_text(svg(command, pieces), encoding="utf-8")


if __name__ == "__main__":
    main()
