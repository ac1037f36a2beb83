"""The device that MLX computes on, and what follows from it."""

from __future__ import annotations

import ctypes
import ctypes.util
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
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


@contextmanager
def side_by_side(n: int) -> Iterator[list[mx.Stream]]:
    """Context with streams that compute side by side, at most n, to be evaluated
    together: on a CPU one for each core, as MLX uses one for all but products, and
    these are not split any further meanwhile. A GPU has one."""
    n = 1 if on_gpu() else min(n, os.cpu_count() or 1)
    if n == 1:
        yield [mx.default_stream(mx.default_device())]
        return
    with _one_thread_a_product():
        yield [mx.new_stream(mx.cpu) for _ in range(n)]


@contextmanager
def _one_thread_a_product() -> Iterator[None]:
    """Context in which OpenBLAS, where MLX uses it, computes a product in its caller's
    thread. Its own threads would be waited for by one caller after another."""
    blas = ctypes.CDLL(None)
    try:
        n = blas.openblas_get_num_threads()
        blas.openblas_set_num_threads(1)
    except AttributeError:
        yield
        return
    try:
        yield
    finally:
        blas.openblas_set_num_threads(n)


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
    there = ctypes.util.find_library("openblas") is not None
    install = "" if there else "apt-get install libopenblas0-pthread, then "
    return (
        "Note: MLX's CPU back-end carries a slow BLAS. For many times the speed: "
        f"{install}run with LD_PRELOAD=libopenblas.so.0"
    )
