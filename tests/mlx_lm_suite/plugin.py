"""What pytest runs mlx-lm's own tests with: ``MLX_LM_SUITE`` in the environment says
whether mlx-lm is stock or patched."""

from __future__ import annotations

import functools
import os

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx_lm import utils

from mlx_flashhead import flash_heads, patch
from mlx_flashhead.compute.device import for_device

PATCHED = {"stock": False, "patched": True}[os.environ["MLX_LM_SUITE"]]

if PATCHED:
    patch()
load_model = utils.load_model


@functools.wraps(load_model)
def load_alike(*args, **kwargs):
    """A model with a FlashHead, or one without that computes in the same dtype."""
    model, config = load_model(*args, **kwargs)
    assert any(flash_heads(model)) == PATCHED
    mx.eval(for_device(model).parameters())
    return model, config


utils.load_model = load_alike


@pytest.fixture(autouse=True)
def own_caches(request):
    """A test that fails leaves its own kind of caches to those that follow: one with a
    window of four tokens, which mlx-lm cannot trim once it is full, makes speculative
    decoding fail wherever a draft is not accepted, stock or patched."""
    yield
    model = getattr(request.cls, "model", None)
    if isinstance(model, nn.Module):
        vars(model).pop("make_cache", None)
