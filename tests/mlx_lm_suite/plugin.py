"""What pytest runs mlx-lm's own tests with: ``MLX_LM_SUITE`` in the environment says
whether mlx-lm is stock or patched."""

from __future__ import annotations

import functools
import os

import mlx.core as mx
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
