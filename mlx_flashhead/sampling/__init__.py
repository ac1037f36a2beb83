"""Tokens drawn among a FlashHead's candidates, the whole vocabulary counted."""

from .draw import Drawn, draw, fits, full_logits, logprobs, split, token_logprobs
from .settings import Bias, Penalty, Processor, Settings, Tempered

__all__ = [
    "Bias",
    "Drawn",
    "Penalty",
    "Processor",
    "Settings",
    "Tempered",
    "draw",
    "fits",
    "full_logits",
    "logprobs",
    "split",
    "token_logprobs",
]
