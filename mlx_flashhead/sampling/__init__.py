"""Tokens drawn among a FlashHead's candidates, the whole vocabulary counted."""

from .draw import Drawn, draw, fits, full_logits, logprobs, split
from .logprobs import LogProbs, of_dense, of_drawn
from .settings import Bias, Penalty, Processor, Settings, Tempered

__all__ = [
    "Bias",
    "Drawn",
    "LogProbs",
    "Penalty",
    "Processor",
    "Settings",
    "Tempered",
    "draw",
    "fits",
    "full_logits",
    "logprobs",
    "of_dense",
    "of_drawn",
    "split",
]
