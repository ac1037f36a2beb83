"""The best candidate of each row, in one launch."""

import mlx.core as mx

from . import backend
from ._prelude import LARGE_GROUP, TOKEN

_SOURCE = """
    uint tid = thread_position_in_threadgroup.x;
    uint lane = thread_index_in_simdgroup;
    uint group = simdgroup_index_in_threadgroup;
    uint row = threadgroup_position_in_grid.y;
    uint n = values_shape[1];
    size_t base = size_t(row) * n;

    // NaN never compares greater, so it never wins.
    float best = -INFINITY;
    uint at = ~0u;
    for (uint i = tid; i < n; i += THREADS) {
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
    if (lane == 0) {
        bests[group] = top;
        ats[group] = at;
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    if (group == 0) {
        best = lane < THREADS / 32 ? bests[lane] : -INFINITY;
        at = lane < THREADS / 32 ? ats[lane] : ~0u;
        top = simd_max(best);
        at = simd_min(best == top ? at : ~0u);
        if (lane == 0) {
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
    if values.ndim != 2 or not values.size:
        raise ValueError(f"values must be [B, K], not {values.shape}")
    if indices is not None and indices.shape != values.shape:
        raise ValueError(f"indices must be {values.shape}, not {indices.shape}")
    check_tokens(values.shape[0], probes, token_ids)
    name = str(values.dtype).split(".")[-1]
    options = (
        [name] + ["indices"] * (indices is not None) + ["tokens"] * (probes is not None)
    )
    variant = f"greedy({', '.join(options)})"
    args = (values.dtype, indices is not None, probes is not None)
    if backend.ready(variant, lambda: _check(*args)):
        return _launch(values, indices, probes, token_ids)
    return _reference(values, indices, probes, token_ids)


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
) -> mx.array:
    B, K = values.shape
    threads = LARGE_GROUP if K > 4096 else 256
    unused = backend.unused()
    template = [
        ("THREADS", threads),
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
        groups=(1, B),
        threads=threads,
        outputs=[((B,), mx.uint32)],
    )[0]


def _check(dtype: mx.Dtype, indexed: bool, tokens: bool) -> None:
    p, m = 40, 3
    values = ((mx.arange(2 * p * m) * 29) % 61).reshape(2, p * m).astype(dtype) / 4
    indices = probes = token_ids = None
    if indexed:
        indices = mx.arange(2 * p * m, dtype=mx.uint32).reshape(2, -1)[:, ::-1] % (
            p * m
        )
    if tokens:
        probes = mx.arange(2 * p, dtype=mx.uint32).reshape(2, p)
        token_ids = (mx.arange(2 * p * m, dtype=mx.uint32) * 7).reshape(2 * p, m)
    args = (values, indices, probes, token_ids)
    backend.expect_close("greedy", _launch(*args), _reference(*args))
