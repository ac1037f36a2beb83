"""Clusters that others published: read, checked, and packed."""

from __future__ import annotations

import json
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx_flashhead.convert import answers, convert
from mlx_flashhead.convert.clustering import cluster, directions
from mlx_flashhead.convert.published import ClustersError, pack_clusters, read_clusters

from mlx_flashhead import flash_heads, load
from mlx_flashhead.folder.section import read_section

V, D = 1003, 64


def rows(seed: int = 0, n: int = V) -> np.ndarray:
    """Unit rows in bunches, [n, D]."""
    rng = np.random.default_rng(seed)
    middles = rng.standard_normal((n // 12 + 1, D))
    x = middles[rng.integers(len(middles), size=n)] + 0.5 * rng.standard_normal((n, D))
    return directions(x.astype(np.float32), None)


def unbalanced(seed: int = 0, n_clusters: int = 60) -> np.ndarray:
    """Owners: clusters from none to hundreds of tokens."""
    rng = np.random.default_rng(seed)
    return rng.choice(n_clusters, V, p=rng.dirichlet(np.full(n_clusters, 0.3)))


def publish(folder: Path, owner=None, n_clusters: int = 60, **changes) -> Path:
    """A folder in the layout; changes replace tensors and entries of the config."""
    assets = folder / "flash_head_assets"
    assets.mkdir(parents=True)
    owner = unbalanced() if owner is None else owner
    tensors = {
        "centroids": mx.zeros((n_clusters, D), mx.bfloat16),
        "cluster_assignments": mx.array(owner),
    }
    config = {"vocab_size": V, "hidden_size": D, "n_clusters": n_clusters}
    for name, value in changes.items():
        (tensors if name in tensors else config)[name] = value
    tensors = {k: v for k, v in tensors.items() if v is not None}
    mx.save_safetensors(str(assets / "clustering_cache.safetensors"), tensors)
    (assets / "clustering_config.json").write_text(json.dumps(config))
    return folder


def as_lists(owner: np.ndarray, n_clusters: int, padding: int) -> np.ndarray:
    width = np.bincount(owner).max()
    lists = np.full((n_clusters, width), padding)
    for c in range(n_clusters):
        tokens = np.flatnonzero(owner == c)
        lists[c, : len(tokens)] = tokens
    return lists


@pytest.mark.parametrize("dtype", [mx.int32, mx.int64, mx.uint16, mx.uint32])
def test_assignments_of_any_integer_type(tmp_path, dtype):
    owner = unbalanced()
    publish(tmp_path / "a", cluster_assignments=mx.array(owner).astype(dtype))
    for name in ("a", "a/flash_head_assets"):
        found = read_clusters(str(tmp_path / name), V, D)
        assert found.dtype == np.int64 and np.array_equal(found, owner)


@pytest.mark.parametrize("padding", [-1, V])
def test_lists_of_tokens(tmp_path, padding):
    owner = unbalanced()
    lists = mx.array(as_lists(owner, 60, padding))
    publish(tmp_path, cluster_assignments=lists)
    assert np.array_equal(read_clusters(str(tmp_path), V, D), owner)


LISTS = as_lists(unbalanced(), 60, -1)
DOUBLE = np.where(LISTS == 7, 8, LISTS)
BAD = {
    "another vocabulary": ({"vocab_size": 1004}, "vocab_size 1004"),
    "another width": ({"hidden_size": 32}, "hidden_size 32"),
    "no vocabulary": ({"vocab_size": None}, "vocab_size None"),
    "narrow centroids": ({"centroids": mx.zeros((60, 63))}, "centroids are"),
    "flat centroids": ({"centroids": mx.zeros(60 * D)}, "centroids are"),
    "no centroids": ({"centroids": None}, "no 'centroids'"),
    "too few": ({"cluster_assignments": mx.zeros(V - 1, mx.int32)}, "1002 tokens"),
    "too many": ({"cluster_assignments": mx.zeros(V + 1, mx.int32)}, "1004 tokens"),
    "no such cluster": ({"cluster_assignments": mx.full(V, 60, mx.int32)}, "60"),
    "negative": ({"cluster_assignments": mx.full(V, -1, mx.int32)}, "-1"),
    "not whole": ({"cluster_assignments": mx.zeros(V)}, "not integers"),
    "three axes": ({"cluster_assignments": mx.zeros((60, 1, V), mx.int32)}, "neither"),
    "other lists": ({"cluster_assignments": mx.zeros((V, 60), mx.int32)}, "neither"),
    "no such token": ({"cluster_assignments": mx.array(LISTS + 5)}, "none of"),
    "a token twice": ({"cluster_assignments": mx.array(DOUBLE)}, "token 7 0 times"),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_clusters(tmp_path, kind):
    changes, match = BAD[kind]
    publish(tmp_path, **changes)
    with pytest.raises(ClustersError, match=match) as error:
        read_clusters(str(tmp_path), V, D)
    assert str(error.value).startswith("--clusters") and "\n" not in str(error.value)


@pytest.mark.parametrize("text", ["", "{", "[1]", "[" * 100_000])
def test_bad_config(tmp_path, text):
    publish(tmp_path)
    (tmp_path / "flash_head_assets/clustering_config.json").write_text(text)
    with pytest.raises(ClustersError, match="clustering_config"):
        read_clusters(str(tmp_path), V, D)


def test_bad_file(tmp_path, untied_source):
    publish(tmp_path / "a")
    file = tmp_path / "a/flash_head_assets/clustering_cache.safetensors"
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(ClustersError, match="clustering_cache"):
        read_clusters(str(tmp_path / "a"), V, D)
    for name in ("nobody/nothing", str(untied_source)):
        with pytest.raises(ClustersError, match="--clusters"):
            convert(str(untied_source), tmp_path / "b", clusters=name, verbose=False)
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize(
    "m, n_clusters, always",
    [
        (2, 900, None),
        (7, 60, np.arange(40)),
        (16, 1, np.arange(40)),
        (16, 60, None),
        (128, 900, np.arange(40)),
        (128, 1, None),
    ],
)
def test_every_token_stands_once(m, n_clusters, always):
    owner = unbalanced(n_clusters, n_clusters)
    packed = pack_clusters(rows(), owner, m, always=always)
    ids = packed.token_ids
    assert ids.shape == (-(-V // m), m)
    assert sorted(ids.reshape(-1)[:V]) == list(range(V))
    assert (ids.reshape(-1)[V:] == V).all()
    assert packed.n_always == (0 if always is None else 40 // m)


def test_clusters_that_fit_are_kept():
    owner = np.random.default_rng(0).permutation(np.repeat(np.arange(50), 16))
    packed = pack_clusters(rows(n=800), owner, 16)
    kept = {tuple(sorted(c)) for c in packed.token_ids}
    assert kept == {tuple(np.flatnonzero(owner == c)) for c in range(50)}


def test_large_clusters_are_split_into_their_own():
    owner = np.random.default_rng(0).permutation(np.repeat(np.arange(5), 160))
    packed = pack_clusters(rows(n=800), owner, 16)
    assert (owner[packed.token_ids] == owner[packed.token_ids][:, :1]).all()


@pytest.mark.parametrize("sizes", [[15, 15, 15], [1] * 31, [15, 1], [3, 2], [8, 8, 9]])
def test_parts_are_filled_up(sizes):
    owner = np.repeat(np.arange(len(sizes)), sizes)
    ids = pack_clusters(rows(n=len(owner)), owner, 16).token_ids.reshape(-1)
    assert sorted(ids[: len(owner)]) == list(range(len(owner)))


def test_the_same_seed_gives_the_same():
    made = [pack_clusters(rows(), unbalanced(), 8, seed=3).token_ids for _ in range(2)]
    assert np.array_equal(*made)


def test_conversion_with_published_clusters(untied_source, tmp_path, monkeypatch):
    """Of k-means as the authors', which leaves clusters of any size. What answers are
    drawn for calibration moves the KL by a fifth, so it is that of several."""
    weight = np.array(
        mx.load(str(untied_source / "model.safetensors"))["lm_head.weight"]
    )
    x = directions(weight, None)
    ours = cluster(x, 8)
    middles = directions(x[ours.order[: V // 8 * 8]].reshape(-1, 8, D).sum(1), None)
    owner = (x @ middles.T).argmax(1)
    sizes = np.bincount(owner)
    assert sizes.max() > 8 > sizes.min()
    publish(tmp_path / "assets", owner, len(middles))
    options = {"cluster_size": 8, "n_probes": 60, "verbose": False}
    theirs = convert(str(untied_source), tmp_path / "theirs",
                     clusters=tmp_path / "assets", **options)  # fmt: skip
    plain = convert(str(untied_source), tmp_path / "plain", **options)
    assert theirs.recall > plain.recall - 0.03
    kl = {"theirs": [theirs.kl], "plain": [plain.kl]}
    draw = answers.draw
    for shift in (0.2, 0.4, 0.6, 0.8):
        monkeypatch.setattr(
            answers, "draw", lambda z, u, shift=shift: draw(z, (u + shift) % 1)
        )
        for name, clusters in (("theirs", tmp_path / "assets"), ("plain", None)):
            folder = tmp_path / f"{name}-{shift}"
            made = convert(str(untied_source), folder, clusters=clusters, **options)
            kl[name].append(made.kl)
    assert np.mean(kl["theirs"]) < 1.3 * np.mean(kl["plain"]) + 0.01, kl
    assert read_section(tmp_path / "theirs").clusters == "assets"
    assert read_section(tmp_path / "plain").clusters is None
    (head,) = flash_heads(load(tmp_path / "theirs")[0])
    ids = np.array(head.token_ids).reshape(-1)[:V]
    assert sorted(ids) == list(range(V))


def test_random_clusters_are_worse(untied_source, tmp_path):
    """So that what the test above compares depends on the clusters."""
    owner = np.random.default_rng(0).integers(125, size=V)
    publish(tmp_path / "assets", owner, 125)
    options = {"cluster_size": 8, "n_probes": 60, "verbose": False, "recipe": "paper"}
    source = str(untied_source)
    theirs = convert(source, tmp_path / "a", clusters=tmp_path / "assets", **options)
    plain = convert(source, tmp_path / "b", **options)
    assert theirs.rows_read == plain.rows_read
    assert theirs.kl > plain.kl
