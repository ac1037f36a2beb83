"""Training-free retrieval heads for MLX language models (FlashHead,
arXiv 2603.14591): more tokens per second with the model's own answers."""

try:
    import mlx.core as _mlx  # noqa: F401
except ImportError as e:
    raise ImportError(
        f"MLX does not load ({e}); on Linux it needs a back-end: install mlx[cpu] or "
        "mlx[cuda13]"
    ) from e

from .head import Candidates, FlashHead
from .integration.attach import attach, detach
from .integration.decode import Acceptance, acceptance
from .integration.decoder import Decoder, Sampled, hidden_states, sample
from .integration.exact import Verification, verification
from .integration.grammar import GrammarMask, LLGuidanceMask
from .integration.locate import flash_heads
from .integration.patch import patch, patch_decoding, patched, unpatch
from .load import load
from .sampling import Settings
from .sampling.masks import TokenMask

__version__ = "0.1.0"
__all__ = [
    "Acceptance",
    "Candidates",
    "Decoder",
    "FlashHead",
    "GrammarMask",
    "LLGuidanceMask",
    "Sampled",
    "Settings",
    "TokenMask",
    "Verification",
    "acceptance",
    "attach",
    "detach",
    "flash_heads",
    "hidden_states",
    "load",
    "patch",
    "patch_decoding",
    "patched",
    "sample",
    "unpatch",
    "verification",
]
