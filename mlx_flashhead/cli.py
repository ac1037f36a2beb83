"""What the commands share."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from typing import Any

import click


@contextlib.contextmanager
def one_line_errors() -> Iterator[None]:
    """Turn what a user can cause into a one-line error."""
    try:
        yield
    except (ValueError, OSError, KeyError, RuntimeError, MemoryError) as e:
        reason = " ".join(str(e).split()) or type(e).__name__
        raise click.ClickException(reason[:600]) from e


def exact_products() -> None:
    """Before the first product: MLX would round the factors of float32 ones to 10 bits
    on a GPU that is faster so."""
    os.environ.setdefault("MLX_ENABLE_TF32", "0")


class Listed(click.ParamType):  # type: ignore[type-arg]  # generic in new versions
    """Values with commas between them."""

    name = "a,b,..."

    def __init__(self, read: Callable[[str], Any]):
        self._read = read

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> Any:
        if not isinstance(value, str):
            return value
        try:
            values = [self._read(word.strip()) for word in value.split(",")]
        except ValueError as e:
            self.fail(f"{value!r}: {e}", param, ctx)
        return tuple(dict.fromkeys(values))
