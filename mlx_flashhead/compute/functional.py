"""What a module holds, as a value: to see whether any of it was replaced since."""

from __future__ import annotations

from operator import is_
from typing import Any

import mlx.core as mx
import mlx.nn as nn


class Snapshot:
    """The arrays and modules that a module holds, derived ones included, and theirs.

    To tell them from others takes little: it is asked at every decode step. An array
    that is changed in place stays the same.
    """

    def __init__(self, module: nn.Module):
        self._within = [m for _, m in module.named_modules() if m is not module]
        self._values = self._all(module)

    def _all(self, module: nn.Module) -> list[Any]:
        values = list(module.values())
        for within in self._within:
            values += within.values()
        return values

    @property
    def arrays(self) -> list[mx.array]:
        """All of them, those of modules included."""
        return [value for value in self._values if isinstance(value, mx.array)]

    def of(self, module: nn.Module) -> bool:
        """Whether a module holds the very same."""
        values = self._all(module)
        return len(values) == len(self._values) and all(map(is_, values, self._values))
