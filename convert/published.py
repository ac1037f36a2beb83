"""Clusters that others published, in the open folder layout of FlashHead's authors.

Beside a model stands a folder ``flash_head_assets`` with

- ``clustering_config.json``: ``vocab_size`` V and ``hidden_size`` D;
- ``clustering_cache.safetensors``: ``centroids [C, D]`` and ``cluster_assignments``,
  the cluster of each token, integers ``[V]``; or lists of the tokens of each cluster,
  integers ``[C, n]``, where -1 and V are padding.

Which tokens stand together is kept; centroids are fitted anew, as for any clustering.
Clusters here have one size, so larger ones are split, and what does not fill a cluster
goes to the nearest one with room.
"""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import numpy as np
from huggingface_hub import snapshot_download

from mlx_flashhead.compute.linalg import nearest
from mlx_flashhead.folder.hub import from_hub
from mlx_flashhead.folder.integrity import check_safetensors

from .clustering import (
    N_CANDIDATES,
    Clustering,
    balanced,
    directions,
    match,
    place_leftovers,
    with_always,
)
from .progress import Progress, silent

ASSETS = "flash_head_assets"
_TENSORS = "clustering_cache.safetensors"
_CONFIG = "clustering_config.json"


class ClustersError(ValueError):
    """Published clusters cannot be read, or are another model's."""


def read_clusters(name: str, vocab_size: int, hidden_size: int) -> np.ndarray:
    """Cluster of each token, int64 ``[V]``.

    Args:
        name: A folder that has ``flash_head_assets``, that folder itself, or the
          Hugging Face id of such a model.
        vocab_size: V of the head that is converted.
        hidden_size: Its D.

    Raises:
        ClustersError: They are not there, are damaged, or do not fit the head.
    """
    folder = _find(name)
    config = _read_config(folder / _CONFIG)
    for key, wanted in (("vocab_size", vocab_size), ("hidden_size", hidden_size)):
        if config.get(key) != wanted:
            raise ClustersError(
                f"--clusters {name}: {_CONFIG} has {key} {config.get(key)!r:.40}, the "
                f"model's head {wanted}; give the clusters of this model"
            )
    file = folder / _TENSORS
    try:
        check_safetensors(file)
        tensors = cast(dict[str, mx.array], mx.load(str(file)))
    except (ValueError, RuntimeError) as e:
        raise ClustersError(f"--clusters: {' '.join(str(e).split())[:300]}") from None
    if missing := {"centroids", "cluster_assignments"} - tensors.keys():
        raise ClustersError(f"--clusters: {file} has no {min(missing)!r}")
    centroids, assigned = tensors["centroids"], tensors["cluster_assignments"]
    if centroids.ndim != 2 or centroids.shape[1] != hidden_size:
        raise ClustersError(
            f"--clusters: {file}: centroids are {list(centroids.shape)}, not "
            f"[n_clusters, {hidden_size}]"
        )
    if not mx.issubdtype(assigned.dtype, mx.integer):
        raise ClustersError(
            f"--clusters: {file}: cluster_assignments are {assigned.dtype}, "
            "not integers"
        )
    try:
        return _owners(np.array(assigned), len(centroids), vocab_size)
    except ClustersError as e:
        raise ClustersError(f"--clusters: {file}: cluster_assignments {e}") from None


def _find(name: str) -> Path:
    """The folder of published clusters on this machine, downloaded if need be."""
    path = Path(name)
    if not path.exists():
        download = partial(snapshot_download, name, allow_patterns=[f"{ASSETS}/*"])
        path = Path(from_hub("--clusters", name, download, ClustersError))
    for folder in (path / ASSETS, path):
        if (folder / _TENSORS).is_file() and (folder / _CONFIG).is_file():
            return folder
    raise ClustersError(
        f"--clusters {name}: it has no {ASSETS}/{_TENSORS} and {_CONFIG}"
    )


def _read_config(file: Path) -> dict[str, Any]:
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, OSError, RecursionError) as e:
        raise ClustersError(f"--clusters: {file} is not valid JSON: {e}") from None
    if not isinstance(config, dict):
        raise ClustersError(f"--clusters: {file} is not a JSON object")
    return config


