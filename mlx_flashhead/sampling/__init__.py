"""Tokens drawn among a FlashHead's candidates, the whole vocabulary counted."""

from .draw import Drawn, draw, fits, full_logits, logprobs
from .lazy import LogProbs, dense_logprobs, drawn_logprobs
from .settings import Bias, Penalty, Processor, Settings

__all__ = [
    "Bias",
    "Drawn",
    "LogProbs",
    "Penalty",
    "Processor",
    "Settings",
    "dense_logprobs",
    "draw",
    "drawn_logprobs",
    "fits",
    "full_logits",
    "logprobs",
]
