"""Teach mlx-lm to open folders that have a FlashHead.

Every loader of mlx-lm goes through ``mlx_lm.utils.load_model``. Patched, it puts the
FlashHead in place before anything of the dense head is read from disk.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import os
from pathlib import Path
from typing import Any, Iterator

import mlx.core as mx
import mlx.nn as nn
from mlx_lm import utils

from .attach import HeadNotFound, attach
from .files import CONFIG_KEY, HEAD_FILE, FormatError, head_config, load_head

_stock_load_model = None


class PatchError(RuntimeError):
    """The installed mlx-lm is not one that this package knows."""


def switched_off() -> bool:
    """Whether the environment says ``MLX_FLASHHEAD=0``."""
    return os.environ.get("MLX_FLASHHEAD", "1").lower() in ("0", "false", "off")


def install(model: nn.Module, folder: str | Path, n_probes: int | None) -> nn.Module:
    """Put the FlashHead of a folder into its freshly loaded, lazy model."""
    section = head_config(folder) or {}
    head = load_head(folder, section)
    if n_probes is not None:
        head.n_probes = n_probes
    try:
        return attach(model, section["head_path"], head)
    except HeadNotFound as e:
        raise FormatError(f"{folder}: {e}; convert the model again") from None


def for_device(model: nn.Module) -> nn.Module:
    """Compute in float32 on a CPU, where MLX's 16-bit products are slow; quantized
    weights stay as they are."""
    if mx.default_device() == mx.Device(mx.cpu):
        model.set_dtype(mx.float32)
    return model


def patch(*, n_probes: int | None = None, dense: bool = False) -> None:
    """Make ``mlx_lm.load``, and so ``generate`` and ``stream_generate``, use the
    FlashHead of folders that have one. Other models load as before.

    Args:
        n_probes: Clusters probed per decoded token, instead of the stored number.
        dense: Keep the dense head; the rest is as with a FlashHead.

    Raises:
        PatchError: ``mlx_lm.utils.load_model`` is not as expected.
    """
    global _stock_load_model
    unpatch()
    stock = utils.load_model
    expected = ["model_path", "lazy", "strict", "model_config"]
    if list(inspect.signature(stock).parameters)[:4] != expected:
        import mlx_lm

        raise PatchError(
            f"mlx-lm {mlx_lm.__version__} is not supported: load_model has changed; "
            "install a version that mlx-flashhead names in its requirements"
        )

    @functools.wraps(stock)
    def load_model(model_path: Path, lazy: bool = False, *args: Any, **kwargs: Any):
        model, config = stock(model_path, True, *args, **kwargs)
        if CONFIG_KEY in config:
            if not (dense or switched_off()):
                install(model, model_path, n_probes)
            for_device(model)
        if not lazy:
            mx.eval(model.parameters())
        return model, config

    _stock_load_model = stock
    utils.load_model = load_model
    # The file's name keeps it out of stock mlx-lm's sight, downloads included.
    utils.DEFAULT_ALLOW_PATTERNS.append(HEAD_FILE)


def unpatch() -> None:
    """Undo :func:`patch`."""
    global _stock_load_model
    if _stock_load_model is not None:
        utils.load_model = _stock_load_model
        utils.DEFAULT_ALLOW_PATTERNS.remove(HEAD_FILE)
        _stock_load_model = None


@contextlib.contextmanager
def patched(*, n_probes: int | None = None, dense: bool = False) -> Iterator[None]:
    """:func:`patch` for the length of a ``with`` block."""
    before = utils.load_model, list(utils.DEFAULT_ALLOW_PATTERNS), _stock_load_model
    patch(n_probes=n_probes, dense=dense)
    try:
        yield
    finally:
        _restore(*before)


def _restore(load_model, patterns, stock) -> None:
    global _stock_load_model
    utils.load_model = load_model
    utils.DEFAULT_ALLOW_PATTERNS[:] = patterns
    _stock_load_model = stock
