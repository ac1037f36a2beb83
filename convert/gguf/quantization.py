"""Quantized bytes as numbers, and as MLX's quantization has them."""

from __future__ import annotations

from functools import cache

import mlx.core as mx
import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, dequantize

from mlx_flashhead.compute.table import Table


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


def table(raw: np.ndarray, kind: GGMLQuantizationType) -> Table | None:
    """Rows of quantized bytes ``[n, row_bytes]`` as a table with the very same values,
    in 8 bits and groups of 32; ``None`` where there is no such table.

    Q8_0 is ``d * q``, a float16 for every 32 int8, and MLX's affine quantization
    ``scale * w + bias`` with bytes w: these are ``q + 128``, d and ``-128 * d``, which
    is a float16, too, unless it overflows.
    """
    if kind != GGMLQuantizationType.Q8_0:
        return None
    blocks = raw.reshape(len(raw), -1, GGML_QUANT_SIZES[kind][1])
    scales = np.ascontiguousarray(blocks[..., :2]).view(np.float16)[..., 0]
    with np.errstate(all="ignore"):
        biases = scales * np.float16(-128)
    if not np.isfinite(biases).all():
        return None
    # In two's complement, adding 128 flips the first bit.
    weight = (blocks[..., 2:] ^ np.uint8(128)).reshape(len(raw), -1).view(np.uint32)
    arrays = mx.array(weight), mx.array(scales), mx.array(biases)
    mx.eval(arrays)
    return Table(*arrays, bits=8, group_size=32)
