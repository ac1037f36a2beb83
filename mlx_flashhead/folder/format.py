"""The folder format.

A converted folder is a plain mlx-lm model, which stock mlx-lm loads and runs dense.
Beside it stands ``flashhead.safetensors``, and ``config.json`` has a section
``flashhead`` that describes it:

========================  =====================================================
tensor                    dtype and shape
========================  =====================================================
``rows.weight``           head rows in cluster order, ``[C, m, ...]``; with
                          ``rows.scales`` and ``rows.biases`` where quantized
``centroids.weight``      centroid of each cluster, ``[C, ...]``; likewise
``token_ids``             uint32 ``[C, m]``; ``vocab_size`` marks padding
``spread``                float32 ``[C]``
``excess``                float32 ``[n_temperatures, C]``
``bias``                  ``[C, m]``, only where the head has one
========================  =====================================================

The section's ``files`` has the SHA-256 of every weight file, ``head_sha256`` that of
the dense head's rows, and ``sha256`` that of the rest of the section. In version 1,
``excess`` was of one temperature, ``[C]``.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

from ..compute.table import Table
from ..head import FlashHead, Transform
from .section import (
    CONFIG_KEY,
    FORMAT_VERSION,
    Draft,
    FormatError,
    Measured,
    Section,
    TableForm,
    read_config,
)

HEAD_FILE = "flashhead.safetensors"


def describe(
    head: FlashHead,
    path: str,
    dense_sha256: str,
    *,
    recipe: str | None = None,
    seed: int | None = None,
    calibration: str | None = None,
    measured: Measured | None = None,
    clusters: str | None = None,
    draft: Draft | None = None,
) -> Section:
    """The config section of a head that stands at module ``path``, and of what it was
    made with."""
    return Section(
        head_path=path,
        vocab_size=head.vocab_size,
        hidden_size=head.hidden_size,
        n_clusters=head.n_clusters,
        cluster_size=head.cluster_size,
        n_probes=head.n_probes,
        temperatures=head.temperatures,
        tail_offset=head.tail_offset,
        rows=_form(head.rows),
        centroids=_form(head.centroids),
        head_sha256=dense_sha256,
        recipe=recipe,
        seed=seed,
        calibration=calibration,
        measured=measured,
        clusters=clusters,
        draft=draft,
    )


def _form(table: Table) -> TableForm:
    return TableForm(table.bits, table.group_size, table.mode)


def seal(folder: str | Path, section: Section, weights: list[Path]) -> None:
    """Complete a folder that has everything else: its config gets the section, with
    the digests of its weight files and of the section."""
    files = {}
    for file in [*weights, Path(folder) / HEAD_FILE]:
        with file.open("rb") as stream:
            files[file.name] = hashlib.file_digest(stream, "sha256").hexdigest()
    stored = replace(section, files=files).to_json()
    config = dict(sorted({**read_config(folder), CONFIG_KEY: stored}.items()))
    path = Path(folder) / "config.json"
    path.write_text(json.dumps(config, indent=4), encoding="utf-8")


def save_head(folder: str | Path, head: FlashHead) -> None:
    """Write a head's tensors into a folder. Its config section is the caller's."""
    tensors = dict(tree_flatten(head.parameters()))
    mx.save_safetensors(
        str(Path(folder) / HEAD_FILE),
        tensors,
        metadata={"format": "mlx", "flashhead_version": str(FORMAT_VERSION)},
    )


def load_head(
    folder: str | Path,
    section: Section,
    transform: Transform | None = Transform(),
    own: Table | None = None,
) -> FlashHead:
    """Read a folder's FlashHead, lazily, as its config section describes it.

    Args:
        folder: A converted folder.
        section: The config's ``flashhead`` section.
        transform: What the model does to its logits; ``None`` if that is not known.
        own: Rows of the model's own head ``[V, D]``, to be used instead of the stored
          ones where their bits differ.

    Raises:
        FormatError: It is missing or does not fit its description.
    """
    file = Path(folder) / HEAD_FILE
    if not file.is_file():
        raise FormatError(
            f"{file} is missing (mlx-lm's own commands do not copy it); convert this "
            "folder, or load it with the dense head (MLX_FLASHHEAD=0)"
        )
    try:
        tensors = cast(dict[str, mx.array], mx.load(str(file)))
        if section.format_version == 1 and "excess" in tensors:
            tensors["excess"] = tensors["excess"][None]
        _check_tensors(tensors, section)
        rows = _read_table(tensors, "rows", section.rows)
        if own is not None and _form(own) != section.rows:
            # Padding repeats a row that exists; it is masked wherever logits are made.
            ids = tensors["token_ids"]
            index = mx.where(ids < section.vocab_size, ids, 0)
            rows = own.map(lambda a: a[index])
        return FlashHead(
            rows,
            _read_table(tensors, "centroids", section.centroids),
            tensors["token_ids"],
            section.vocab_size,
            spread=tensors["spread"],
            excess=tensors["excess"],
            bias=tensors.get("bias"),
            temperatures=section.temperatures,
            tail_offset=section.tail_offset,
            n_probes=section.n_probes,
            transform=transform,
        )
    except (FormatError, RuntimeError) as e:
        reason = " ".join(str(e).split())[:200]
        raise FormatError(f"{file}: {reason}; convert the model again") from None


def _require(holds: bool, otherwise: str) -> None:
    if not holds:
        raise FormatError(otherwise)


def _check_tensors(tensors: dict[str, mx.array], section: Section) -> None:
    """Names, shapes and dtypes, and that the token ids are a permutation."""
    c, m, d = section.n_clusters, section.cluster_size, section.hidden_size
    expected: dict[str, tuple[tuple[int, ...], Any]] = {
        "token_ids": ((c, m), mx.uint32),
        "spread": ((c,), mx.floating),
        "excess": ((len(section.temperatures), c), mx.floating),
    }
    if "bias" in tensors:
        expected["bias"] = ((c, m), mx.floating)
    for name, lead, form in (
        ("rows", (c, m), section.rows),
        ("centroids", (c,), section.centroids),
    ):
        bits, group_size = form.bits, form.group_size
        if not group_size:
            expected[f"{name}.weight"] = ((*lead, d), mx.floating)
            continue
        _require(d % group_size == 0, f"{name}: groups do not fit {d}")
        expected[f"{name}.weight"] = ((*lead, d * bits // 32), mx.uint32)
        affine = form.mode == "affine"
        scales = (*lead, d // group_size), mx.floating if affine else mx.uint8
        for part in ("scales", "biases") if affine else ("scales",):
            expected[f"{name}.{part}"] = scales
    unknown = sorted(tensors.keys() - expected.keys())
    _require(not unknown, f"unknown tensor {unknown[:1]}")
    for name, (shape, kind) in expected.items():
        _require(name in tensors, f"{name} is missing")
        tensor = tensors[name]
        fits = tensor.shape == shape and mx.issubdtype(tensor.dtype, kind)
        dtype = str(kind).split(".")[-1]
        _require(
            fits,
            f"{name} should be {dtype} {list(shape)}, "
            f"found {tensor.dtype} {list(tensor.shape)}",
        )
    v, ids = section.vocab_size, np.array(tensors["token_ids"]).reshape(-1)
    tokens, padding = ids[:v], ids[v:]
    whole = tokens.max() < v and np.bincount(tokens, minlength=v).max() == 1
    _require(
        bool(whole) and bool((padding == v).all()),
        "token_ids are no permutation of the vocabulary",
    )


def _read_table(tensors: dict[str, mx.array], name: str, form: TableForm) -> Table:
    return Table(
        tensors[f"{name}.weight"],
        tensors.get(f"{name}.scales"),
        tensors.get(f"{name}.biases"),
        bits=form.bits,
        group_size=form.group_size,
        mode=form.mode,
    )


def table_sha256(table: Table) -> str:
    """SHA-256 of a head's rows as stored: dtypes, shapes and bytes of its arrays."""
    digest = hashlib.sha256()
    for array in (table.weight, table.get("scales"), table.get("biases")):
        if array is not None:
            digest.update(f"{array.dtype}{array.shape}".encode())
            # MLX's arrays are buffers, which its stubs do not say.
            raw: Any = mx.contiguous(array).view(mx.uint8)
            digest.update(memoryview(raw))
    return digest.hexdigest()
