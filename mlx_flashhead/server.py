"""``mlx_flashhead.server``: mlx-lm's ``server`` with FlashHead."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from http.server import ThreadingHTTPServer

from .run import command


@contextmanager
def long_queue() -> Iterator[None]:
    """Context in which servers let 128 clients wait that connect at the same moment.
    Python's queue is 5 long: of 32 streaming clients, some were turned away."""
    before = ThreadingHTTPServer.request_queue_size
    ThreadingHTTPServer.request_queue_size = 128
    try:
        yield
    finally:
        ThreadingHTTPServer.request_queue_size = before


main = command(
    "mlx_flashhead.server",
    "mlx_lm.server",
    "Serve converted models over HTTP: mlx_lm.server with FlashHead.",
    around=long_queue,
)

if __name__ == "__main__":
    main(prog_name="mlx_flashhead.server")
