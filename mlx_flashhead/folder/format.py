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
the dense head's rows, and ``sha256`` that of the rest of the section.

Version 2 had neither ``files`` nor ``sha256``. Version 1 had one temperature, 1, an
``excess [C]`` and a single ``tail_offset``.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

from ..compute.table import Table
from ..head import FlashHead, Transform

FORMAT_VERSION = 3
HEAD_FILE = "flashhead.safetensors"
CONFIG_KEY = "flashhead"
_MAX_CONFIG_BYTES = 1 << 26
_MAX_REAL = float(np.finfo(np.float32).max)


class FormatError(ValueError):
    """A converted folder is damaged, or of a version that is not known."""


def read_config(folder: str | Path) -> dict[str, Any]:
    """A folder's ``config.json``; empty where there is none.

    Raises:
        FormatError: It cannot be read, or is no object.
    """
    path = Path(folder) / "config.json"
    if not path.exists():
        return {}
    try:
        if not path.is_file():
            raise FormatError(f"{path} is not a file")
        if path.stat().st_size > _MAX_CONFIG_BYTES:
            raise FormatError(f"{path} is too large to be a config")
        config = json.loads(path.read_text(encoding="utf-8"))
    except FormatError:
        raise
    except (ValueError, OSError, RecursionError) as e:
        raise FormatError(f"{path} is not valid JSON: {e}") from None
    if not isinstance(config, dict):
        raise FormatError(f"{path} is not a JSON object")
    return config


def head_config(folder: str | Path) -> dict[str, Any] | None:
    """The ``flashhead`` section of a folder's config; ``None`` where it has none.

    Raises:
        FormatError: ``config.json`` cannot be read, or its section is no object.
    """
    section = read_config(folder).get(CONFIG_KEY)
    if section is not None and not isinstance(section, dict):
        path = Path(folder) / "config.json"
        raise FormatError(f"{path}: {CONFIG_KEY!r} is not an object; convert again")
    return section


def describe(head: FlashHead, path: str, dense_sha256: str) -> dict[str, Any]:
    """The config section of a head that stands at module ``path``."""
    return {
        "format_version": FORMAT_VERSION,
        "head_path": path,
        "head_sha256": dense_sha256,
        "vocab_size": head.vocab_size,
        "hidden_size": head.hidden_size,
        "n_clusters": head.n_clusters,
        "cluster_size": head.cluster_size,
        "n_probes": head.n_probes,
        "temperatures": list(head.temperatures),
        "tail_offset": list(head.tail_offset),
        "rows": _describe_table(head.rows),
        "centroids": _describe_table(head.centroids),
    }


def section_sha256(section: dict[str, Any]) -> str:
    """SHA-256 of a config section, but for its own ``sha256``."""
    rest = {key: value for key, value in section.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def seal(folder: str | Path, section: dict[str, Any], weights: list[Path]) -> None:
    """Complete a folder that has everything else: its config gets the section, with
    the digests of its weight files and of the section."""
    section = {**section, "files": {}}
    for file in [*weights, Path(folder) / HEAD_FILE]:
        with file.open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
        section["files"][file.name] = digest
    section["sha256"] = section_sha256(section)
    config = dict(sorted({**read_config(folder), CONFIG_KEY: section}.items()))
    path = Path(folder) / "config.json"
    path.write_text(json.dumps(config, indent=4), encoding="utf-8")


def _describe_table(table: Table) -> dict[str, Any]:
    return {"bits": table.bits, "group_size": table.group_size, "mode": table.mode}


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
    section: dict[str, Any],
    transform: Transform | None = Transform(),
) -> FlashHead:
    """Read a folder's FlashHead, lazily, as its config section describes it.

    Args:
        folder: A converted folder.
        section: The config's ``flashhead`` section.
        transform: What the model does to its logits; ``None`` if that is not known.

    Raises:
        FormatError: It is missing or does not fit its description.
    """
    file = Path(folder) / HEAD_FILE
    version = section.get("format_version")
    if isinstance(version, bool) or version not in range(1, FORMAT_VERSION + 1):
        raise FormatError(
            f"{folder}: FlashHead format version {version!r:.40} is not known here; "
            "upgrade mlx-flashhead or convert the model again"
        )
    if not file.is_file():
        raise FormatError(
            f"{file} is missing (mlx-lm's own commands do not copy it); convert this "
            "folder, or load it with the dense head (dense=True, --dense)"
        )
    try:
        if version == 1:
            offset = section.get("tail_offset")
            section = {**section, "temperatures": [1.0], "tail_offset": [offset]}
        _check_section(section)
        tensors = cast(dict[str, mx.array], mx.load(str(file)))
        if version == 1 and "excess" in tensors:
            tensors["excess"] = tensors["excess"][None]
        _check_tensors(tensors, section)
        return FlashHead(
            _read_table(tensors, "rows", section["rows"]),
            _read_table(tensors, "centroids", section["centroids"]),
            tensors["token_ids"],
            section["vocab_size"],
            spread=tensors["spread"],
            excess=tensors["excess"],
            bias=tensors.get("bias"),
            temperatures=section["temperatures"],
            tail_offset=section["tail_offset"],
            n_probes=section["n_probes"],
            transform=transform,
        )
    except (FormatError, RuntimeError) as e:
        reason = " ".join(str(e).split())[:200]
        raise FormatError(f"{file}: {reason}; convert the model again") from None


