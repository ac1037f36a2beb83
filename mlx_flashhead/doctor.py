"""``mlx_flashhead.doctor``: checks the kernels on this machine."""

from .kernels.doctor import main

if __name__ == "__main__":
    main(prog_name="mlx_flashhead.doctor")
