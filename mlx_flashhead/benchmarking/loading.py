"""How long a folder takes to open, in a process of its own.

    python -m mlx_flashhead.benchmarking.loading FOLDER WAY [FLASHHEAD]

``WAY`` is ``stock`` (``mlx_lm.load``), ``dense``, ``flash`` or ``approximate``
(``mlx_flashhead.load`` with the dense head, and with FlashHead, exact or not);
``, lazy`` after it leaves the weights on disk. ``FLASHHEAD`` is a FlashHead's file,
where the folder has none or another is wanted.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import TypedDict

WAYS = ("stock", "dense", "flash", "approximate")


class Opening(TypedDict):
    """What it took to open a folder once.

    Attributes:
        seconds: Time to open it, tokenizer included.
        cpu_seconds: The same of the processor, which other work changes less.
        tokenizer: Seconds of the tokenizer alone, read once more.
        peak_bytes: Greatest memory use of MLX.
    """

    seconds: float
    cpu_seconds: float
    tokenizer: float
    peak_bytes: int


def measure(folder: str, way: str, flashhead: str | None = None) -> Opening:
    """Open a folder in one of ``WAYS``, and time it. The imports come before, and the
    disk's cache is as it is."""
    import mlx.core as mx
    import mlx_lm

    import mlx_flashhead

    way, _, option = way.partition(", ")
    lazy = option == "lazy"
    mx.eval(mx.zeros(1))
    begin, cpu_begin = time.perf_counter(), time.process_time()
    if way == "stock":
        mlx_lm.load(folder, lazy=lazy)
    else:
        mlx_flashhead.load(
            folder,
            dense=way == "dense",
            exact=way != "approximate",
            flashhead=flashhead,
            lazy=lazy,
        )
    seconds = time.perf_counter() - begin
    cpu_seconds = time.process_time() - cpu_begin
    peak = mx.get_peak_memory()
    begin = time.perf_counter()
    mlx_lm.utils.load_tokenizer(folder)
    tokenizer = time.perf_counter() - begin
    return {
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "tokenizer": tokenizer,
        "peak_bytes": peak,
    }


def in_turn(
    folders: Sequence[str],
    ways: Sequence[str],
    repeats: int,
    flashhead: str | None = None,
) -> dict[tuple[str, str], list[Opening]]:
    """:func:`measure` of folders and ways, with the FlashHead that is given, in turn,
    by ``(folder, way)``: a list of ``repeats`` each. A first round, which fills the
    disk's cache, is dropped.

    Raises:
        RuntimeError: A folder does not open.
    """
    openings: dict[tuple[str, str], list[Opening]] = {
        (f, w): [] for f in folders for w in ways
    }
    for repeat in range(repeats + 1):
        for folder, way in openings:
            command = [sys.executable, "-m", __name__, folder, way]
            command += [] if flashhead is None else [flashhead]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                last = done.stderr.strip().splitlines()[-1:]
                raise RuntimeError(f"{folder} does not open: {' '.join(last)}")
            if repeat:
                openings[folder, way].append(json.loads(done.stdout.splitlines()[-1]))
    return openings


if __name__ == "__main__":
    print(json.dumps(measure(*sys.argv[1:])))
