"""The best candidate of each row, in one launch."""

from functools import partial
from typing import NamedTuple

import mlx.core as mx

from . import backend
from ._prelude import LARGE_GROUP, SMALL_GROUP, TOKEN

_SOURCE = """
    static_assert(THREADS % 32 == 0 && THREADS <= 1024, "whole simdgroups, at most 32");
    uint lid = thread_position_in_threadgroup.x;
    uint simd_lid = thread_index_in_simdgroup;
    uint simd_gid = simdgroup_index_in_threadgroup;
    uint row = threadgroup_position_in_grid.y;
    uint n = values_shape[1];
    size_t base = size_t(row) * n;

    // NaN never compares greater, so it never wins.
    float best = -INFINITY;
    uint at = ~0u;
    for (uint i = lid; i < n; i += THREADS) {
        float value = load(values, base + i);
        if (value > best) {
            best = value;
            at = i;
        }
    }
    threadgroup float bests[32];
    threadgroup uint ats[32];
    float top = simd_max(best);
    at = simd_min(best == top ? at : ~0u);
    if (simd_lid == 0) {
        bests[simd_gid] = top;
        ats[simd_gid] = at;
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    if (simd_gid == 0) {
        best = simd_lid < THREADS / 32 ? bests[simd_lid] : -INFINITY;
        at = simd_lid < THREADS / 32 ? ats[simd_lid] : ~0u;
        top = simd_max(best);
        at = simd_min(best == top ? at : ~0u);
        if (simd_lid == 0) {
            at = at == ~0u ? 0 : at;  // nothing above -inf
            at = INDEXED ? indices[base + at] : at;
            size_t first = size_t(row) * probes_shape[1];
            tokens[row] = candidate_token<MAPPED, M>(probes, token_ids, first, at);
        }
    }
"""

_kernel = backend.Kernel(
    "greedy",
    ["values", "indices", "probes", "token_ids"],
    ["tokens"],
    _SOURCE,
    TOKEN,
)


def greedy(
    values: mx.array,
    *,
    indices: mx.array | None = None,
    probes: mx.array | None = None,
    token_ids: mx.array | None = None,
) -> mx.array:
    """The candidate with the largest value in each row, ties to the first.

    With ``probes`` and ``token_ids`` the result is the candidate's token. NaN never
    wins; where nothing is above ``-inf`` the first entry does.

    Args:
        values (mx.array): Candidate logits ``[B, K]``, or ``block_max [B, p]`` of
          :func:`probe_logits_stats`; floating.
        indices (mx.array, optional): Candidate that each value stands for, uint32,
          shaped like ``values``: ``block_argmax``. By default its column.
        probes (mx.array, optional): Probed clusters, uint32 ``[B, p]``.
        token_ids (mx.array, optional): Token of each row, uint32 ``[C, m]``.

    Returns:
        mx.array: Candidate indices or token ids, uint32 ``[B]``.

    Raises:
        ValueError: If shapes do not match, or only one of ``probes`` and
          ``token_ids`` is given.
    """
    if values.ndim != 2 or not values.shape[1]:
        raise ValueError(f"values must be [B, K], not {values.shape}")
    if indices is not None and indices.shape != values.shape:
        raise ValueError(f"indices must be {values.shape}, not {indices.shape}")
    check_tokens(values.shape[0], probes, token_ids)
    if not len(values):
        return mx.zeros((0,), dtype=mx.uint32)
    code = Case(
        *(values.shape[1], values.dtype, indices is not None),
        None if token_ids is None else token_ids.shape[1],
    )
    size = f"K {'above' if code.K > _LARGE else 'to'} {_LARGE}"
    options = [backend.short(values.dtype), size]
    options += ["indices"] * code.indexed
    options += [] if code.m is None else [f"tokens, m {code.m}"]
    variant = f"greedy({', '.join(options)})"
    threads = backend.largest_group(variant, largest(code), partial(_check, code))
    if threads:
        return _launch(values, indices, probes, token_ids, threads)
    return _reference(values, indices, probes, token_ids)


class Case(NamedTuple):
    """Inputs of a launch: how many values, their dtype, whether they have indices, the
    cluster size of those that have tokens, and the batch size."""

    K: int
    dtype: mx.Dtype = mx.float32
    indexed: bool = False
    m: int | None = None
    B: int = 2


