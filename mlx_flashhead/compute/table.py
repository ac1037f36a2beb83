"""A matrix of rows, in 16 or 32 bits or quantized, read whole or in part."""

from __future__ import annotations

import math
from collections.abc import Callable

import mlx.core as mx
import mlx.nn as nn

from .device import on_gpu


class Table(nn.Module):
    """Rows ``[..., D]`` held dense, or packed by :func:`mlx.core.quantize`.

    The last axis is the hidden dimension and the one before it the row; any
    axes in front (the cluster of a clustered vocabulary) come first.

    Args:
        weight (mx.array): ``[..., n, D]`` floating, or ``[..., n, D * bits / 32]``
          uint32 where quantized.
        scales (mx.array, optional): ``[..., n, D / group_size]``.
        biases (mx.array, optional): like ``scales``; ``None`` for the modes that
          have none (mxfp4, nvfp4, mxfp8).
        bits (int): Bits per weight; 16 or 32 where not quantized.
        group_size (int): Weights per scale; 0 where not quantized.
        mode (str): MLX's quantization mode.
    """

    def __init__(
        self,
        weight: mx.array,
        scales: mx.array | None = None,
        biases: mx.array | None = None,
        *,
        bits: int = 16,
        group_size: int = 0,
        mode: str = "affine",
    ):
        super().__init__()
        self.weight = weight
        if scales is not None:
            self.scales = scales
        if biases is not None:
            self.biases = biases
        self.bits = bits
        self.group_size = group_size
        self.mode = mode

    @classmethod
    def from_dense(
        cls, weight: mx.array, bits: int, group_size: int, mode: str = "affine"
    ) -> Table:
        """Quantize ``weight [..., n, D]``; 16 and 32 bits keep it as it is."""
        if bits >= 16:
            return cls(weight, bits=8 * weight.dtype.size)
        packed = mx.quantize(weight, group_size=group_size, bits=bits, mode=mode)
        return cls(*packed, bits=bits, group_size=group_size, mode=mode)

    @property
    def quantized(self) -> bool:
        """Whether the rows are packed."""
        return "scales" in self

    @property
    def hidden_size(self) -> int:
        """Weights D of a row."""
        n = self.weight.shape[-1]
        return n * 32 // self.bits if self.quantized else n

    @property
    def dtype(self) -> mx.Dtype:
        """Dtype of the rows once dequantized."""
        scales = self.scales if self.quantized else self.weight
        return scales.dtype if mx.issubdtype(scales.dtype, mx.floating) else mx.bfloat16

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays, as stored."""
        return sum(a.nbytes for a in self.arrays if a is not None)

    def has_kernel(self, dtype: mx.Dtype) -> bool:
        """Whether :func:`mlx_flashhead.kernels.probe_logits` takes such rows for hidden
        states of a dtype."""
        if not self.quantized:
            return self.hidden_size % 32 == 0 and dtype == self.dtype
        return self.mode == "affine" and self.bits in (4, 5, 6, 8)

    def _extra_repr(self) -> str:
        shape = [*self.weight.shape[:-1], self.hidden_size]
        packed = f", group_size={self.group_size}, mode={self.mode}"
        return f"{shape}, bits={self.bits}{packed if self.quantized else ''}"

    @property
    def arrays(self) -> tuple[mx.array, mx.array | None, mx.array | None]:
        """Weight, scales and biases; ``None`` for those that there are not."""
        return self.weight, self.get("scales"), self.get("biases")

    @property
    def flat(self) -> Table:
        """The same rows with all axes before the last as one, ``[n, D]``."""
        return self.map(_flat)

    def _packed(self) -> tuple[mx.array, mx.array, mx.array | None]:
        return self.weight, self.scales, self.get("biases")

    def map(self, f: Callable[[mx.array], mx.array]) -> Table:
        """The same table with ``f`` applied to each of its arrays."""
        weight, *others = self.arrays
        return Table(
            f(weight),
            *(None if a is None else f(a) for a in others),
            bits=self.bits,
            group_size=self.group_size,
            mode=self.mode,
        )

    def dequantize(self, dtype: mx.Dtype | None = None) -> mx.array:
        """The rows as floating point ``[..., n, D]``; in float32 exactly what the
        products multiply with."""
        return self._dequantized(*self.arrays, dtype)

    def take(self, index: mx.array, dtype: mx.Dtype | None = None) -> mx.array:
        """Rows ``[*index.shape, D]``, counted through all axes before the last, as
        :meth:`dequantize` gives them."""
        weight, scales, biases = (
            None if a is None else _flat(a)[index] for a in self.arrays
        )
        assert weight is not None
        return self._dequantized(weight, scales, biases, dtype)

    def _dequantized(
        self,
        weight: mx.array,
        scales: mx.array | None,
        biases: mx.array | None,
        dtype: mx.Dtype | None,
    ) -> mx.array:
        if scales is None:
            return weight if dtype is None else weight.astype(dtype)
        if dtype is not None and dtype == mx.float32 and self.mode == "affine":
            # MLX would compute in the dtype of the scales, then cast.
            scales = scales.astype(dtype)
            biases = None if biases is None else biases.astype(dtype)
        return mx.dequantize(
            weight,
            scales,
            biases,
            group_size=self.group_size,
            bits=self.bits,
            mode=self.mode,
            dtype=dtype,
        )

    def matmul(self, x: mx.array) -> mx.array:
        """``x [..., D]`` times every row, counted through all axes before the last:
        ``[..., n]``."""
        if not self.quantized:
            return x @ _flat(self.weight).T
        weight, scales, biases = self._packed()
        return mx.quantized_matmul(
            x,
            _flat(weight),
            _flat(scales),
            None if biases is None else _flat(biases),
            transpose=True,
            group_size=self.group_size,
            bits=self.bits,
            mode=self.mode,
        )

    def fast_matmul(self, x: mx.array) -> mx.array:
        """:meth:`matmul` for one small table and one state after another. On a CPU,
        where MLX's products of float32 states with quantized weights take three times
        as long as with float32 ones, the rows are unpacked once and kept."""
        if not self.quantized or x.dtype != mx.float32 or on_gpu():
            return self.matmul(x)
        if self.get("_unpacked_from") is not self.weight:
            self._unpacked = self.dequantize(mx.float32)
            mx.eval(self._unpacked)
            self._unpacked_from = self.weight
        return x @ self._unpacked.T

    def gather_matmul(self, x: mx.array, index: mx.array) -> mx.array:
        """``x [B, D]`` times the rows of blocks ``index [B, p]`` of a table
        ``[C, m, D]``: ``[B, p, m]``."""
        x = x[:, None, None]
        if not self.quantized:
            y = mx.gather_mm(x, self.weight.swapaxes(-1, -2), rhs_indices=index)
        else:
            y = mx.gather_qmm(
                x,
                *self._packed(),
                rhs_indices=index,
                transpose=True,
                group_size=self.group_size,
                bits=self.bits,
                mode=self.mode,
            )
        return y.squeeze(-2)


def _flat(a: mx.array) -> mx.array:
    return a if a.ndim == 2 else a.reshape(-1, a.shape[-1])


def repack(
    rows: mx.array,
    dtype: mx.Dtype,
    bits: int,
    group_size: int,
    largest: float = math.inf,
) -> Table:
    """Rows of a head in other bits than its own.

    Args:
        rows: Floating ``[..., n, D]``, as the head multiplies with them.
        dtype: That of the head.
        bits: 32 is float32, and 16 the head's own dtype, or bfloat16 where that is
          wider.
        group_size: Weights per scale where they have 2 to 8 bits.
        largest: Largest magnitude in the head; without it scales are of its dtype.
    """
    kind = dtype
    if bits >= 16:
        kind = mx.float32 if bits == 32 else dtype if dtype.size == 2 else mx.bfloat16
    elif dtype == mx.bfloat16 and largest < 6e4:
        # As a scale's dtype bfloat16 is too coarse for 8 bits: it costs more agreement
        # with the unquantized head than the rounding of the weights.
        kind = mx.float16
    return Table.from_dense(rows.astype(kind), bits, group_size)
