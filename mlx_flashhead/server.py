"""``mlx_flashhead.server``: mlx-lm's ``server`` with FlashHead."""

from http.server import ThreadingHTTPServer

from .run import command

# Clients that connect at the same moment wait in this queue. Python's is 5 long: of 32
# streaming clients, some were turned away.
ThreadingHTTPServer.request_queue_size = 128

main = command(
    "mlx_flashhead.server",
    "mlx_lm.server",
    "Serve converted models over HTTP: mlx_lm.server with FlashHead.",
)

if __name__ == "__main__":
    main(prog_name="mlx_flashhead.server")
