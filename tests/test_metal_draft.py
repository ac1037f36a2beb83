"""The kernels of drafts: their Metal text, run on the CPU, against plain MLX."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from metal import emulator

from mlx_flashhead import kernels
from mlx_flashhead.kernels import backend, draft, filters
from mlx_flashhead.kernels.probe_logits import _reference as probe_reference

F16, BF16, F32 = mx.float16, mx.bfloat16, mx.float32


@pytest.fixture(autouse=True)
def metal(monkeypatch):
    """The emulator takes the place of a Metal device that is trusted."""
    monkeypatch.setattr(backend, "kind", lambda: "metal")
    monkeypatch.setattr(backend, "largest_group", lambda variant, most, check: most)
    monkeypatch.setattr(backend.Kernel, "__call__", emulator.launch)


def normal(*shape, seed=0, scale=1.0):
    values = np.random.default_rng(seed).normal(size=shape) * scale
    return mx.array(values.astype(np.float32))


def probes_of(b, c, p, seed=1):
    rng = np.random.default_rng(seed)
    chosen = [np.sort(rng.permutation(c)[:p]) for _ in range(b)]
    return mx.array(np.stack(chosen).astype(np.uint32))


GREEDY = [
    # m, p, C, rounding, softcap
    (16, 5, 9, F32, None),
    (16, 40, 50, BF16, None),
    (7, 33, 60, F16, 30.0),
    (16, 300, 400, BF16, 30.0),
]


@pytest.mark.parametrize("m, p, c, rounding, softcap", GREEDY)
def test_greedy(m, p, c, rounding, softcap):
    """Ties, which rounding makes, go to the lowest id."""
    logits = normal(3, p * m, seed=p) * (0.02 if rounding == BF16 else 2) + 4
    logits[1, ::3] = -mx.inf
    logits[2] = -mx.inf
    ids = np.random.default_rng(0).permutation(c * m).reshape(c, m)
    probes, ids = probes_of(3, c, p), mx.array(ids.astype(np.uint32))
    shaping = kernels.Shaping(rounding, 0.5 if softcap else 1.0, softcap)
    got = kernels.draft_greedy(logits, probes, ids, shaping)
    values = np.array(shaping(logits))
    tokens = np.array(ids[probes]).reshape(3, -1)
    want = [tokens[i][v == v.max()].min() for i, v in enumerate(values)]
    assert got.tolist() == [int(t) for t in want]
    if rounding == BF16:
        assert (values[0] == values[0].max()).sum() > 1


@pytest.mark.parametrize("size", [1, 2, 33, 64, 97])
def test_noise_is_mlx(size):
    """One number of each cluster, from the same key as MLX's, odd counts included."""
    kernel = backend.Kernel(
        "gumbel_numbers",
        ["key", "size"],
        ["numbers"],
        """
    uint i = thread_position_in_threadgroup.x;
    if (i < size[0]) {
        numbers[i] = gumbel(key[0], key[1], i, size[0]);
    }
""",
        draft._HEADER_ALL,
    )
    key = mx.random.key(7)
    padded = mx.concatenate([key, mx.zeros(6, mx.uint32)])
    (got,) = kernel(
        [padded, mx.array([size] * 8, mx.uint32)],
        template=[],
        groups=(1, 1),
        threads=128,
        outputs=[((size,), mx.float32)],
    )
    want = mx.random.gumbel((size,), key=key)
    np.testing.assert_allclose(np.array(got), np.array(want), rtol=1e-5, atol=1e-6)


LAWS = [
    kernels.Law(0.8),
    kernels.Law(0.7, filters.Rules(top_p=0.9)),
    kernels.Law(1.1, filters.Rules(min_p=0.05)),
    kernels.Law(0.9, filters.Rules(top_k=7)),
    kernels.Law(0.9, filters.Rules(top_p=0.97, min_p=0.01, top_k=60)),
]
TABLES = [
    # m, p, C, D, bits (0: not quantized), group_size, x, scales, rounding, softcap
    (16, 6, 25, 64, 8, 64, F32, F32, F32, None),
    (16, 20, 40, 96, 8, 32, BF16, F16, F32, None),
    (5, 12, 33, 640, 4, 64, BF16, BF16, BF16, 30.0),
    (16, 9, 9, 64, 6, 64, F16, F16, F16, None),
    (16, 130, 400, 64, 0, 32, BF16, None, BF16, None),
]


@pytest.mark.parametrize("table", TABLES, ids=str)
@pytest.mark.parametrize("law", LAWS, ids=str)
def test_sampled(law, table):
    """Where rounding moves no edge, the token is the one of the plain reference."""
    m, p, c, d, bits, group_size, dtype, scales, rounding, softcap = table
    b = 4 if p < 100 else 1
    x = normal(b, d, seed=2).astype(dtype)
    dense = normal(c, m, d, seed=3, scale=1.5 * d**-0.5)
    if bits:
        weight, s, o = mx.quantize(
            dense.astype(scales), group_size=group_size, bits=bits
        )
    else:
        weight, s, o = dense.astype(dtype), None, None
    n_rows = c * m - m // 3
    probes = probes_of(b, c, p)

    def exact(clusters):
        y = probe_reference(
            *(False, x, weight, s, o, clusters, group_size, bits or 8, n_rows, True)
        )[0]
        return y.reshape(b, -1, m)

    logits = exact(probes).reshape(b, -1)
    rows = kernels.Rows(x, weight, s, o, bits or 8 * dtype.size, group_size, n_rows)
    tail = kernels.Tail(
        normal(b, c, seed=4).astype(dtype), normal(c, seed=5), normal(c, seed=6),
        exact, rows, p == c,
    )  # fmt: skip
    ids = mx.arange(c * m, dtype=mx.uint32).reshape(c, m)
    shaping = kernels.Shaping(rounding, 1.0, softcap)
    outside = same = 0
    for seed in range(3):
        keys = mx.random.split(mx.random.key(seed), b)
        args = (logits, probes, ids, shaping, keys, law, tail)
        got = np.array(kernels.draft_sampled(*args))
        want = np.array(draft._reference(*args))
        same += (got == want).sum()
        outside += (~(np.array(probes) == (want // m)[:, None]).any(1)).sum()
    assert same >= 3 * b - 1
    # Somewhere the draw falls on a cluster that was not probed.
    if law == LAWS[0] and 2 * p < c:
        assert outside > 0
