"""The error for files that cannot be converted, and its messages."""

from __future__ import annotations

from pathlib import Path
from typing import Any

CONVERT_AGAIN = "convert it again from the original model with a current llama.cpp"
DOWNLOAD_AGAIN = "download or copy the file again"


class GGUFError(ValueError):
    """A GGUF file that cannot be converted: one line, with the way out."""


def error(path: Path, problem: str, fix: str = CONVERT_AGAIN) -> GGUFError:
    """A GGUFError of one line; text from the file may contain line breaks."""
    return GGUFError(" ".join(f"{path}: {problem}; {fix}".split()))


def quote(text: Any) -> str:
    """``text`` short enough, and escaped, for an error message."""
    shown = repr(text)
    return shown if len(shown) <= 80 else shown[:76] + "...'"
