"""Quantized bytes as numbers."""

from __future__ import annotations

from functools import cache

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, dequantize


@cache
def can_dequantize(kind: GGMLQuantizationType) -> bool:
    try:
        floats(np.zeros((1, GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
    except NotImplementedError:
        return False
    return True


def floats(raw: np.ndarray, kind: GGMLQuantizationType) -> np.ndarray:
    """Rows of quantized bytes (..., row_bytes) as float32 rows."""
    # Blocks do not depend on each other, and one long row is much quicker.
    with np.errstate(all="ignore"):
        flat = dequantize(np.ascontiguousarray(raw).reshape(1, -1), kind)
    return flat.reshape(*raw.shape[:-1], -1)
