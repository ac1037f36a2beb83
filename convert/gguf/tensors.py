"""The values of the weights, dequantized a few rows at a time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import numpy as np

from mlx_flashhead.compute.table import Table

from .errors import DOWNLOAD_AGAIN, error, quote
from .plan import Weight
from .quantization import floats, table
from .reader import GGUFFile

# Elements dequantized at a time: large enough to be quick, small in memory.
_CHUNK = 1 << 20


def weight_dtype(path: Path, dtype: str | mx.Dtype) -> mx.Dtype:
    """A type for weights, by name or as it is; GGUFError for any other."""
    known = {"float32": mx.float32, "float16": mx.float16, "bfloat16": mx.bfloat16}
    if isinstance(dtype, mx.Dtype) and dtype in known.values():
        return dtype
    if isinstance(dtype, str) and dtype in known:
        return known[dtype]
    fix = f"use one of {', '.join(known)}"
    raise error(path, f"it cannot be written as {quote(dtype)}", fix)


@dataclass(frozen=True)
class Weights:
    """The weights of the mlx-lm model, in its order, and the file that has them."""

    file: GGUFFile
    plan: list[Weight]

    def read(self, weight: Weight, dtype: mx.Dtype) -> mx.array:
        """One weight as ``dtype``; GGUFError where its values do not fit."""
        if weight.source is None:
            return mx.zeros(weight.shape, dtype)
        scale = self._scale(weight.source)
        parts = []
        for values in self._chunks(weight, weight.source):
            # What overflows is refused below, by name.
            with np.errstate(over="ignore", invalid="ignore"):
                values = values * scale + weight.shift
            self._check(weight, values, dtype)
            parts.append(mx.array(values).astype(dtype))
            mx.eval(parts[-1])
        whole = mx.concatenate(parts) if len(parts) > 1 else parts[0]
        whole = whole.reshape(weight.shape)
        mx.eval(whole)
        return whole

    def table(self, weight: Weight) -> Table | None:
        """One weight as a quantized table of the very same values, where MLX has one
        for what the file has."""
        source = weight.source
        if source is None or weight.heads or weight.shift or self._scale(source) != 1:
            return None
        return table(self.file.raw(source), self.file.tensors[source].kind)

    def _chunks(self, weight: Weight, source: str) -> Iterator[np.ndarray]:
        """A few dequantized rows at a time, in Hugging Face's order."""
        tensor = self.file.tensors[source]
        raw = self.file.raw(source)
        order = None
        if weight.heads:
            order = _uninterleaved(weight.shape[0], weight.heads)
            if len(weight.shape) == 1:
                yield floats(raw, tensor.kind)[:, order]
                return
        step = max(1, _CHUNK // tensor.shape[-1])
        for start in range(0, tensor.rows, step):
            rows = slice(start, start + step)
            yield floats(raw[rows if order is None else order[rows]], tensor.kind)

    def _scale(self, source: str) -> np.float32:
        """The factor some quantizations keep in a tensor of its own."""
        name = source.removesuffix(".weight") + ".scale"
        if name not in self.file.tensors:
            return np.float32(1)
        if self.file.tensors[name].shape != (1,):
            raise error(self.file.path, f"tensor {name!r} is not one number")
        return self.file.floats(name)[0]

    def _check(self, weight: Weight, values: np.ndarray, dtype: mx.Dtype) -> None:
        largest = np.abs(values).max()
        if largest <= mx.finfo(dtype).max:
            return
        if np.isfinite(largest):
            problem = f"tensor {weight.source!r} has values too large for {dtype}"
            raise error(self.file.path, problem, "write it as bfloat16 or float32")
        problem = f"tensor {weight.source!r} has values that are not finite"
        raise error(self.file.path, problem, DOWNLOAD_AGAIN)


def _uninterleaved(rows: int, heads: int) -> np.ndarray:
    """For each row of q or k as Hugging Face has it, its row in the file."""
    order = np.arange(rows).reshape(heads, rows // heads // 2, 2)
    return order.swapaxes(1, 2).ravel()
