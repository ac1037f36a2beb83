"""The plain-MLX side of the kernels against float64 NumPy and Python integers."""

from contextvars import ContextVar

import mlx.core as mx
import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from metal import reference

from mlx_flashhead import kernels
from mlx_flashhead.kernels import backend, doctor, filters, fixed_point

DTYPES = [mx.float16, mx.bfloat16, mx.float32]
FLOATS = st.one_of(
    st.sampled_from([0.0, -0.0, 1.0, np.inf, -np.inf, np.nan]),
    st.floats(-100, 100, width=16),
)


@pytest.fixture(autouse=True, scope="module")
def plain():
    with kernels.plain():
        yield


# ---- select_probes -----------------------------------------------------------------


@settings(deadline=None, max_examples=60)
@given(data=st.data(), C=st.integers(1, 70), B=st.integers(1, 3))
def test_select_probes(data, C, B):
    p = data.draw(st.integers(1, C))
    scores = np.array(
        data.draw(st.lists(FLOATS, min_size=B * C, max_size=B * C)), np.float32
    ).reshape(B, C)
    got = kernels.select_probes(mx.array(scores), p)
    assert got.dtype == mx.uint32
    np.testing.assert_array_equal(np.array(got), reference.select(scores, p))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_select_probes_adds_the_spread_in_float32(dtype):
    scores = mx.random.normal((2, 400), key=mx.random.key(0)).astype(dtype)
    spread = mx.random.normal((400,), key=mx.random.key(1))
    total = np.array(scores.astype(mx.float32)) + np.array(spread)
    got = kernels.select_probes(scores, 25, spread=spread)
    np.testing.assert_array_equal(np.array(got), reference.select(total, 25))


def test_select_probes_refuses():
    scores = mx.zeros((2, 8))
    for p in (0, 9):
        with pytest.raises(ValueError, match="n_probes"):
            kernels.select_probes(scores, p)
    with pytest.raises(ValueError, match="spread"):
        kernels.select_probes(scores, 2, spread=mx.zeros(7))
    with pytest.raises(ValueError, match="scores"):
        kernels.select_probes(mx.zeros(8), 2)


# ---- probe_logits ------------------------------------------------------------------


def case(dtype, bits, group_size, B=2, C=5, m=4, D=256, p=3):
    key = mx.random.key(bits + group_size)
    x = mx.random.normal((B, D), key=key).astype(dtype)
    weight = mx.random.normal((C, m, D), key=key).astype(dtype)
    arrays = (weight, None, None)
    if bits:
        arrays = mx.quantize(weight, group_size=group_size, bits=bits)
    probes = mx.array([[0, 2, C - 1], [1, 2, 3]], dtype=mx.uint32)[:B, :p]
    return x, *arrays, probes


@pytest.mark.parametrize("group_size", [32, 64, 128])
@pytest.mark.parametrize("bits", [0, 4, 5, 6, 8])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_probe_logits(dtype, bits, group_size):
    args = case(dtype, bits, group_size)
    sizes = {"group_size": group_size, "bits": bits or 8, "n_rows": 18}
    want, bound = reference.logits(*args, group_size, bits, 18)
    got = np.array(kernels.probe_logits(*args, **sizes))
    assert np.isneginf(got[0, -2:]).all() and np.isneginf(want[0, -2:]).all()
    finite = np.isfinite(want)
    assert (np.abs(got[finite] - want[finite]) <= bound[finite]).all()


def test_probe_logits_refuses():
    x, weight, scales, biases, probes = case(mx.float32, 8, 64)
    good = {"group_size": 64, "bits": 8}
    for args, sizes, match in [
        ((x[:, :40], weight, scales, biases, probes), good, "multiple of 32"),
        ((x, weight, scales, None, probes), good, "together"),
        ((x, weight, scales, biases, probes[0]), good, "probes"),
        ((x, weight, scales, biases, probes), {"group_size": 32}, "group"),
        ((x, weight, scales, biases, probes), {"group_size": 64, "bits": 3}, "bits"),
        ((x, weight[0], scales, biases, probes), good, "weight"),
        ((x, weight, scales.astype(mx.float16), biases, probes), good, "float16"),
        ((x, weight, scales, biases, probes), {**good, "n_rows": 21}, "n_rows"),
    ]:
        with pytest.raises(ValueError, match=match):
            kernels.probe_logits(*args, **sizes)


# ---- the filters -------------------------------------------------------------------


@settings(deadline=None, max_examples=80)
@given(
    row=st.lists(st.integers(-80, 80).map(lambda i: i / 8), min_size=1, max_size=60),
    top_p=st.sampled_from([0.13, 0.5, 0.951, 1.0]),
    min_p=st.sampled_from([0.0, 0.033, 0.3]),
    top_k=st.sampled_from([0, 1, 7]),
    tail=st.one_of(st.none(), st.floats(-5, 12)),
)
def test_filters(row, top_p, min_p, top_k, tail):
    """Where a candidate, or the tail, ends within 1e-6 of top-p, either is right."""
    values = mx.array([row, row[::-1]])
    top = values.max(axis=-1, keepdims=True)
    distance = fixed_point.levels_below(top, values, fixed_point.LOG2E)
    behind = None if tail is None else top[:, 0] - tail
    rules = filters.Rules(top_p, min_p, top_k=top_k)
    got, got_tail = filters.keep(distance, rules, behind)
    least, most = (
        reference.kept(np.array(row), p, min_p, top_k=top_k, tail=tail)
        for p in ((top_p - 1e-6, top_p + 1e-6) if top_p < 1 else (1.0, 1.0))
    )
    for found in (np.array(got[0]), np.array(got[1])[::-1]):
        assert (least[0] <= found).all() and (found <= most[0]).all()
    for found in got_tail.tolist():
        assert least[1] <= found <= most[1]


# ---- draft -------------------------------------------------------------------------


def test_draft_greedy():
    """Of equals the lowest id; NaN never wins."""
    values = mx.array([[1.0, mx.nan, 3.0, 3.0], [-mx.inf, mx.nan, -mx.inf, -5.0]])
    probes = mx.array([[1, 3], [0, 2]], dtype=mx.uint32)
    ids = mx.array([[0, 10], [20, 30], [40, 50], [70, 60]], dtype=mx.uint32)
    got = kernels.draft_greedy(values, probes, ids, kernels.Shaping())
    assert got.tolist() == [60, 50]


def test_exp2_is_accurate():
    x = np.random.default_rng(0).integers(0, 2**32, 20_000)
    x[:3] = 0, 2**26, 2**32 - 1
    got = np.array(fixed_point.exp2_negative(mx.array(x.astype(np.uint32)), 8))
    want = 2.0 ** (40 - x / 2**26)
    assert (np.abs(got - want) <= 4e-9 * want + 1).all()


# ---- the back-end ------------------------------------------------------------------


def test_without_a_gpu_all_is_plain(monkeypatch):
    if mx.default_device().type == mx.DeviceType.gpu:
        pytest.skip("there is a GPU")
    monkeypatch.setattr(backend, "_disabled", ContextVar("off", default=False))
    assert kernels.kind() == "plain"
    assert not backend.largest_group("anything", 256, lambda threads: 1 / 0)
    report = doctor.report()
    assert report["backend"] == "plain" and "self_test" not in report
    result = CliRunner().invoke(doctor.main, [])
    assert result.exit_code == 0 and "plain MLX operations" in result.output
