"""The device that MLX computes on, and what follows from it."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn


def on_gpu() -> bool:
    """Whether MLX's default device is a GPU of any number, Metal's or CUDA's."""
    return mx.default_device().type == mx.DeviceType.gpu


def for_device(model: nn.Module) -> nn.Module:
    """Compute in float32 on a CPU, where MLX's 16-bit products are slow; quantized
    weights stay as they are."""
    if not on_gpu():
        model.set_dtype(mx.float32)
    return model


def disable_tf32() -> None:
    """Disable TF32, which truncates float32 inputs to 10 mantissa bits. Call it before
    the first product."""
    os.environ.setdefault("MLX_ENABLE_TF32", "0")


def blas_hint() -> str | None:
    """One line that says how to make MLX fast on a Linux CPU; None where it is, or
    where there is nothing to gain."""
    if platform.system() != "Linux" or on_gpu():
        return None
    maps = Path("/proc/self/maps")
    if not maps.exists() or "libopenblas" in maps.read_text():
        return None
    return (
        "Note: MLX's CPU back-end carries a slow BLAS. For many times the speed: "
        "apt-get install libopenblas0-pthread, then run with "
        "LD_PRELOAD=libopenblas.so.0"
    )
