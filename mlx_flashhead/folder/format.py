"""The file of a FlashHead, and folders that have one.

``flashhead.safetensors`` is whole by itself: it holds what belongs to the head alone,
with the section that describes it as JSON in its metadata (key ``flashhead``).

========================  =====================================================
tensor                    dtype and shape
========================  =====================================================
``rows.weight``           head rows in cluster order, ``[C, m, ...]``; with
                          ``rows.scales`` and ``rows.biases`` where quantized; only
                          where the section says that they are stored
``centroids.weight``      centroid of each cluster, ``[C, ...]``; likewise
``token_ids``             uint32 ``[C, m]``; ``vocab_size`` marks padding
``spread``                float32 ``[C]``
``excess``                float32 ``[n_temperatures, C]``
``bias``                  ``[C, m]``, only where the head has one
========================  =====================================================

Rows that are not stored are the model's own, put in cluster order when they are loaded,
and quantized where the section names other bits.

A converted folder is a plain mlx-lm model, which stock mlx-lm loads and runs dense,
with this file in it. Its ``config.json`` has the section, too, with the SHA-256 of
every weight file (``files``). ``head_sha256`` is the digest of the dense head's rows,
``tensors_sha256`` that of the file's tensors, ``sha256`` that of the rest of the
section. In version 1, ``excess`` was of one temperature, ``[C]``.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

from ..compute.table import Table, repack
from ..head import FlashHead, Transform
from .section import (
    CONFIG_KEY,
    FORMAT_VERSION,
    HEAD_FILE,
    Draft,
    FormatError,
    Measured,
    Section,
    TableForm,
    head_file,
    read_config,
)

# Weights of rows that are put into other bits at once.
_AT_ONCE = 1 << 24


def describe(
    head: FlashHead,
    path: str,
    dense_sha256: str,
    *,
    stored_rows: bool = True,
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
        rows=form_of(head.rows),
        centroids=form_of(head.centroids),
        stored_rows=stored_rows,
        head_sha256=dense_sha256,
        recipe=recipe,
        seed=seed,
        calibration=calibration,
        measured=measured,
        clusters=clusters,
        draft=draft,
    )


def form_of(table: Table) -> TableForm:
    """Bits, group size and mode of a table."""
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


def save_head(file: str | Path, head: FlashHead, section: Section) -> Section:
    """Write a head's file, without the rows where the section says so, and give the
    section as it stands there."""
    tensors: dict[str, mx.array] = dict(tree_flatten(head.parameters()))
    if not section.stored_rows:
        tensors = {k: v for k, v in tensors.items() if not k.startswith("rows.")}
    digest = tensors_sha256(tensors)
    section = replace(section, tensors_sha256=digest, files={})
    metadata = {
        "format": "mlx",
        "flashhead_version": str(FORMAT_VERSION),
        CONFIG_KEY: json.dumps(section.to_json()),
    }
    mx.save_safetensors(str(file), tensors, metadata=metadata)
    return section


def read_tensors(where: str | Path, section: Section) -> dict[str, mx.array]:
    """The tensors of a FlashHead's file, lazy, as those of the present version.

    Raises:
        FormatError: The file is missing, or does not fit its section.
    """
    file = head_file(where)
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
    except (FormatError, RuntimeError) as e:
        reason = " ".join(str(e).split())[:200]
        raise FormatError(f"{file}: {reason}; convert the model again") from None
    return tensors


def load_head(
    where: str | Path,
    section: Section,
    transform: Transform | None = Transform(),
    table: Table | None = None,
    *,
    own: bool = False,
) -> FlashHead:
    """Make a FlashHead of its file, lazily, as its section describes it.

    Args:
        where: The file, or its folder.
        section: The section.
        transform: What the model does to its logits; ``None`` if that is not known.
        table: Rows of the model's own head ``[V, D]``; what the file does not store is
          made of them.
        own: Whether the rows are to be the model's own, bit for bit, whatever the
          section names.

    Raises:
        FormatError: The file is missing, or does not fit its section or the model.
    """
    tensors = read_tensors(where, section)
    form = section.rows
    if table is not None:
        check_shape(where, section, table)
        form = form_of(table) if own else form
    elif not section.stored_rows:
        raise FormatError(f"{where} stores no rows: it needs the model's own")
    if section.stored_rows and form == section.rows:
        ordered = _read_table(tensors, "rows", form)
    else:
        assert table is not None
        ordered = in_order(table, tensors["token_ids"], section, form)
    return FlashHead(
        ordered,
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


def check_shape(where: str | Path, section: Section, table: Table) -> None:
    """Raise FormatError for a model's head of other sizes than a FlashHead's."""
    rows = table.weight.shape[0], table.hidden_size
    if rows != (section.vocab_size, section.hidden_size):
        raise FormatError(
            f"{where}: the FlashHead is of {section.vocab_size} tokens x "
            f"{section.hidden_size}, the model's head of {rows[0]} x {rows[1]}: it is "
            "another model's; convert this one (mlx_flashhead.convert)"
        )


def in_order(
    table: Table, token_ids: mx.array, section: Section, form: TableForm | None = None
) -> Table:
    """A model's rows in cluster order ``[C, m, D]``, in the section's bits or another
    form: as they are and lazy where they have these bits, else quantized as the
    converter does it, and evaluated.

    Args:
        table: The rows ``[V, D]``.
        token_ids: uint32 ``[C, m]``.
        section: The section of the FlashHead.
        form: Instead of ``section.rows``.
    """
    form = form or section.rows
    # Padding repeats a row that exists; it is masked wherever logits are made.
    index = mx.where(token_ids < section.vocab_size, token_ids, 0)
    if form_of(table) == form:
        return table.map(lambda a: a[index])
    # A part at a time: whole, the rows would be in memory in float32.
    size = max(1, _AT_ONCE // (section.cluster_size * section.hidden_size))
    parts = [index[i : i + size] for i in range(0, section.n_clusters, size)]
    largest = _largest(table) if table.dtype == mx.bfloat16 else math.inf
    made = []
    for i in parts:
        rows = table.take(i, mx.float32 if table.quantized else None)
        part = repack(rows, table.dtype, form.bits, form.group_size, largest)
        mx.eval(part.parameters())
        made.append(part.arrays)
    columns = [[a for a in column if a is not None] for column in zip(*made)]
    arrays = [mx.concatenate(column) if column else None for column in columns]
    weight, scales, biases = arrays
    assert weight is not None
    whole = Table(weight, scales, biases, **asdict(form))
    mx.eval(whole.parameters())
    return whole


def _largest(table: Table) -> float:
    """Largest magnitude in a table ``[V, D]`` of bfloat16, a part at a time."""
    found = 0.0
    size = max(1, _AT_ONCE // table.hidden_size)
    for start in range(0, table.weight.shape[0], size):
        part = table.map(lambda a, s=start: a[s : s + size])  # type: ignore[misc]
        if table.quantized:
            most = mx.abs(part.dequantize(mx.float32)).max()
        else:
            # Magnitudes are in the order of their bits, whose maximum is found in a
            # tenth of the time on a CPU.
            most = (part.weight.view(mx.uint16) & 0x7FFF).max().view(mx.bfloat16)
        found = max(found, cast(float, most.item()))
    return found


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
    tables: list[tuple[str, tuple[int, ...], TableForm]]
    tables = [("centroids", (c,), section.centroids)]
    if section.stored_rows:
        tables.append(("rows", (c, m), section.rows))
    for name, lead, form in tables:
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
    for array in table.arrays:
        if array is not None:
            _hash(digest, array)
    return digest.hexdigest()


def tensors_sha256(tensors: Mapping[str, mx.array]) -> str:
    """SHA-256 of tensors sorted by name: names, dtypes, shapes and bytes."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode())
        _hash(digest, tensors[name])
    return digest.hexdigest()


def _hash(digest: Any, array: mx.array) -> None:
    digest.update(f"{array.dtype}{array.shape}".encode())
    # MLX's arrays are buffers, which its stubs do not say.
    raw: Any = mx.contiguous(array).view(mx.uint8)
    digest.update(memoryview(raw))
