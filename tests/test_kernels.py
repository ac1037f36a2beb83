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
from mlx_flashhead.doctor import main as doctor_command
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
    bias = mx.random.normal((C, m), key=key) if bits == 8 else None
    return kernels.Rows(x, *arrays, bits or 8, group_size, 18, bias), probes


@pytest.mark.parametrize("group_size", [32, 64, 128])
@pytest.mark.parametrize("bits", [0, 4, 5, 6, 8])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_probe_logits(dtype, bits, group_size):
    rows, probes = case(dtype, bits, group_size)
    want, bound = reference.logits(
        *rows[:4], probes, group_size, bits, rows.n_rows, rows.bias
    )
    got = np.array(kernels.probe_logits(rows, probes))
    assert np.isneginf(got[0, -2:]).all() and np.isneginf(want[0, -2:]).all()
    finite = np.isfinite(want)
    assert (np.abs(got[finite] - want[finite]) <= bound[finite]).all()


def test_probe_logits_refuses():
    rows, probes = case(mx.float32, 8, 64)
    for change, match in [
        ({"x": rows.x[:, :40]}, "multiple of 32"),
        ({"biases": None}, "together"),
        ({"group_size": 32}, "group"),
        ({"bits": 3}, "bits"),
        ({"weight": rows.weight[0]}, "weight"),
        ({"scales": rows.scales.astype(mx.float16)}, "float16"),
        ({"n_rows": 21}, "n_rows"),
        ({"bias": mx.zeros(4)}, "bias"),
    ]:
        with pytest.raises(ValueError, match=match):
            kernels.probe_logits(rows._replace(**change), probes)
    with pytest.raises(ValueError, match="probes"):
        kernels.probe_logits(rows, probes[0])


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


def drawn(law=None, B=2):
    """What is asked of 3 of 5 clusters of 2 tokens, and logits of those."""
    key = mx.random.key(3)
    probes = mx.array([[0, 2, 3], [1, 2, 4]] * B, mx.uint32)[:B]
    tail = kernels.Tail(
        mx.random.normal((B, 5), key=key),
        *(mx.array([0.5, 1.0, 2.0, 0.0, -1.0]) for _ in range(2)),
        lambda clusters: (clusters[..., None] + mx.arange(2)) * 0.3,
        None,
    )
    ids = mx.array([[0, 7], [2, 3], [4, 5], [6, 1], [9, 8]], mx.uint32)
    keys = mx.random.split(key, B)
    draw = kernels.Draw(probes, ids, kernels.Shaping(), tail, law, keys)
    return mx.random.normal((B, 6), key=key), draw


def test_draft_greedy():
    """Of equals the lowest id; NaN never wins."""
    values = mx.array([[1.0, mx.nan, 3.0, 3.0], [-mx.inf, mx.nan, -mx.inf, -5.0]])
    probes = mx.array([[1, 3], [0, 2]], dtype=mx.uint32)
    ids = mx.array([[0, 10], [20, 30], [40, 50], [70, 60]], dtype=mx.uint32)
    _, draw = drawn()
    draw = draw._replace(probes=probes, token_ids=ids)
    assert kernels.draft(values, draw).tokens.tolist() == [60, 50]


@pytest.mark.parametrize("law", [None, kernels.Law(1.5)])
def test_log_probabilities(law):
    """Exact where scored, in the cluster that was drawn, too; expected elsewhere."""
    logits, draw = drawn(law, 40)
    got = kernels.draft(logits, draw)
    tail, ids = draw.tail, np.array(draw.token_ids)
    expected = np.array(tail.centroid_logits + tail.at_one)
    outside = 0
    for row, token in enumerate(got.tokens.tolist()):
        cluster, at = np.argwhere(ids == token)[0]
        masses = expected[row].astype(np.float64)
        probes = draw.probes[row].tolist()
        values = dict(zip(probes, np.array(logits[row]).reshape(3, 2)))
        if cluster not in probes:
            outside += 1
            values[cluster] = (cluster + np.arange(2)) * 0.3
        for c, value in values.items():
            masses[c] = np.logaddexp.reduce(value)
        want = values[cluster][at] - np.logaddexp.reduce(masses)
        assert abs(got.logprobs[row].item() - want) < 1e-5
    assert outside > 0 or law is None


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
    result = CliRunner().invoke(doctor_command, [])
    assert result.exit_code == 0 and "plain MLX operations" in result.output
