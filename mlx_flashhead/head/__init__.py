"""The retrieval head, the masses of its clusters, what the model does to its logits,
and when the dense product is faster."""

from .dense_rule import prefers_dense
from .flash_head import ALWAYS, Candidates, FlashHead, Retrieved, default_n_probes
from .transform import Transform

__all__ = [
    "ALWAYS",
    "Candidates",
    "FlashHead",
    "Retrieved",
    "Transform",
    "default_n_probes",
    "prefers_dense",
]
