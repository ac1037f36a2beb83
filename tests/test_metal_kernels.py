"""The kernels' Metal text, run on the CPU and held against float64 NumPy.

Every launch here compiles the exact text that MLX generates twice, once with address
spaces enforced, and executes it under four thread schedules and the sanitizers, with
equal bits required (see ``metal/emulator.py``).
"""

import importlib
import itertools

import mlx.core as mx
import numpy as np
import pytest
from metal import emulator, reference

from mlx_flashhead.kernels import backend

select_probes, probe_logits, greedy, sample = (
    importlib.import_module(f"mlx_flashhead.kernels.{name}")
    for name in ("select_probes", "probe_logits", "greedy", "sample")
)

F16, BF16, F32 = mx.float16, mx.bfloat16, mx.float32


@pytest.fixture(autouse=True)
def metal(monkeypatch):
    """The emulator takes the place of a Metal device that is trusted."""
    monkeypatch.setattr(backend, "kind", lambda: "metal")
    monkeypatch.setattr(backend, "ready", lambda variant, check: True)
    monkeypatch.setattr(backend.Kernel, "__call__", emulator.launch)


def random(*shape, dtype=F32, seed=0, scale=1.0):
    values = np.random.default_rng(seed).normal(size=shape) * scale
    return mx.array(values.astype(np.float32)).astype(dtype)


# ---- select_probes -----------------------------------------------------------------

SELECT = [
    # dtype, B, C, p, spread
    (F32, 1, 1, 1, None),
    (F32, 2, 33, 5, F32),
    (BF16, 3, 300, 300, None),
    (F16, 2, 2048, 1, F16),
    (BF16, 1, 2049, 128, F32),
    (F32, 1, 8192, 512, F32),
    (F32, 2, 9000, 562, None),
]


@pytest.mark.parametrize("dtype, B, C, p, spread", SELECT)
def test_select_probes(dtype, B, C, p, spread):
    scores = random(B, C, dtype=dtype, seed=C)
    extra = None if spread is None else random(C, dtype=spread, seed=1)
    got = select_probes.select_probes(scores, p, spread=extra)
    total = np.array(scores.astype(F32))
    if extra is not None:
        total = total + np.array(extra.astype(F32))
    np.testing.assert_array_equal(np.array(got), reference.select(total, p))
    plain = select_probes._reference(scores, p, extra)
    assert mx.array_equal(got, plain)


@pytest.mark.parametrize("p", [1, 7, 150, 299])
def test_select_probes_breaks_ties_by_index(p):
    values = np.array([0.0, -0.0, np.inf, -np.inf, np.nan, -np.nan, 1.0, -2.0, 1e-40])
    picked = np.random.default_rng(p).choice(values, size=(2, 300))
    got = select_probes.select_probes(mx.array(picked.astype(np.float32)), p)
    want = reference.select(picked.astype(np.float32), p)
    np.testing.assert_array_equal(np.array(got), want)


# ---- probe_logits ------------------------------------------------------------------

PROBE = [
    # dtype, bits (0: not quantized), group_size, D, m, B, C, p
    (BF16, 8, 64, 640, 16, 1, 6, 3),
    (BF16, 8, 128, 1152, 16, 2, 4, 4),
    (F32, 8, 32, 2048, 16, 1, 3, 2),
    (F16, 8, 32, 96, 1, 3, 9, 5),
    (BF16, 4, 64, 896, 16, 1, 4, 3),
    (F16, 4, 32, 640, 40, 1, 3, 2),
    (F32, 4, 128, 1152, 3, 2, 5, 4),
    (BF16, 5, 64, 640, 16, 1, 5, 3),
    (F32, 5, 32, 32, 7, 2, 8, 3),
    (F16, 6, 128, 896, 16, 2, 4, 2),
    (BF16, 6, 32, 2048, 13, 1, 3, 3),
    (BF16, 0, 32, 640, 16, 2, 5, 3),
    (F16, 0, 32, 1152, 24, 1, 3, 2),
    (F32, 0, 32, 896, 16, 1, 3, 1),
    (F32, 0, 32, 32, 128, 1, 1, 1),
]


def table(dtype, bits, group_size, D, m, C):
    weight = random(C, m, D, dtype=dtype, seed=D + m, scale=D**-0.5)
    if not bits:
        return weight, None, None
    return tuple(mx.quantize(weight, group_size=group_size, bits=bits))


def check_probe(dtype, bits, group_size, D, m, B, C, p, stats, scales=None):
    arrays = table(scales or dtype, bits, group_size, D, m, C)
    x = random(B, D, dtype=dtype, seed=2)
    rng = np.random.default_rng(p)
    probes = np.stack([np.sort(rng.permutation(C)[:p]) for _ in range(B)])
    n_rows = C * m - m // 3
    probes[:, -1] = C - 1
    probes = mx.array(probes.astype(np.uint32))
    settings = {"group_size": group_size, "bits": bits or 8, "n_rows": n_rows}
    want, bound = reference.logits(x, *arrays, probes, group_size, bits, n_rows)
    if not stats:
        got = np.array(probe_logits.probe_logits(x, *arrays, probes, **settings))
    else:
        full = probe_logits.probe_logits_stats(x, *arrays, probes, **settings)
        got = np.array(full.logits)
        blocks = got.reshape(B, p, m)
        np.testing.assert_array_equal(np.array(full.block_max), blocks.max(-1))
        first = blocks.argmax(-1) + np.arange(p) * m
        np.testing.assert_array_equal(np.array(full.block_argmax), first)
    assert got.dtype == np.float32
    finite = np.isfinite(want)
    np.testing.assert_array_equal(got[~finite], want[~finite])
    assert (np.abs(got[finite] - want[finite]) <= bound[finite]).all()


