"""What is kept between runs, in the user's cache folder."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

# A file that changed within these many seconds may change again without its time
# telling: file systems keep it to a clock tick, or to two seconds.
_UNSETTLED = 2.0


def cache_folder() -> Path:
    """Where models converted on first use, and what was found of files, are kept:
    ``MLX_FLASHHEAD_CACHE``, or the user's cache folder."""
    if folder := os.environ.get("MLX_FLASHHEAD_CACHE"):
        return Path(folder)
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "mlx-flashhead"


def remembered(files: Sequence[Path], what: str, compute: Callable[[], str]) -> str:
    """``compute()``, or what it gave before for the same files.

    Files are the same while their device, inode, size and times of change are: writing
    to a file, or replacing it, changes these whatever its name. A cache that cannot be
    read or written is done without.

    Args:
        files: What the answer depends on; at least one.
        what: Name of the answer, of letters, digits and underscores.
        compute: Gives it, from the files alone.

    Raises:
        OSError: A file cannot be read.
    """
    state = _state(files)
    entry = cache_folder() / "checked" / f"{what}-{state[0][0]:x}-{state[0][1]:x}.json"
    with contextlib.suppress(OSError, ValueError, RecursionError):
        known = json.loads(entry.read_text(encoding="utf-8"))
        if isinstance(known, dict) and known.get("state") == state:
            value = known.get("value")
            if isinstance(value, str):
                return value
    value = compute()
    settled = time.time() - max(s[4] for s in state) / 1e9 > _UNSETTLED
    if settled and _state(files) == state:
        with contextlib.suppress(OSError):
            write(entry, json.dumps({"state": state, "value": value}))
    return value


def file_sha256(file: Path) -> str:
    """SHA-256 of a file's bytes, computed once per state of the file.

    Raises:
        OSError: It cannot be read.
    """

    def compute() -> str:
        with file.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()

    return remembered([file], "sha256", compute)


def _state(files: Sequence[Path]) -> list[list[int]]:
    states = [os.stat(file) for file in files]
    return [
        [s.st_dev, s.st_ino, s.st_size, s.st_mtime_ns, s.st_ctime_ns] for s in states
    ]


def write(file: Path, text: str) -> None:
    """Write a file of the cache whole or not at all, whoever else writes it."""
    file.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=file.parent)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as stream:
            stream.write(text)
        os.replace(name, file)
    except OSError:
        os.unlink(name)
        raise
