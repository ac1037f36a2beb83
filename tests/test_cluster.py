"""Balanced clustering: a partition, balanced, good, and the same every time."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from mlx_flashhead.convert import clustering as clusters
from mlx_flashhead.convert.clustering import cluster, directions, match, metric_factor
from mlx_flashhead.convert.recipes import N_FREQUENT, always_tokens

from mlx_flashhead.compute import linalg


def unit(x: np.ndarray) -> np.ndarray:
    norm = np.linalg.norm(x, axis=-1, keepdims=True)
    return (x / np.where(norm > 0, norm, 1)).astype(np.float32)


def random_rows(n: int, d: int, seed: int = 0) -> np.ndarray:
    return unit(np.random.default_rng(seed).standard_normal((n, d)))


@st.composite
def vocabularies(draw) -> np.ndarray:
    """Rows with duplicates, zeros and crowds among them, as real heads have."""
    n = draw(st.integers(1, 260))
    d = draw(st.integers(1, 8))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    x = rng.standard_normal((n, d))
    if draw(st.booleans()):  # a crowd in one direction
        x[: n // 2] = x[0] + 0.01 * x[: n // 2]
    for kind in draw(st.lists(st.sampled_from(["copies", "zeros", "integers"]))):
        some = rng.random(n) < draw(st.sampled_from([0.05, 0.5, 1.0]))
        if kind == "copies":
            x[some] = x[rng.integers(n)]
        elif kind == "zeros":
            x[some] = 0
        else:
            x[some] = np.rint(x[some])
    return unit(x)


def partition_faults(token_ids: np.ndarray, vocab_size: int) -> list[str]:
    """What keeps token_ids from being a balanced partition; empty if nothing does."""
    c, m = token_ids.shape
    flat = token_ids.reshape(-1)
    faults = []
    if c != -(-vocab_size // m):
        faults.append(f"{c} clusters of {m} for {vocab_size} tokens")
    if sorted(flat[:vocab_size]) != list(range(vocab_size)):
        faults.append("not every token stands once in front of the padding")
    if (flat[vocab_size:] != vocab_size).any():
        faults.append("padding is not marked by vocab_size")
    return faults


@given(vocabularies(), st.integers(1, 40), st.integers(0, 2**31), st.data())
def test_every_token_once_and_padding_only_at_the_end(x, m, seed, data):
    always = data.draw(
        st.lists(st.integers(0, len(x) - 1), unique=True, max_size=min(len(x), 60))
    )
    result = cluster(x, m, always=np.array(always, np.int64), seed=seed, n_rounds=2)
    assert partition_faults(result.token_ids, len(x)) == []
    assert sorted(result.order) == list(range(len(x)))
    assert result.n_always == len(always) // m
    front = result.token_ids[: result.n_always].reshape(-1)
    assert front.tolist() == always[: len(front)]


@pytest.mark.parametrize("n, m", [(1, 16), (15, 16), (16, 16), (17, 16), (2048, 2)])
def test_sizes_at_the_edges(n, m):
    assert partition_faults(cluster(random_rows(n, 6), m).token_ids, n) == []


def test_all_rows_alike_or_zero():
    for x in (np.ones((100, 4), np.float32) / 2, np.zeros((100, 4), np.float32)):
        assert partition_faults(cluster(x, 16).token_ids, 100) == []


@given(vocabularies(), st.integers(2, 20), st.integers(0, 2**31))
def test_the_same_seed_gives_the_same_clusters(x, m, seed):
    first = cluster(x, m, seed=seed, n_rounds=2).token_ids
    assert np.array_equal(first, cluster(x, m, seed=seed, n_rounds=2).token_ids)


def test_other_seeds_give_other_clusters():
    x = random_rows(500, 8)
    results = {cluster(x, 10, seed=seed).token_ids.tobytes() for seed in range(5)}
    assert len(results) == 5


# ---------------------------------------------------------------------------
# Matching
# ---------------------------------------------------------------------------


def greedy(candidates, similarity, room) -> np.ndarray:
    """All pairs from the most similar down, each taken if both sides are free."""
    n, k = candidates.shape
    left = room.copy()
    owner = np.full(n, -1)
    pairs = [(similarity[t, i], t, i) for t in range(n) for i in range(k)]
    for _, t, i in sorted(pairs, reverse=True):
        c = candidates[t, i]
        if owner[t] < 0 and left[c] > 0:
            owner[t] = c
            left[c] -= 1
    return owner


@st.composite
def proposals(draw):
    n, n_clusters = draw(st.integers(1, 60)), draw(st.integers(1, 12))
    k = draw(st.integers(1, n_clusters))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    # Distinct values, so that there is one right answer.
    values = rng.permutation(n * n_clusters).reshape(n, n_clusters).astype(np.float32)
    if draw(st.booleans()):  # everybody wants the same clusters
        values += 1e6 * np.arange(n_clusters, dtype=np.float32)
    candidates = np.argsort(-values, axis=1, kind="stable")[:, :k].astype(np.int32)
    room = rng.integers(0, draw(st.integers(1, n + 1)), n_clusters)
    return candidates, np.take_along_axis(values, candidates, 1), room


@given(proposals())
def test_match_is_greedy_over_all_pairs(proposal):
    candidates, similarity, room = proposal
    found = match(candidates, similarity, room)
    assert found.tolist() == greedy(candidates, similarity, room).tolist()


@given(proposals(), st.integers(1, 5))
def test_match_with_ties_is_stable_and_keeps_the_room(proposal, levels):
    candidates, similarity, room = proposal
    similarity = np.floor(similarity / similarity.max(initial=1) * levels)
    owner = match(candidates, similarity.astype(np.float32), room)
    taken = np.bincount(owner[owner >= 0], minlength=len(room))
    assert (taken <= room).all()
    closeness = {
        (t, c): similarity[t, i]
        for t in range(len(owner))
        for i, c in enumerate(candidates[t])
    }
    for (t, c), value in closeness.items():
        if owner[t] >= 0 and value <= closeness[t, owner[t]]:
            continue
        # It would rather be in c, which must be full of tokens at least as close.
        members = np.flatnonzero(owner == c)
        assert len(members) == room[c]
        assert all(closeness[u, c] >= value for u in members)


def test_leftovers_go_to_the_nearest_cluster_with_room(monkeypatch):
    x, centroids = random_rows(240, 6), random_rows(24, 6, seed=1)
    room = np.full(24, 10)
    similarity = x @ centroids.T
    candidates = np.argsort(-similarity, axis=1).astype(np.int32)
    expected = greedy(candidates, np.take_along_axis(similarity, candidates, 1), room)
    nobody = np.full(240, -1)
    placed = clusters.place_leftovers(x, centroids, nobody.copy(), room)
    assert placed.tolist() == expected.tolist()
    # Also where a token can look at few clusters at a time.
    monkeypatch.setattr(clusters, "N_CANDIDATES", 3)
    placed = clusters.place_leftovers(x, centroids, nobody.copy(), room)
    assert np.bincount(placed, minlength=24).tolist() == room.tolist()
    assert similarity[np.arange(240), placed].mean() > 0.9 * (
        similarity[np.arange(240), expected].mean()
    )


# ---------------------------------------------------------------------------
# Quality
# ---------------------------------------------------------------------------


def tightness(x: np.ndarray, token_ids: np.ndarray) -> float:
    """Mean cosine between the tokens of a cluster and the cluster's direction."""
    groups = x[token_ids.reshape(-1)].reshape(*token_ids.shape, -1)
    return float((groups * unit(groups.mean(1, keepdims=True))).sum(-1).mean())


