"""Typed access to the metadata of a GGUF file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from .errors import GGUFError, error, quote


class Metadata:
    """Values by key. Each method raises a GGUFError that names a key whose value
    is missing without a default, of another type, or out of range."""

    def __init__(self, path: Path, values: dict[str, Any]):
        self.path = path
        self.values = values

    def __contains__(self, key: str) -> bool:
        return key in self.values

    def bad(self, key: str) -> GGUFError:
        value = self.values.get(key)
        problem = f"{key} is {quote(value)}" if key in self else f"it lacks {key}"
        return error(self.path, problem)

    def text(self, key: str, default: str | None = None) -> str:
        return self._typed(key, default, str)

    def flag(self, key: str, default: bool) -> bool:
        return self._typed(key, default, bool)

    def number(self, key: str, default: float | None = None) -> float:
        """A finite number of 0 or more, as short as float32 needs it."""
        value = self._typed(key, default, int | float)
        with np.errstate(over="ignore"):
            single = np.float32(value)
        if not np.isfinite(single) or single < 0:
            raise self.bad(key)
        return float(str(single))

    def integer(self, key: str, default: int | None = None, smallest: int = 1) -> int:
        """An integer; of an array with a value for each layer, the one value."""
        value = self.values.get(key, default)
        if isinstance(value, np.ndarray) and value.size:
            if (value != value[0]).any():
                problem = f"{key} differs between layers, which mlx-lm does not allow"
                raise error(self.path, problem, "use a model of one layer shape")
            value = value[0].item()
        if isinstance(value, bool) or not isinstance(value, int):
            raise self.bad(key)
        if not smallest <= value < 1 << 31:
            raise self.bad(key)
        return value

    def strings(self, key: str) -> list[str]:
        return self._typed(key, None, list)

    def numbers(self, key: str, count: int) -> np.ndarray:
        value = self._typed(key, None, np.ndarray)
        if value.size != count:
            raise self.bad(key)
        return value

    def _typed(self, key: str, default: Any, kind: Any) -> Any:
        value = self.values.get(key, default)
        # A bool is an int to Python, and never to GGUF.
        stray_bool = isinstance(value, bool) and kind is not bool
        if not isinstance(value, kind) or stray_bool:
            raise self.bad(key)
        return value
