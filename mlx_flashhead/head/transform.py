"""What a model does to the logits that its head makes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

import mlx.core as mx
import numpy as np

Logits = TypeVar("Logits", mx.array, np.ndarray, np.ndarray | mx.array)


@dataclass(frozen=True)
class Transform:
    """``cap * tanh(scale * logits / cap)``, or ``scale * logits`` without a cap:
    the soft-capping of Gemma 2, the logit scale of Cohere and Granite.

    Attributes:
        scale: Factor of the logits.
        softcap: What bounds them afterwards; ``None`` for nothing.
    """

    scale: float = 1.0
    softcap: float | None = None

    @property
    def identity(self) -> bool:
        """Whether logits stay as they are."""
        return self.scale == 1 and self.softcap is None

    def __call__(self, logits: Logits) -> Logits:
        """The model's logits, for an ``mx.array`` or ``np.ndarray`` of the head's."""
        if self.scale != 1:
            logits = logits * self.scale
        if self.softcap is not None:
            x = logits / self.softcap
            x = np.tanh(x) if isinstance(x, np.ndarray) else mx.tanh(x)
            logits = self.softcap * x
        return logits

    def inverse(self, logits: mx.array) -> mx.array:
        """The head's logits that become these; the nearest where there are none."""
        if self.softcap is not None:
            ratio = mx.clip(logits / self.softcap, -0.999999, 0.999999)
            logits = self.softcap * mx.arctanh(ratio)
        return logits / self.scale if self.scale != 1 else logits

    @classmethod
    def fit(cls, before: np.ndarray, after: np.ndarray) -> Transform | None:
        """The transform that turns ``before [n]`` into ``after``; ``None`` if none
        does.

        Args:
            before: float64, rising; the first entry is near 0 and the last beyond
              any cap.
            after: What the model made of it, float64 ``[n]``.
        """
        if not np.isfinite(after).all() or after[0] <= 0:
            return None
        scale = _rounded(after[0] / before[0])
        linear = np.isclose(after[-1], scale * before[-1], rtol=1e-2)
        fitted = cls(scale, None if linear else _rounded(after[-1]))
        close = np.isclose(fitted(before), after, rtol=2e-3, atol=1e-6)
        return fitted if close.all() else None


def _rounded(x: float) -> float:
    """What was meant, from a product in 32 bits."""
    return float(f"{x:.4g}")
