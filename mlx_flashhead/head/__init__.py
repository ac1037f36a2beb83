"""The retrieval head: FlashHead, its embedding for tied models, and what the model does
to the logits afterwards."""

from .flash_head import (
    ALWAYS,
    Candidates,
    FlashEmbedding,
    FlashHead,
    Retrieved,
    default_n_probes,
)
from .transform import Transform

__all__ = [
    "ALWAYS",
    "Candidates",
    "FlashEmbedding",
    "FlashHead",
    "Retrieved",
    "Transform",
    "default_n_probes",
]
