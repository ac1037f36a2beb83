"""What becomes of a logit of the head before the model chooses."""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from . import backend

# Of a float32, the bits that a dtype does not have.
_DROPPED = {mx.float32: 0, mx.float16: 13, mx.bfloat16: 16}

METAL = """
// To the nearest of fewer bits, ties to even.
template <int DROPPED>
METAL_FUNC float rounded(float x) {
    if (DROPPED == 0) {
        return x;
    }
    uint bits = as_type<uint>(x);
    bits += ((1u << DROPPED) >> 1) - 1 + ((bits >> DROPPED) & 1);
    return as_type<float>(bits >> DROPPED << DROPPED);
}

// What the model makes of a logit of its head; -inf, which is padding, stays.
template <bool CAPPED>
METAL_FUNC float transformed(float x, float scale, float cap) {
    if (!(x > -INFINITY)) {
        return -INFINITY;
    }
    x = x * scale;
    return CAPPED ? cap * precise::tanh(x / cap) : x;
}

// A logit as the model rounds it.
template <int DROPPED, bool CAPPED>
METAL_FUNC float shaped(float x, float scale, float cap) {
    return rounded<DROPPED>(transformed<CAPPED>(rounded<DROPPED>(x), scale, cap));
}
"""


@dataclass(frozen=True)
class Shaping:
    """What becomes of a logit of the head before the model chooses.

    Attributes:
        rounding: The dtype that the model computes its logits in.
        scale: Factor of the logits.
        softcap: What bounds them afterwards, ``None`` for nothing.
    """

    rounding: mx.Dtype = mx.float32
    scale: float = 1.0
    softcap: float | None = None

    def transformed(self, logits: mx.array) -> mx.array:
        """The model's logits, of float32 ones; ``-inf``, which is padding, stays."""
        x = logits * self.scale
        if self.softcap is not None:
            x = self.softcap * mx.tanh(x / self.softcap)
        return mx.where(logits > -mx.inf, x, -mx.inf)

    def __call__(self, logits: mx.array) -> mx.array:
        """The model's logits as it rounds them, float32."""
        rounded = self.transformed(_rounded(logits, self.rounding))
        return _rounded(rounded, self.rounding)

    @property
    def words(self) -> list[int]:
        """Scale and cap for a kernel."""
        return [float_bits(self.scale), float_bits(self.softcap or 0.0)]

    @property
    def template(self) -> backend.Template:
        """The same that is known when a kernel is compiled."""
        return [
            ("DROPPED", _DROPPED[self.rounding]),
            ("CAPPED", self.softcap is not None),
        ]

    def __str__(self) -> str:
        """The same in words."""
        capped = ", capped" * (self.softcap is not None)
        return backend.short(self.rounding) + capped


def _rounded(x: mx.array, dtype: mx.Dtype) -> mx.array:
    return x if dtype == mx.float32 else x.astype(dtype).astype(mx.float32)


def float_bits(x: float) -> int:
    """A number as a kernel's settings have it: the bits of a float32."""
    return int(np.float32(x).view(np.uint32))