def _check_section(section: dict[str, Any]) -> None:
    for key in ("vocab_size", "hidden_size", "n_clusters", "cluster_size", "n_probes"):
        _require(_is_size(section.get(key)), f"{key} is {section.get(key)!r}")
    c, m, v = (section[k] for k in ("n_clusters", "cluster_size", "vocab_size"))
    _require(0 <= c * m - v < m, f"{c} clusters of {m} do not hold {v} tokens")
    _require(section["n_probes"] <= c, f"n_probes is {section['n_probes']}")
    _require(isinstance(section.get("head_path"), str), "head_path is no name")
    for key in ("temperatures", "tail_offset"):
        values: Any = section.get(key)
        real = isinstance(values, list) and all(map(_is_real, values))
        _require(real and 1 <= len(values) <= 64, f"{key} is {values!r:.80}")
    temperatures, offsets = section["temperatures"], section["tail_offset"]
    _require(
        min(temperatures) > 0 and sorted(set(temperatures))[::-1] == temperatures,
        "temperatures do not fall",
    )
    _require(len(offsets) == len(temperatures), "tail_offset is not one each")
    for name in ("rows", "centroids"):
        spec: Any = section.get(name)
        _require(isinstance(spec, dict), f"{name} has no description")
        bits, group_size = spec.get("bits"), spec.get("group_size")
        dense = bits in (16, 32) and group_size == 0
        packed = bits in (2, 3, 4, 5, 6, 8) and group_size in (32, 64, 128)
        known = (dense or packed) and spec.get("mode") == "affine"
        _require(known, f"{name} has an unknown form {spec}")


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _is_real(value: Any) -> bool:
    """Whether a value is a number that is finite in float32, too."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return number and abs(value) <= _MAX_REAL


def _require(holds: bool, otherwise: str) -> None:
    if not holds:
        raise FormatError(otherwise)


def _check_tensors(tensors: dict[str, mx.array], section: dict[str, Any]) -> None:
    """Names, shapes and dtypes, and that the token ids are a permutation."""
    c, m, v = (section[k] for k in ("n_clusters", "cluster_size", "vocab_size"))
    expected: dict[str, tuple[tuple[int, ...], Any]] = {
        "token_ids": ((c, m), mx.uint32),
        "spread": ((c,), mx.floating),
        "excess": ((len(section["temperatures"]), c), mx.floating),
    }
    if "bias" in tensors:
        expected["bias"] = ((c, m), mx.floating)
    for name, lead in (("rows", (c, m)), ("centroids", (c,))):
        bits, group_size = section[name]["bits"], section[name]["group_size"]
        d = section["hidden_size"]
        if not group_size:
            expected[f"{name}.weight"] = ((*lead, d), mx.floating)
            continue
        _require(d % group_size == 0, f"{name}: groups do not fit {d}")
        expected[f"{name}.weight"] = ((*lead, d * bits // 32), mx.uint32)
        for part in ("scales", "biases"):
            expected[f"{name}.{part}"] = ((*lead, d // group_size), mx.floating)
    unknown = sorted(tensors.keys() - expected.keys())
    _require(not unknown, f"unknown tensor {unknown[:1]}")
    for name, (shape, kind) in expected.items():
        _require(name in tensors, f"{name} is missing")
        found = tensors[name]
        fits = found.shape == shape and mx.issubdtype(found.dtype, kind)
        wanted = str(kind).split(".")[-1]
        _require(
            fits,
            f"{name} should be {wanted} {list(shape)}, "
            f"found {found.dtype} {list(found.shape)}",
        )
    ids = np.array(tensors["token_ids"]).reshape(-1)
    tokens, padding = ids[:v], ids[v:]
    whole = tokens.max() < v and np.bincount(tokens, minlength=v).max() == 1
    _require(
        bool(whole) and bool((padding == v).all()),
        "token_ids are no permutation of the vocabulary",
    )


def _read_table(tensors: dict[str, mx.array], name: str, spec: dict[str, Any]) -> Table:
    return Table(
        tensors[f"{name}.weight"],
        tensors.get(f"{name}.scales"),
        tensors.get(f"{name}.biases"),
        bits=spec["bits"],
        group_size=spec["group_size"],
        mode=spec["mode"],
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