@pytest.mark.parametrize("case", PROBE, ids=str)
def test_probe_logits(case):
    check_probe(*case, stats=PROBE.index(case) % 3 != 2)


@pytest.mark.parametrize(
    "dtype, scales, bits, group_size",
    [(BF16, F16, 4, 64), (BF16, F16, 8, 32), (BF16, F32, 8, 64), (F16, F32, 4, 64)],
)
def test_scales_may_be_finer_than_states(dtype, scales, bits, group_size):
    check_probe(dtype, bits, group_size, 640, 16, 2, 5, 3, True, scales)


MATRIX = list(
    itertools.product(
        [F16, BF16, F32],
        [(0, 32), *itertools.product((4, 5, 6, 8), (32, 64, 128))],
    )
)


@pytest.mark.full
@pytest.mark.parametrize("case", MATRIX, ids=str)
def test_probe_logits_matrix(case):
    """Every format, with sizes that go round."""
    dtype, (bits, group_size) = case
    i = MATRIX.index(case)
    D = (128, 640, 896, 1152, 2048)[i % 5]
    m = (1, 5, 16, 33)[i % 4]
    check_probe(dtype, bits, group_size, D, m, 2, 4, 3, stats=i % 2 == 0)


def test_a_cluster_of_padding_never_wins():
    weight = mx.ones((3, 4, 32))
    probes = mx.array([[0, 1, 2]], dtype=mx.uint32)
    full = probe_logits.probe_logits_stats(
        -mx.ones((1, 32)), weight, None, None, probes, n_rows=5
    )
    assert full.block_max.tolist() == [[-32.0, -32.0, -mx.inf]]
    assert full.block_argmax.tolist() == [[0, 4, 8]]


# ---- greedy and sample -------------------------------------------------------------


@pytest.mark.parametrize("B, K, dtype", [(1, 1, F32), (3, 700, BF16), (1, 5000, F32)])
def test_greedy(B, K, dtype):
    values = mx.round(random(B, K, dtype=dtype, seed=K) * 4)
    values[:, ::5] = mx.nan
    got = greedy.greedy(values)
    want = np.argmax(np.nan_to_num(np.array(values.astype(F32)), nan=-np.inf), -1)
    np.testing.assert_array_equal(np.array(got), want)


def test_greedy_gives_tokens():
    B, p, m, C = 2, 6, 16, 50
    blocks = random(B, p, seed=3)
    at = mx.array(
        np.arange(B * p, dtype=np.uint32).reshape(B, p) % 3 + 16 * np.arange(p)
    )
    at = at.astype(mx.uint32)
    probes = mx.array(np.arange(B * p, dtype=np.uint32).reshape(B, p) * 4)
    ids = mx.array(np.random.default_rng(0).permutation(C * m).astype(np.uint32))
    ids = ids.reshape(C, m)
    got = greedy.greedy(blocks, indices=at, probes=probes, token_ids=ids)
    for b in range(B):
        k = at[b, int(mx.argmax(blocks[b]))].item()
        assert got[b].item() == ids[probes[b, k // m].item(), k % m].item()


SAMPLE = [
    # B, K, settings, tail
    (1, 1, {}, None),
    (3, 1000, {"temperature": 0.7}, None),
    (2, 300, {"temperature": 1.5, "top_p": 0.9}, 1.0),
    (2, 5000, {"temperature": 0.8, "top_p": 0.95}, None),
    (1, 300, {"top_k": 20, "min_p": 0.01, "top_p": 0.99}, None),
    (1, 9000, {"temperature": 1.2, "top_p": 0.8, "top_k": 100}, None),
]


@pytest.mark.parametrize("B, K, settings, tail", SAMPLE)
def test_sample(B, K, settings, tail):
    logits = mx.round(random(B, K, seed=K, scale=3.0) * 8) / 8
    logits[:, 1::9] = -mx.inf
    logits[:, 2::19] = mx.nan
    rest = None if tail is None else mx.full((B, 2), tail + np.log(K) * 0.5)
    for seed in range(3):
        key = mx.array([seed, 77], dtype=mx.uint32)
        got = sample.sample(logits, key, tail=rest, **settings)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(backend, "ready", lambda *_: False)
            assert mx.array_equal(
                got, sample.sample(logits, key, tail=rest, **settings)
            )
        for b, chosen in enumerate(got.tolist()):
            edges = reference.intervals(
                reference.as_numpy(logits[b]),
                **settings,
                tail=None if rest is None else rest[b].tolist(),
            )
            u = reference.uniform((seed, 77), b, B)
            assert edges[chosen] - 1e-6 <= u <= edges[chosen + 1] + 1e-6


# ---- trust -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "check",
    [
        lambda: select_probes._check(300, F16),
        lambda: select_probes._check(9000, BF16, F32),
        lambda: probe_logits._check(True, mx.zeros((1, 640), BF16), 16, F16, 64, 8),
        lambda: probe_logits._check(False, mx.zeros((1, 64), F16), 16, None, 32, 16),
        lambda: greedy._check(F32, True, True),
        lambda: sample._check(9000, BF16, (True, False, True)),
    ],
)
def test_the_check_at_first_use_passes(check):
    check()