def _owners(assigned: np.ndarray, n_clusters: int, vocab_size: int) -> np.ndarray:
    """Cluster of each token, int64 ``[V]``, from either form of
    ``cluster_assignments``.

    Raises:
        ClustersError: They do not name each token once; the message goes on after
          their name.
    """
    if assigned.ndim == 1:
        if len(assigned) != vocab_size:
            raise ClustersError(f"has {len(assigned)} tokens, the head {vocab_size}")
        if assigned.min() < 0 or assigned.max() >= n_clusters:
            raise ClustersError(
                f"go from {assigned.min()} to {assigned.max()}, and there are "
                f"{n_clusters} centroids"
            )
        return assigned.astype(np.int64)
    if assigned.ndim != 2 or len(assigned) != n_clusters:
        raise ClustersError(
            f"are {list(assigned.shape)}, neither [{vocab_size}] nor [{n_clusters}, n]"
        )
    row, column = np.nonzero((assigned != -1) & (assigned != vocab_size))
    tokens = assigned[row, column]
    if tokens.size and (tokens.min() < 0 or tokens.max() >= vocab_size):
        raise ClustersError(f"have a token that is none of the {vocab_size}")
    counts = np.bincount(tokens.astype(np.int64), minlength=vocab_size)
    if (counts != 1).any():
        token = int((counts != 1).argmax())
        raise ClustersError(f"have token {token} {counts[token]} times, not once")
    owner = np.empty(vocab_size, np.int64)
    owner[tokens] = row
    return owner


def pack_clusters(
    x: np.ndarray,
    owner: np.ndarray,
    cluster_size: int,
    *,
    always: np.ndarray | None = None,
    seed: int = 0,
    progress: Progress = silent,
) -> Clustering:
    """Published clusters as clusters of exactly ``cluster_size``; like
    :func:`mlx_flashhead.convert.cluster.cluster`, but who stands together is given.

    Args:
        x: Unit directions, float32 ``[V, D]``.
        owner: Cluster of each token, int64 ``[V]``.
        cluster_size: Tokens per cluster, m.
        always: Tokens that get clusters of their own, in front.
        seed: Seed of every random choice.
        progress: Shows the stages.
    """

    def make(rest: np.ndarray) -> np.ndarray:
        return _pack(x[rest], owner[rest], cluster_size, seed, progress)

    return with_always(len(x), cluster_size, always, make)


def _pack(
    x: np.ndarray, owner: np.ndarray, m: int, seed: int, progress: Progress
) -> np.ndarray:
    """Members ``[C, m]`` of each cluster as rows of x; ``len(x)`` is padding, at the
    end of the last one."""
    order = np.argsort(owner, kind="stable")
    groups = np.split(order, np.flatnonzero(np.diff(owner[order])) + 1)
    full: list[np.ndarray] = []
    parts: list[np.ndarray] = []
    with progress("Clusters: splitting", len(groups)) as step:
        for rows in groups:
            if len(rows) > m:
                # Row numbers, and padding that ends the last.
                members = balanced(x[rows], m, seed, 1, silent)
                pieces = [rows[i[i < len(rows)]] for i in members]
            else:
                pieces = [rows]
            for piece in pieces:
                (full if len(piece) == m else parts).append(piece)
            step()
    with progress("Clusters: filling up", 1) as step:
        merged = _fill(x, parts, m)
        step()
    return np.array([*full, *merged], np.int64).reshape(-1, m)


def _fill(x: np.ndarray, parts: list[np.ndarray], m: int) -> list[np.ndarray]:
    """Make full clusters of parts of fewer than m rows: the largest take in the rows of
    the others, each row the nearest that has room. Padding ends the last."""
    total = sum(map(len, parts))
    n_clusters = -(-total // m)
    if not n_clusters:
        return []
    parts = sorted(parts, key=len, reverse=True)
    kept, loose = parts[:n_clusters], parts[n_clusters:]
    centroids = directions(np.stack([x[rows].sum(0) for rows in kept]), None)
    size = np.full(n_clusters, m)
    size[-1] = total - (n_clusters - 1) * m
    # The last, the smallest, may have to give away what is farthest from its middle.
    last = kept[-1][np.argsort(-(x[kept[-1]] @ centroids[-1]), kind="stable")]
    kept[-1], over = last[: size[-1]], last[size[-1] :]
    rows = np.concatenate([over, *loose]).astype(np.int64)
    if rows.size:
        room = size - [len(own) for own in kept]
        k = min(N_CANDIDATES, n_clusters)
        owner = match(*nearest(x[rows], centroids, k), room)
        owner = place_leftovers(x[rows], centroids, owner, room)
        kept = [np.append(own, rows[owner == i]) for i, own in enumerate(kept)]
    kept[-1] = np.append(kept[-1], [len(x)] * (m - size[-1]))
    return kept
