"""Training-free retrieval heads for MLX language models (FlashHead,
arXiv 2603.14591): more tokens per second with the model's own answers."""

from .head import Candidates, FlashHead
from .integration.decode import Acceptance, acceptance
from .integration.exact import Verification, verification
from .integration.locate import flash_heads
from .integration.patch import patch, patch_decoding, patched, unpatch
from .load import load

__version__ = "0.1.0"
__all__ = [
    "Acceptance",
    "Candidates",
    "FlashHead",
    "Verification",
    "acceptance",
    "flash_heads",
    "load",
    "patch",
    "patch_decoding",
    "patched",
    "unpatch",
    "verification",
]
