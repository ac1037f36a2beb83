"""Training-free retrieval heads for MLX language models (FlashHead,
arXiv 2603.14591): more tokens per second with the model's own answers."""

from .attach import flash_heads
from .head import Candidates, FlashHead
from .load import load
from .patch import patch, patch_decoding, patched, unpatch

__version__ = "0.1.0"
__all__ = [
    "Candidates",
    "FlashHead",
    "flash_heads",
    "load",
    "patch",
    "patch_decoding",
    "patched",
    "unpatch",
]
