"""``mlx_flashhead.server``: mlx-lm's ``server`` with FlashHead."""

from .run import command

main = command(
    "mlx_flashhead.server",
    "mlx_lm.server",
    "Serve converted models over HTTP: mlx_lm.server with FlashHead.",
)

if __name__ == "__main__":
    main(prog_name="mlx_flashhead.server")