def test_clusters_are_tighter_than_random_ones():
    x = random_rows(1200, 12)
    found = tightness(x, cluster(x, 12).token_ids)
    shuffled = np.random.default_rng(0).permutation(1200).reshape(-1, 12)
    assert found > 2 * tightness(x, shuffled)


def test_planted_groups_are_found():
    rng = np.random.default_rng(3)
    planted = np.repeat(random_rows(64, 24, seed=4), 16, axis=0)
    x = unit(planted + 0.03 * rng.standard_normal(planted.shape))
    shuffle = rng.permutation(len(x))
    token_ids = cluster(x[shuffle], 16).token_ids
    groups = shuffle[token_ids] // 16
    pure = (groups == np.median(groups, axis=1, keepdims=True)).mean()
    assert pure > 0.9


def test_nobody_is_orphaned_where_most_tokens_want_the_same_clusters():
    """Half of the tokens crowd in one direction; none may end far from its own."""
    rng = np.random.default_rng(5)
    crowd = unit(np.r_[1, np.zeros(15)] + 0.15 * rng.standard_normal((512, 16)))
    others = unit(np.r_[-1, np.zeros(15)] + 0.15 * rng.standard_normal((512, 16)))
    x = np.concatenate([crowd, others])
    token_ids = cluster(x, 16).token_ids
    side = (token_ids < 512).mean(1)
    assert ((side == 0) | (side == 1)).all()


