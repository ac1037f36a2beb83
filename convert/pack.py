"""From a clustering to a FlashHead's low-bit tensors."""

from __future__ import annotations

import mlx.core as mx
import numpy as np

from mlx_flashhead.compute.table import Table, repack
from mlx_flashhead.head import FlashHead
from mlx_flashhead.head.transform import Transform

from .clustering import Clustering


def pack(
    clustering: Clustering,
    table: Table,
    weight: np.ndarray,
    centroids: np.ndarray,
    *,
    bias: np.ndarray | None = None,
    head_bits: int = 8,
    centroid_bits: int = 4,
    group_size: int = 64,
    n_probes: int | None = None,
    transform: Transform | None = Transform(),
    exact: Table | None = None,
) -> FlashHead:
    """The clustered head, what its scores lack still zero.

    Args:
        clustering: Which tokens stand together.
        table: The model's head as it is stored, ``[V, D]``. If its bits are the ones
          asked for, its packed rows are only put in another order; those of a mode
          other than affine keep its groups.
        weight: The same, float32.
        centroids: Centroid of each cluster, float32 ``[C, D]``.
        bias: The head's bias, ``[V]``.
        head_bits, centroid_bits: Bits of the rows and of the centroids. 32 is float32,
            and 16 the head's own dtype, or bfloat16 where that is wider.
        group_size: Weights per scale where they have 2 to 8 bits.
        n_probes: Clusters probed per step; by default a sixteenth of them.
        transform: What the model does to its logits; ``None`` if that is not known.
        exact: The rows as they are to be stored, ``[V, D]``, whatever ``table`` is.
    """
    c, m = clustering.token_ids.shape
    # Padding repeats a row that exists; it is masked wherever logits are made.
    source = np.where(clustering.token_ids < len(weight), clustering.token_ids, 0)
    index = mx.array(source.astype(np.uint32))
    dtype = table.dtype
    same = table.bits == head_bits == 8 * table.weight.dtype.size or (
        table.quantized
        and table.bits == head_bits
        and (table.mode != "affine" or table.group_size == group_size)
    )
    rows = table if exact is None else exact
    if exact is None and not same:
        largest = float(np.abs(weight).max())
        rows = repack(mx.array(weight), dtype, head_bits, group_size, largest)
    rows = rows.map(lambda a: a[index])
    return FlashHead(
        rows,
        repack(mx.array(centroids), dtype, centroid_bits, group_size),
        mx.array(clustering.token_ids.astype(np.uint32)),
        len(weight),
        spread=mx.zeros(c),
        excess=mx.zeros((1, c)),
        n_probes=n_probes,
        bias=None if bias is None else mx.array(bias[source]).astype(dtype),
        transform=transform,
    )
