"""The head against a float64 reference, the dense product and its own promises."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx.utils import tree_flatten
from small_heads import expected, make_head, random_states, unpack

from mlx_flashhead import FlashHead
from mlx_flashhead.compute.table import Table
from mlx_flashhead.head import ALWAYS, default_n_probes, prefers_dense
from mlx_flashhead.integration.slots import FlashEmbedding

# bits of the rows, of the centroids, and dtype of what is not quantized
FORMATS = [
    (32, 32, mx.float32),
    (16, 16, mx.bfloat16),
    (16, 4, mx.float16),
    (8, 4, mx.float32),
    (8, 4, mx.bfloat16),
    (6, 4, mx.float32),
    (5, 5, mx.float32),
    (4, 4, mx.float16),
    (4, 2, mx.float32),
    (3, 3, mx.float32),
]


def check(head: FlashHead, x: np.ndarray, atol: float = 2e-4) -> None:
    """``head(x)`` and ``head.candidates(x)`` against the reference, for ``[B, D]``."""
    want = expected(head, x)
    sure = want.margin > atol  # too close to call is not an error
    assert sure.mean() > 0.8
    logits = np.array(head(mx.array(x)))
    assert logits.dtype == np.float32
    assert np.isfinite(logits).all()
    np.testing.assert_allclose(logits[sure], want.logits[sure], atol=atol, rtol=1e-5)

    found = head.candidates(mx.array(x))
    ids, values = np.array(found.ids), np.array(found.logits)
    token_ids = np.array(head.token_ids)
    for b in np.flatnonzero(sure):
        probed = token_ids[sorted(want.probes[b])].reshape(-1)
        assert sorted(ids[b]) == sorted(probed)
        real = ids[b] < head.vocab_size
        exact = want.dense[b, ids[b][real]]
        np.testing.assert_allclose(values[b][real], exact, atol=atol, rtol=1e-5)
        assert (values[b][~real] == -np.inf).all()


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("bits, centroid_bits, dtype", FORMATS)
def test_logits_and_candidates_equal_the_reference(bits, centroid_bits, dtype, bias):
    made = make_head(bits=bits, centroid_bits=centroid_bits, dtype=dtype, bias=bias)
    assert made.head.rows.bits == bits
    check(made.head, random_states(8))


@given(
    vocab_size=st.integers(20, 400),
    cluster_size=st.integers(2, 20),
    bits=st.sampled_from([32, 8, 4]),
    bias=st.booleans(),
    seed=st.integers(0, 1000),
    data=st.data(),
)
@settings(max_examples=40)
def test_any_shape_equals_the_reference(
    vocab_size, cluster_size, bits, bias, seed, data
):
    c = -(-vocab_size // cluster_size)
    n_probes = data.draw(st.integers(1, c))
    made = make_head(
        vocab_size,
        32,
        cluster_size,
        n_probes,
        bits=bits,
        bias=bias,
        padding_scale=50.0,
        seed=seed,
    )
    x = random_states(1, 32, seed)
    want = expected(made.head, x)
    logits = np.array(made.head(mx.array(x)))
    if made.head.rows_read() >= vocab_size:
        np.testing.assert_allclose(logits, want.dense, atol=2e-4, rtol=1e-5)
    elif want.margin[0] > 2e-4:
        np.testing.assert_allclose(logits, want.logits, atol=2e-4, rtol=1e-5)


def test_each_row_of_a_batch_has_probes_of_its_own():
    head = make_head().head
    x = mx.array(random_states(6))
    together = np.array(head(x[:, None]))
    assert together.shape == (6, 1, 500)
    probes = {tuple(r) for r in np.array(head.select(head.centroid_logits(x))).tolist()}
    assert len(probes) > 1
    for b in range(6):
        alone = np.array(head(x[b][None, None]))[0, 0]
        np.testing.assert_allclose(together[b, 0], alone, atol=1e-4)


def test_shapes_and_dtypes_follow_the_input():
    head = make_head(n_probes=1).head
    for shape in [(64,), (1, 64), (3, 64), (1, 1, 64), (3, 1, 64), (2, 5, 64)]:
        for dtype in (mx.float32, mx.float16, mx.bfloat16):
            x = mx.random.normal(shape).astype(dtype)
            assert head(x).shape == (*shape[:-1], 500)
            assert head(x).dtype == dtype
            found = head.candidates(x)
            assert found.ids.shape == found.logits.shape == (*shape[:-1], 8)
            assert found.ids.dtype == mx.uint32
            assert found.logits.dtype == mx.float32


@pytest.mark.parametrize("n_probes", [1, 62, 63])
def test_n_probes_from_one_to_all(n_probes):
    head = make_head(n_probes=n_probes).head
    assert head.n_clusters == 63
    want = expected(head, random_states(4))
    x = mx.array(random_states(4))
    found = head.candidates(x)
    assert found.ids.shape == (4, n_probes * 8)
    if n_probes == 63:
        real = np.sort(np.array(found.ids), axis=1)[:, :500]
        assert (real == np.arange(500)).all()
        np.testing.assert_allclose(np.array(head(x)), want.dense, atol=2e-4)
    else:
        assert np.isfinite(np.array(head(x))).all()


def test_n_probes_can_be_changed_at_any_time():
    head = make_head(n_probes=2).head
    for n in (5, 1, 3):
        head.n_probes = n
        assert head.n_probes == n
        check(head, random_states(1))


@pytest.mark.parametrize("n_probes", [0, -1, 64, True, 2.0, "3", np.int64(3), None])
def test_n_probes_that_make_no_sense(n_probes):
    head = make_head(n_probes=2).head
    with pytest.raises(ValueError, match=r"^n_probes must be an integer from 1 to 63"):
        head.n_probes = n_probes
    assert head.n_probes == 2


def test_a_head_cannot_be_made_with_no_probes():
    with pytest.raises(ValueError, match="n_probes"):
        make_head(n_probes=0)
    assert make_head(n_probes=None).head.n_probes == default_n_probes(63) == 3
    assert default_n_probes(5) == 1


# ---------------------------------------------------------------------------
# Dense
# ---------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [4, 5, 6, 8])
def test_dense_equals_a_quantized_linear_bit_for_bit(bits):
    made = make_head(bits=bits)
    linear = nn.QuantizedLinear(64, 500, bias=False, group_size=32, bits=bits)
    linear.weight, linear.scales, linear.biases = made.table.arrays
    for shape in [(1, 64), (7, 64), (2, 3, 64)]:
        x = mx.random.normal(shape)
        assert mx.array_equal(made.head.dense(x), linear(x))


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16, mx.float16])
def test_dense_equals_a_linear_bit_for_bit(dtype):
    """Small integers have exact products, whatever the order of the sum."""
    rng = np.random.default_rng(0)
    made = make_head(bits=16, dtype=dtype, centroid_bits=16)
    weight = mx.array(rng.integers(-3, 4, (500, 64))).astype(dtype)
    linear = nn.Linear(64, 500, bias=False)
    linear.weight = weight
    order = mx.minimum(made.head.token_ids, 499)
    made.head.rows = Table(weight[order], bits=8 * dtype.size)
    x = mx.array(rng.integers(-2, 3, (2, 3, 64))).astype(dtype)
    assert mx.array_equal(made.head.dense(x), linear(x))
    assert mx.array_equal(made.head(x), linear(x))


def test_dense_adds_the_bias():
    made = make_head(bits=32, bias=True)
    linear = nn.Linear(64, 500)
    linear.weight, linear.bias = made.table.weight, mx.array(made.bias)
    x = mx.array(random_states(6)).reshape(2, 3, 64)
    assert mx.allclose(made.head.dense(x), linear(x), atol=1e-4)


def test_prompts_go_dense():
    head = make_head(n_probes=1).head
    x = mx.array(random_states(6)).reshape(2, 3, 64)
    assert mx.array_equal(head(x), head.dense(x))
    # A decode step does not.
    assert not mx.allclose(head(x[:, :1]), head.dense(x[:, :1]), atol=1e-2)


def test_a_step_that_would_read_all_rows_goes_dense():
    head = make_head(n_probes=54).head
    x = mx.array(random_states(5))
    assert head.rows_read() < 500 and not mx.array_equal(head(x), head.dense(x))
    head.n_probes = 55
    assert head.rows_read() >= 500 and mx.array_equal(head(x), head.dense(x))


def test_on_a_gpu_large_batches_go_dense(monkeypatch):
    head = make_head(n_probes=3).head
    assert not prefers_dense(head, 10_000)
    gpu = mx.Device(mx.gpu)
    monkeypatch.setattr("mlx_flashhead.compute.device.mx.default_device", lambda: gpu)
    limits = {False: 0.55, True: 2.5}
    for sorts, limit in limits.items():
        dense = [prefers_dense(head, n, sorts) for n in range(1, 80)]
        reads = [head.rows_read(n) / 500 >= limit for n in range(1, 80)]
        assert dense == reads and 0 < sum(dense) < 79


# ---------------------------------------------------------------------------
# Padding, clusters that are always probed, extreme values
# ---------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("bits", [8, 32])
def test_padding_is_never_chosen_even_where_its_row_would_win(bits, bias):
    made = make_head(497, bits=bits, bias=bias, padding_scale=1000.0)
    head = made.head
    assert head.padding == 7
    # Always probe the last cluster, so that its padding is scored at every step.
    head.spread[-1] = ALWAYS
    for n_probes in (1, 3, head.n_clusters):
        head.n_probes = n_probes
        x = mx.array(random_states(4))
        found = head.candidates(x)
        values = np.array(found.logits)
        padded = np.array(found.ids) == 497
        assert padded.sum(1).tolist() == [7] * 4
        assert (values[padded] == -np.inf).all()
        assert np.isfinite(values[~padded]).all()
        best = np.take_along_axis(np.array(found.ids), values.argmax(1)[:, None], 1)
        assert (best < 497).all()
        logits = np.array(head(x))
        assert logits.shape == (4, 497)
        assert np.isfinite(logits).all()
        want = expected(head, np.array(x))
        last = np.array(head.token_ids)[-1, 0]
        np.testing.assert_allclose(logits[:, last], want.dense[:, last], atol=1e-3)


def test_clusters_that_are_always_probed():
    head = make_head(n_probes=4).head
    head.spread[5] = ALWAYS
    head.spread[40] = ALWAYS
    probes = np.array(head.select(head.centroid_logits(mx.array(random_states(5)))))
    for row in probes.tolist():
        assert row == sorted(set(row))
        assert {5, 40} <= set(row)
    check(head, random_states(5))


@pytest.mark.parametrize("scale", [0.0, 1e-20, 1e4, 1e15])
def test_finite_everywhere(scale):
    made = make_head(497, bits=8)
    logits = made.head(mx.array(scale * random_states(3)))
    assert mx.isfinite(logits).all().item()


def test_all_scores_alike():
    """Nothing tells the clusters apart: still p different ones, and finite logits."""
    head = make_head(bits=32).head
    head.spread = mx.zeros(63)
    probes = np.array(head.select(head.centroid_logits(mx.zeros((2, 64)))))
    assert all(len(set(row)) == 3 for row in probes.tolist())
    assert mx.isfinite(head(mx.zeros((2, 64)))).all().item()


# ---------------------------------------------------------------------------
# As an embedding, and as a module
# ---------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [4, 6, 8, 16, 32])
def test_embedding_and_head_share_one_table(bits):
    dtype = mx.bfloat16 if bits == 16 else mx.float32
    made = make_head(497, bits=bits, dtype=dtype, centroid_bits=4)
    embedding = FlashEmbedding(made.head)
    ids = mx.array([[0, 496, 3], [3, 250, 1]])
    assert mx.array_equal(embedding(ids), made.table.take(ids))
    wanted = unpack(made.table)[np.array(ids)]
    np.testing.assert_allclose(
        np.array(embedding(ids).astype(mx.float32)), wanted, atol=1e-4, rtol=1e-5
    )
    x = mx.array(random_states(2))[:, None]
    assert mx.array_equal(embedding.as_linear(x), made.head(x))
    assert sum(a.nbytes for _, a in tree_flatten(embedding.parameters())) == sum(
        a.nbytes for _, a in tree_flatten(made.head.parameters())
    )


def test_parameters_are_what_is_stored_and_none_is_trained():
    made = make_head(bias=True)
    names = {name for name, _ in tree_flatten(made.head.parameters())}
    assert names == {
        *(f"rows.{part}" for part in ("weight", "scales", "biases")),
        *(f"centroids.{part}" for part in ("weight", "scales", "biases")),
        *("token_ids", "spread", "excess", "bias"),
    }
    assert tree_flatten(made.head.trainable_parameters()) == []


def test_set_dtype_keeps_the_head_working():
    head = make_head(bits=8, dtype=mx.bfloat16).head
    head.set_dtype(mx.float32)
    assert head.token_ids.dtype == mx.uint32
    check(head, random_states(4))


def test_bytes_and_rows_read():
    head = make_head(504, bits=8, n_probes=7).head
    assert head.n_clusters == 63
    assert head.rows_read() == 63 + 7 * 8
    assert head.rows_read(5) == 63 + 5 * 7 * 8
    row = 64 + 2 * 4 * 64 // 32  # 8-bit values, a float32 scale and bias per group
    centroid = 32 + 2 * 4 * 64 // 32
    assert head.bytes_read() == 7 * 8 * row + 63 * centroid + 63 * 4


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_tables_dequantize_to_their_bits(bits):
    weight = mx.array(random_states(9, 64, seed=bits))
    table = Table.from_dense(weight, bits, 32)
    assert (table.quantized, table.hidden_size, table.bits) == (True, 64, bits)
    rows = unpack(table)
    np.testing.assert_allclose(np.array(table.dequantize()), rows, atol=1e-5)
    assert np.abs(rows - np.array(weight)).max() < 6.0 / (2**bits - 1)


def test_tables_of_16_bits_are_kept():
    weight = mx.array(random_states(4)).astype(mx.bfloat16)
    table = Table.from_dense(weight, 16, 0)
    assert table.bits == 16 and not table.quantized
    assert mx.array_equal(table.dequantize(), weight)
    assert table.dtype == mx.bfloat16
    assert table.nbytes == 4 * 64 * 2


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16])
def test_rows_in_float32_are_those_of_the_products(bits, dtype):
    """MLX itself would round them to the dtype of the scales."""
    weight = mx.array(random_states(40)).astype(dtype)
    table = Table.from_dense(weight, bits, 32)
    rows = np.array(table.dequantize(mx.float32))
    np.testing.assert_allclose(rows, unpack(table), rtol=1e-6, atol=1e-7)
    each = np.array(table.matmul(mx.eye(64)))
    np.testing.assert_allclose(each.T, rows, atol=1e-6)
