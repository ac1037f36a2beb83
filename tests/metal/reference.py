"""What the kernels should compute, in NumPy, float64 and Python integers.

Written from the definitions, sharing nothing with the package.
"""

import mlx.core as mx
import numpy as np


def as_numpy(array: mx.array) -> np.ndarray:
    """A float64 or integer copy, exact."""
    if mx.issubdtype(array.dtype, mx.floating):
        return np.array(array.astype(mx.float32)).astype(np.float64)
    return np.array(array)


def select(scores: np.ndarray, p: int) -> np.ndarray:
    """Indices of the p largest of float ``scores [B, C]``, ascending; ties to the
    lower index, NaN last."""
    rows = []
    for row in scores:
        rank = sorted(
            range(len(row)),
            key=lambda i: (np.isnan(row[i]), 0 if np.isnan(row[i]) else -row[i], i),
        )
        rows.append(sorted(rank[:p]))
    return np.array(rows)


def unpack(words: np.ndarray, bits: int) -> np.ndarray:
    """Integers of a little-endian bit stream, along the last axis."""
    stream = np.unpackbits(words.view(np.uint8), axis=-1, bitorder="little")
    stream = stream.reshape(*words.shape[:-1], -1, bits)
    return (stream * (1 << np.arange(bits))).sum(-1)


def rows(weight, scales, biases, group_size: int, bits: int):
    """The rows ``[C, m, D]`` in float64, and bounds on their magnitude before
    cancellation."""
    if scales is None:
        w = as_numpy(weight)
        return w, np.abs(w)
    q = unpack(np.array(weight), bits)
    s = np.repeat(as_numpy(scales), group_size, -1)
    b = np.repeat(as_numpy(biases), group_size, -1)
    return q * s + b, q * np.abs(s) + np.abs(b)


def logits(x, weight, scales, biases, probes, group_size, bits, n_rows, bias=None):
    """Logits ``[B, p * m]`` in float64, and a bound on the error of any float32
    evaluation of them."""
    w, size = rows(weight, scales, biases, group_size, bits)
    m, D = w.shape[1:]
    x, probes = as_numpy(x), np.array(probes)
    exact = np.einsum("bd,bpmd->bpm", x, w[probes])
    bound = np.einsum("bd,bpmd->bpm", np.abs(x), size[probes]) * (D + 8) * 2.0**-24
    if bias is not None:
        exact += as_numpy(bias)[probes]
        bound += (np.abs(exact) + np.abs(as_numpy(bias)[probes])) * 2.0**-23
    padding = probes[..., None] * m + np.arange(m) >= n_rows
    exact[padding] = -np.inf
    return exact.reshape(len(x), -1), bound.reshape(len(x), -1)


def kept(
    row,
    top_p=1.0,
    min_p=0.0,
    min_tokens_to_keep=1,
    top_k=0,
    xtc_threshold=None,
    xtc_exempt=False,
    tail=None,
) -> tuple[np.ndarray, bool]:
    """Which candidates of one row, and whether the tail, the filters leave.

    They are those of mlx-lm, in its order; ``tail`` is the tail's log-mass. XTC drops
    where it has a threshold."""
    row = np.where(np.isnan(row), -np.inf, row)
    top = row.max()
    d = row - top if np.isfinite(top) else np.zeros_like(row)
    left = np.full(row.shape, True)
    keep_tail = tail is not None and min_p == 0 and not 0 < top_k < len(row)
    rest = np.exp(tail - top) if tail is not None else 0
    if top_p < 1:
        mass = np.exp(d)
        above = np.array([mass[d > e].sum() for e in d])
        left &= above < top_p * (mass.sum() + rest)
        if mass.sum() >= top_p * (mass.sum() + rest):
            keep_tail, rest = False, 0
    if min_p > 0:
        likely = d >= np.log(min_p) - 1e-9
        left &= likely | (d >= np.sort(d)[-min(min_tokens_to_keep, len(d))])
        rest = 0
    if xtc_threshold is not None:
        share = np.where(left, np.exp(d), 0)
        share /= share.sum() + rest
        above = share > xtc_threshold
        if above.any():
            left &= ~(share > share[above].min()) | xtc_exempt
    if 0 < top_k < len(row) and left.sum() > top_k:
        left &= d >= np.sort(d[left])[-top_k]
    return left, keep_tail


def chances(row, temperature, tail, **filters) -> np.ndarray:
    """Probabilities of the candidates of one row at a temperature, the tail's last,
    after the filters of :func:`kept`; ``tail`` has its log-mass there and at 1."""
    row = np.where(np.isnan(row), -np.inf, row)
    left, keep_tail = kept(row, tail=tail[1], **filters)
    top = row.max()
    d = row - top if np.isfinite(top) else np.zeros_like(row)
    mass = np.where(left, np.exp(d / temperature), 0)
    mass = np.append(mass, np.exp(tail[0] - top / temperature) if keep_tail else 0)
    return mass / mass.sum()
