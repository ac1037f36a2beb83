"""Which BLAS MLX's CPU back-end runs on."""

from __future__ import annotations

import platform
from pathlib import Path

import mlx.core as mx


def hint() -> str | None:
    """One line that says how to make MLX fast on a Linux CPU; None where it is, or
    where there is nothing to gain."""
    if platform.system() != "Linux" or mx.default_device() != mx.Device(mx.cpu):
        return None
    maps = Path("/proc/self/maps")
    if not maps.exists() or "libopenblas" in maps.read_text():
        return None
    return (
        "Note: MLX's CPU back-end carries a slow BLAS. For many times the speed: "
        "apt-get install libopenblas0-pthread, then run with "
        "LD_PRELOAD=libopenblas.so.0"
    )
