"""What tests have to know of the oldest versions that the package allows."""

from __future__ import annotations

import mlx.core as mx
import mlx_lm

# Some of its own functions fail, or lack an argument, where later ones do not.
OLD_MLX_LM = tuple(map(int, mlx_lm.__version__.split(".")[:2])) < (0, 32)


def kernels_need_metal() -> bool:
    """Whether MLX makes no Metal kernel without a Metal back-end, which keeps the
    emulator from it: before 0.32.2, on Linux."""
    try:
        mx.fast.metal_kernel(
            name="nothing", input_names=["x"], output_names=["y"], source=""
        )
    except RuntimeError:
        return True
    return False
