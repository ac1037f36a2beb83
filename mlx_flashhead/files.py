"""The folder format.

A converted folder is a plain mlx-lm model, which stock mlx-lm loads and runs dense.
Beside it stands ``flashhead.safetensors``, and ``config.json`` has a section
``flashhead`` that describes it:

========================  =====================================================
tensor                    dtype and shape
========================  =====================================================
``rows.weight``           head rows in cluster order, ``[C, m, ...]``; with
                          ``rows.scales`` and ``rows.biases`` where quantized
``centroids.weight``      mean row of each cluster, ``[C, ...]``; likewise
``token_ids``             uint32 ``[C, m]``; ``vocab_size`` marks padding
``spread``, ``excess``    float32 ``[C]``
``bias``                  ``[C, m]``, only where the head has one
========================  =====================================================
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten

from .head import FlashHead
from .table import Table

FORMAT_VERSION = 1
HEAD_FILE = "flashhead.safetensors"
CONFIG_KEY = "flashhead"


class FormatError(ValueError):
    """A converted folder is damaged, or of a version that is not known."""


def head_config(folder: str | Path) -> dict[str, Any] | None:
    """The ``flashhead`` section of a folder's config; ``None`` where it has none.

    Raises:
        FormatError: ``config.json`` cannot be read.
    """
    path = Path(folder) / "config.json"
    if not path.is_file():
        return None
    try:
        config = json.loads(path.read_text())
        return config.get(CONFIG_KEY)
    except (ValueError, AttributeError, OSError) as e:
        raise FormatError(f"{path} is not a readable JSON object: {e}") from None


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
        "tail_offset": head.tail_offset,
        "rows": _describe_table(head.rows),
        "centroids": _describe_table(head.centroids),
    }


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


def load_head(folder: str | Path, config: dict[str, Any]) -> FlashHead:
    """Read the head that a folder's ``flashhead`` section describes, lazily.

    Raises:
        FormatError: The file is missing or does not fit its description.
    """
    file = Path(folder) / HEAD_FILE
    version = config.get("format_version")
    if version != FORMAT_VERSION:
        raise FormatError(
            f"{folder}: FlashHead format version {version!r} is not known here; "
            "upgrade mlx-flashhead or convert the model again"
        )
    if not file.is_file():
        raise FormatError(
            f"{file} is missing; convert the model again, or run it with --dense"
        )
    try:
        tensors = mx.load(str(file))
        _check_shapes(tensors, config)
        return FlashHead(
            _read_table(tensors, "rows", config["rows"]),
            _read_table(tensors, "centroids", config["centroids"]),
            tensors["token_ids"],
            config["vocab_size"],
            spread=tensors["spread"],
            excess=tensors["excess"],
            bias=tensors.get("bias"),
            tail_offset=float(config["tail_offset"]),
            n_probes=config["n_probes"],
        )
    except FormatError as e:
        raise FormatError(f"{file}: {e}; convert the model again") from None
    except (KeyError, TypeError, ValueError, RuntimeError) as e:
        raise FormatError(
            f"{file} does not fit its config.json ({type(e).__name__}: {e}); "
            "convert the model again"
        ) from None


def _read_table(tensors: dict[str, mx.array], name: str, spec: dict) -> Table:
    return Table(
        tensors[f"{name}.weight"],
        tensors.get(f"{name}.scales"),
        tensors.get(f"{name}.biases"),
        bits=spec["bits"],
        group_size=spec["group_size"],
        mode=spec["mode"],
    )


def _check_shapes(tensors: dict[str, mx.array], config: dict[str, Any]) -> None:
    c, m, d = (config[k] for k in ("n_clusters", "cluster_size", "hidden_size"))
    vocab_size = config["vocab_size"]
    if not 0 <= c * m - vocab_size < m:
        raise FormatError(f"{c} clusters of {m} do not hold {vocab_size} tokens")
    expected = {"token_ids": (c, m), "spread": (c,), "excess": (c,)}
    for name, shape in (("rows", (c, m)), ("centroids", (c,))):
        bits, group_size = config[name]["bits"], config[name]["group_size"]
        if f"{name}.scales" in tensors:
            expected[f"{name}.weight"] = (*shape, d * bits // 32)
            expected[f"{name}.scales"] = (*shape, d // group_size)
        else:
            expected[f"{name}.weight"] = (*shape, d)
    if "bias" in tensors:
        expected["bias"] = (c, m)
    for name, shape in expected.items():
        found = tensors[name].shape if name in tensors else "nothing"
        if found != shape:
            raise FormatError(f"{name} should be {list(shape)}, found {found}")


def table_sha256(table: Table) -> str:
    """SHA-256 of a head's rows as stored: dtypes, shapes and bytes of its arrays."""
    digest = hashlib.sha256()
    for array in (table.weight, table.get("scales"), table.get("biases")):
        if array is not None:
            digest.update(f"{array.dtype}{array.shape}".encode())
            digest.update(memoryview(mx.contiguous(array).view(mx.uint8)))
    return digest.hexdigest()
