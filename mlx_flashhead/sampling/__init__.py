"""Tokens drawn among a FlashHead's candidates, the whole vocabulary counted."""

from .draw import Drawn, draw, fits, full_logits, logprobs, split
from .lazy import LogProbs, dense_logprobs, drawn_logprobs
from .settings import Bias, Penalty, Processor, Settings, Tempered

__all__ = [
    "Bias",
    "Drawn",
    "LogProbs",
    "Penalty",
    "Processor",
    "Settings",
    "Tempered",
    "dense_logprobs",
    "draw",
    "drawn_logprobs",
    "fits",
    "full_logits",
    "logprobs",
    "split",
]
