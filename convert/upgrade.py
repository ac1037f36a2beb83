"""Folders of older formats in the present one, without rows that are stored twice."""

from __future__ import annotations

import os
import shutil
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
from mlx_lm import utils

from mlx_flashhead.compute.table import Table
from mlx_flashhead.folder import format as layout
from mlx_flashhead.folder import integrity
from mlx_flashhead.folder.section import (
    FORMAT_VERSION,
    HEAD_FILE,
    FormatError,
    Section,
    read_section,
)
from mlx_flashhead.integration.locate import HeadNotFound, get_module, head_table

from .staging import recover, staged, writing


class UpgradeError(ValueError):
    """The folder cannot be upgraded."""


def upgrade(
    folder: str | Path, sidecar: str | Path | None = None, overwrite: bool = False
) -> str:
    """Bring a converted folder to the present format; or make a sidecar of it.

    The rows go where the model's own are the same, put in cluster order. All other
    files stay as they are. A sidecar stores no rows: where those of the folder are
    others than the model's, exact decoding has the model's instead.

    Args:
        folder: A converted folder. It is replaced once the new one is whole.
        sidecar: The file or folder to make, as for ``convert``; the folder stays.
        overwrite: Replace a sidecar that is there.

    Returns:
        What was done, in one line.

    Raises:
        UpgradeError, FormatError, StagingError: Each a ``ValueError`` with one line
        that says what to do. The folder is as it was then.
    """
    folder = Path(folder)
    recover(folder)
    section = read_section(folder) if folder.is_dir() else None
    if section is None:
        raise UpgradeError(
            f"--upgrade {folder} has no FlashHead; give a folder that "
            "mlx_flashhead.convert made"
        )
    table = _checked_table(folder, section)
    head = layout.load_head(folder, section, None, table)
    same = not section.stored_rows
    if not same and layout.form_of(table) == section.rows:
        same = _same(head.rows, layout.in_order(table, head.token_ids, section))
    new = replace(
        section,
        format_version=FORMAT_VERSION,
        stored_rows=not same and sidecar is None,
        head_sha256=layout.table_sha256(table),
    )
    if sidecar is not None:
        target = Path(sidecar)
        if new.draft is not None and not same:
            new = replace(new, draft=replace(new.draft, rows="model"))
        with staged(target, overwrite, True) as (result, _), writing(target):
            layout.save_head(result / HEAD_FILE, head, new)
            result.chmod(0o755)
        return f"{target}: the FlashHead of {folder}, {_size(target):,} bytes"
    before = _size(folder)
    kept = new.stored_rows == section.stored_rows
    if section.format_version == FORMAT_VERSION and kept:
        return f"{folder} is of format {FORMAT_VERSION}, and stores nothing twice"
    with staged(folder, True) as (result, _), writing(folder):
        for entry in folder.iterdir():
            if entry.name not in (HEAD_FILE, "config.json"):
                _copy(entry, result / entry.name)
        shutil.copyfile(folder / "config.json", result / "config.json")
        new = layout.save_head(result / HEAD_FILE, head, new)
        layout.seal(result, new, integrity.weight_files(result))
        shutil.copymode(folder, result)
    return (
        f"{folder}: format {section.format_version} to {FORMAT_VERSION}, {before:,} to "
        f"{_size(folder):,} bytes"
    )


def _checked_table(folder: Path, section: Section) -> Table:
    """The rows ``[V, D]`` of the plain model's head, lazy; the folder was checked as it
    is for loading."""
    n_tensors = integrity.check_sizes(folder)
    with integrity.bounded(folder, n_tensors):
        model, _ = utils.load_model(folder, lazy=True)
    try:
        table = head_table(get_module(model, section.head_path))
    except (HeadNotFound, AttributeError) as e:
        raise FormatError(f"{folder}: {e}; convert the model again") from None
    integrity.check_finite(folder, layout.read_tensors(folder, section))
    integrity.check_unchanged(folder, section, table, folder)
    return table


def _same(stored: Table, own: Table) -> bool:
    """Whether rows of the same form are the same, bit for bit, padding included."""
    return all(
        a is None or (b is not None and bool(mx.array_equal(a, b).item()))
        for a, b in zip(stored.arrays, own.arrays, strict=True)
    )


def _copy(entry: Path, target: Path) -> None:
    """A file or folder under another name: large ones linked, not copied."""

    def link(source: str, other: str) -> None:
        try:
            os.link(os.path.realpath(source), other)
        except OSError:  # a file system without links, or a border between two
            shutil.copy2(source, other)

    if entry.is_dir():
        shutil.copytree(entry, target, copy_function=link)
    else:
        link(str(entry), str(target))


def _size(path: Path) -> int:
    files = [path] if path.is_file() else [f for f in path.rglob("*") if f.is_file()]
    return sum(f.stat().st_size for f in files)
