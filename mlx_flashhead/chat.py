"""``mlx_flashhead.chat``: mlx-lm's ``chat`` with FlashHead."""

from .run import command

main = command(
    "mlx_flashhead.chat",
    "mlx_lm.chat",
    "Chat with a converted model: mlx_lm.chat with FlashHead.",
)

if __name__ == "__main__":
    main(prog_name="mlx_flashhead.chat")
