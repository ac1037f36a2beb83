"""The converter: from a Hugging Face model or a GGUF file to an mlx-lm folder with a
FlashHead."""

from .pipeline import ConvertError, convert
from .report import Report

__all__ = ["ConvertError", "Report", "convert"]