# From how many values on a row has a large group.
_LARGE = 4096
# What tests, the doctor and the check on a GPU run.
CASES = (
    Case(1, B=1),
    Case(6, indexed=True, m=16),
    Case(120, mx.float16, m=3),
    Case(700, mx.bfloat16, B=3),
    Case(1024, mx.bfloat16, indexed=True, m=16, B=1),
    Case(4097, B=1),
    Case(5000, mx.bfloat16, m=8),
    Case(5001, mx.float16, indexed=True, m=13),
)


def largest(case: Case) -> int:
    """Threads per threadgroup, if so many fit."""
    return LARGE_GROUP if case.K > _LARGE else SMALL_GROUP


def inputs(
    case: Case,
) -> tuple[mx.array, mx.array | None, mx.array | None, mx.array | None]:
    """Values, indices, probes and token ids of a case: ties, infinities and NaN."""
    B, K, m = case.B, case.K, case.m or 1
    values = ((mx.arange(B * K) * 29) % 61).reshape(B, K).astype(case.dtype) / 4
    if K > 32:
        values[:, ::5] = mx.nan
        values[:, 1::9] = -mx.inf
    p = K if case.indexed else -(-K // m)
    indices = probes = token_ids = None
    if case.indexed:
        indices = mx.arange(B * p, dtype=mx.uint32).reshape(B, p)[:, ::-1] * 7 % (p * m)
    if case.m is not None:
        probes = mx.arange(B * p, dtype=mx.uint32).reshape(B, p)
        token_ids = (mx.arange(B * p * m, dtype=mx.uint32) * 7).reshape(B * p, m)
    return values, indices, probes, token_ids


def check(case: Case, threads: int) -> None:
    """Raise unless the kernel matches its reference in this case."""
    arrays = inputs(case)
    backend.expect_close("greedy", _launch(*arrays, threads), _reference(*arrays))


def _check(code: Case, threads: int) -> None:
    """The cases of one piece of code, of its class of sizes: with few values, with as
    many as there are, and with threads that have several."""
    sizes = (_LARGE + 1, 2 * _LARGE + 3) if code.K > _LARGE else (1, 2 * threads + 3)
    for K in sorted({*sizes, code.K}):
        check(code._replace(K=K), threads)


def check_tokens(
    batch_size: int, probes: mx.array | None, token_ids: mx.array | None
) -> None:
    """Raise ``ValueError`` unless ``probes [B, p]`` and ``token_ids [C, m]`` are
    both there or both absent."""
    if probes is None or token_ids is None:
        if probes is not token_ids:
            raise ValueError("probes and token_ids come together")
        return
    if probes.ndim != 2 or probes.shape[0] != batch_size or token_ids.ndim != 2:
        raise ValueError(
            f"probes must be [{batch_size}, p] and token_ids [C, m], "
            f"not {probes.shape} and {token_ids.shape}"
        )


def to_tokens(
    candidates: mx.array, probes: mx.array | None, token_ids: mx.array | None
) -> mx.array:
    """Tokens of ``candidates [B]``, which are indices into ``[B, p * m]``."""
    if probes is None or token_ids is None:
        return candidates
    m = token_ids.shape[1]
    cluster = mx.take_along_axis(probes, (candidates // m)[:, None], axis=1)[:, 0]
    return token_ids[cluster, candidates % m].astype(mx.uint32)


def _reference(
    values: mx.array,
    indices: mx.array | None,
    probes: mx.array | None,
    token_ids: mx.array | None,
) -> mx.array:
    """:func:`greedy` in plain MLX."""
    best = mx.argmax(mx.where(mx.isnan(values), -mx.inf, values), axis=-1)
    if indices is not None:
        best = mx.take_along_axis(indices, best[:, None], axis=1)[:, 0]
    return to_tokens(best, probes, token_ids)


def _launch(
    values: mx.array,
    indices: mx.array | None,
    probes: mx.array | None,
    token_ids: mx.array | None,
    threads: int,
) -> mx.array:
    unused = backend.unused()
    template: backend.Template = [
        ("INDEXED", indices is not None),
        ("MAPPED", probes is not None),
        ("M", 1 if token_ids is None else token_ids.shape[1]),
    ]
    return _kernel(
        [
            values,
            unused if indices is None else indices,
            unused if probes is None else probes,
            unused if token_ids is None else token_ids,
        ],
        template=template,
        groups=(1, len(values)),
        threads=threads,
        outputs=[((len(values),), mx.uint32)],
    )[0]