# ---------------------------------------------------------------------------
# The metric, and the products underneath
# ---------------------------------------------------------------------------


def test_metric_factor_is_a_root_of_the_metric():
    h = np.random.default_rng(0).standard_normal((50, 9)).astype(np.float32)
    s = h.T @ h / 50
    factor = metric_factor(s).astype(np.float64)
    expected = s + np.trace(s) / 9 * np.eye(9)
    assert np.allclose(factor @ factor.T, expected, atol=1e-5)


def test_distances_in_the_metric_are_differences_of_logits():
    rng = np.random.default_rng(1)
    h = (rng.standard_normal((4000, 6)) * [9, 1, 1, 1, 1, 0.1]).astype(np.float32)
    s = (h.T @ h / len(h)).astype(np.float32)
    a, b = rng.standard_normal((2, 6)).astype(np.float32)
    seen = (a - b) @ metric_factor(s)
    expected = np.mean((h @ (a - b)) ** 2) + np.trace(s) / 6 * np.sum((a - b) ** 2)
    assert np.isclose(np.sum(seen**2), expected, rtol=1e-4)


def test_directions_are_unit_and_zero_rows_stay_zero():
    w = np.random.default_rng(2).standard_normal((20, 5)).astype(np.float32)
    w[3] = 0
    for factor in (None, metric_factor(np.eye(5, dtype=np.float32))):
        norms = np.linalg.norm(directions(w, factor), axis=1)
        assert norms[3] == 0
        assert np.allclose(np.delete(norms, 3), 1, atol=1e-6)


@given(
    hnp.arrays(np.float32, st.tuples(st.integers(1, 20), st.just(4)),
               elements=st.integers(-3, 3)),
    hnp.arrays(np.float32, st.tuples(st.integers(1, 20), st.just(4)),
               elements=st.integers(-3, 3)),
    st.data(),
)  # fmt: skip
def test_nearest_equals_a_full_sort(x, centroids, data):
    k = data.draw(st.integers(1, len(centroids)))
    ids, similarity = linalg.nearest(x, centroids, k)
    exact = x @ centroids.T
    assert np.array_equal(similarity, -np.sort(-exact, axis=1)[:, :k])
    assert np.array_equal(np.take_along_axis(exact, ids, 1), similarity)
    assert all(len(set(row)) == k for row in ids.tolist())


def test_nearest_does_not_depend_on_blocks(monkeypatch):
    x, centroids = random_rows(100, 7), random_rows(30, 7, seed=1)
    whole = linalg.nearest(x, centroids, 5)
    monkeypatch.setattr(linalg, "BLOCK", 64)
    parts = linalg.nearest(x, centroids, 5)
    assert np.array_equal(whole[0], parts[0])
    assert np.allclose(whole[1], parts[1], atol=1e-6)


@given(st.integers(0, 500), st.integers(0, 1 << 26))
def test_blocks_cover_every_row_once(n, width):
    rows = [i for s in linalg.blocks(n, width) for i in range(n)[s]]
    assert rows == list(range(n))


@given(
    st.integers(2, 5000),
    st.integers(2, 128),
    st.data(),
    st.lists(st.integers(-5, 6000), max_size=5),
)
def test_always_tokens_are_distinct_and_leave_half_the_probes(v, m, data, stops):
    n_probes = data.draw(st.integers(1, -(-v // m)))
    tokens = always_tokens(v, m, n_probes, stops).tolist()
    assert len(set(tokens)) == len(tokens) <= n_probes // 2 * m
    assert all(0 <= t < v for t in tokens)
    known = {t for t in stops if 0 <= t < v}
    assert len(tokens) < len(known) or known <= set(tokens)


def test_large_vocabularies_always_probe_the_stop_tokens_only():
    tokens = always_tokens(262_144, 16, 1024, [1, 106])
    assert len(tokens) == 16
    assert {1, 106} <= set(tokens.tolist())
    assert len(always_tokens(49_152, 16, 192, [2])) == N_FREQUENT


@pytest.mark.parametrize("where", [np.asarray, mx.array])
def test_group_sums(where, monkeypatch):
    monkeypatch.setattr(linalg, "BLOCK", 60)  # several blocks
    x = random_rows(100, 7)
    group = np.random.default_rng(1).integers(0, 10, 100)
    group[group == 4] = 5  # one is empty
    sums = linalg.group_sums(where(x), group, 11)
    wanted = [x[group == i].sum(0, dtype=np.float64) for i in range(11)]
    assert sums.dtype == np.float32
    np.testing.assert_allclose(sums, wanted, atol=1e-5)
