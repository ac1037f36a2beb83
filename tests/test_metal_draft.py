"""The kernels of drafts: their Metal text, run on the CPU, against plain MLX."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from metal import emulator

from mlx_flashhead import kernels
from mlx_flashhead.kernels import backend, doctor, draft
from mlx_flashhead.kernels.probe_logits import _reference as probe_reference

BF16 = mx.bfloat16


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


def cases(drawn):
    return [
        pytest.param(case, id=doctor._described(case))
        for case in draft.CASES
        if (case.law is not None) == drawn
    ]


@pytest.mark.parametrize("case", cases(drawn=False))
def test_greedy(case):
    """Ties, which rounding makes, go to the lowest id."""
    _, m, p, c, *_, rounding, softcap = case
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


@pytest.mark.parametrize("case", cases(drawn=True))
def test_sampled(case):
    """Where rounding moves no edge, the token is the one of the plain reference."""
    law, m, p, c, d, bits, group_size, dtype, scales, rounding, softcap = case
    scales = scales or dtype
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
            *(x, weight, s, o, clusters, group_size, bits or 8, n_rows, True)
        )
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
    if law.rules is None and 2 * p < c:
        assert outside > 0
