"""Cases of the kernels that draw, and their inputs."""

from __future__ import annotations

from typing import NamedTuple

import mlx.core as mx

from . import probe_logits
from .filters import Rules
from .law import Draw, Law, Tail
from .rows import Rows
from .shaping import Shaping

LAWS = {
    "temperature": Law(0.8),
    "top-p": Law(0.7, Rules(top_p=0.9)),
    "min-p": Law(1.1, Rules(min_p=0.05)),
    "top-k": Law(0.9, Rules(top_k=7)),
    "all": Law(0.9, Rules(top_p=0.97, min_p=0.01, top_k=60)),
    "fewest": Law(1.2, Rules(top_p=0.8, min_p=0.4, min_tokens_to_keep=9)),
    "XTC": Law(0.8, Rules(xtc_threshold=0.02), 0.6, (3, 50)),
    "XTC, all": Law(
        *(
            0.9,
            Rules(0.9, 0.01, 2, 30, xtc_threshold=0.01),
            0.7,
            tuple(range(0, 900, 7)),
        )
    ),
}


class Case(NamedTuple):
    """Inputs of a launch: how a token is drawn, ``None`` for the best; how many rows a
    cluster has, how many clusters are probed and how many there are; the size of hidden
    states; bits (0: not quantized) and group size of the table; dtypes of states and
    scales; to what logits are rounded, and their cap; the dtype of the rows' bias and
    of centroids' logits, by default that of the states; how far logits are apart."""

    law: Law | None
    m: int
    p: int
    C: int
    D: int = 64
    bits: int = 8
    group_size: int = 64
    dtype: mx.Dtype = mx.float32
    scales: mx.Dtype | None = None
    rounding: mx.Dtype = mx.float32
    softcap: float | None = None
    bias: mx.Dtype | None = None
    centroids: mx.Dtype | None = None
    spread: float = 1.5

    @classmethod
    def of(cls, draw: Draw, rows: Rows | None, large: bool = False) -> Case:
        """The case that runs the same code, with sizes of its own."""
        m = draw.token_ids.shape[1]
        c = -(-2600 // m) if large else 150
        p = c if draw.tail.empty else -(-2200 // m) if large else 21
        case = cls(
            *(draw.law, m, p, c),
            rounding=draw.shaping.rounding,
            softcap=draw.shaping.softcap,
            centroids=draw.tail.centroid_logits.dtype,
        )
        if rows is None:
            return case
        like = probe_logits.case_of(rows)
        return case._replace(
            **{n: getattr(like, n) for n in ("D", "bits", "group_size", "dtype")},
            **{n: getattr(like, n) for n in ("scales", "bias")},
        )


# States of a case that differ, which is all that fits beside a model.
_STATES = 4


def made(case: Case, B: int = 2) -> tuple[Rows, Draw, mx.array]:
    """Rows, what is asked of them, and the logits of what is probed: of a few states,
    again and again, with noise of their own."""
    keys = mx.random.split(mx.random.key(case.p), 7)
    C, m, p, D = case.C, case.m, case.p, case.D
    n = min(B, _STATES)
    again = mx.arange(B) % n
    like = probe_logits.Case(
        *(case.dtype, case.bits, case.group_size, D, m, n, C, p),
        *(case.scales, case.bias),
    )
    few = probe_logits.inputs(like)
    few = few._replace(x=(few.x * case.spread).astype(case.dtype))
    order = mx.argsort(mx.random.uniform(shape=(n, C), key=keys[0]), axis=-1)
    probes = mx.sort(order[:, :p], axis=-1)
    logits = probe_logits.reference(few, probes, exact=True)
    ids = mx.random.permutation(C * m, key=keys[1]).astype(mx.uint32).reshape(C, m)
    rows = few._replace(x=few.x[again])

    def score(clusters: mx.array) -> mx.array:
        scored = probe_logits.reference(rows, clusters, exact=True)
        return scored.reshape(*clusters.shape, m)

    centroids = mx.random.normal((n, C), key=keys[2])
    tail = Tail(
        centroids.astype(case.centroids or case.dtype)[again],
        mx.random.uniform(shape=(C,), key=keys[3]),
        mx.random.uniform(shape=(C,), key=keys[4]),
        score,
        rows,
        p == C,
    )
    shaping = Shaping(case.rounding, 1.0, case.softcap)
    noise = None if case.law is None else mx.random.split(keys[5], B)
    draw = Draw(probes[again], ids, shaping, tail, case.law, noise)
    return rows, draw, logits[again]
