"""Training-free retrieval heads for MLX language models (FlashHead,
arXiv 2603.14591): more tokens per second with the model's own answers."""

from .head import Candidates, FlashHead
from .integration.decode import Acceptance, acceptance
from .integration.exact import Verification, verification
from .integration.grammar import GrammarMask, LLGuidanceMask
from .integration.locate import flash_heads
from .integration.patch import patch, patch_decoding, patched, unpatch
from .load import load
from .sampling.masks import TokenMask

__version__ = "0.1.0"
__all__ = [
    "Acceptance",
    "Candidates",
    "FlashHead",
    "GrammarMask",
    "LLGuidanceMask",
    "TokenMask",
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
