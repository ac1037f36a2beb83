"""What the commands share."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import click


@contextlib.contextmanager
def one_line_errors() -> Iterator[None]:
    """Turn what a user can cause into a one-line error."""
    try:
        yield
    except (ValueError, OSError, KeyError, RuntimeError, MemoryError) as e:
        reason = " ".join(str(e).split()) or type(e).__name__
        raise click.ClickException(reason[:600]) from e
