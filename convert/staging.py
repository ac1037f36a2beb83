"""Write a folder whole or not at all."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path


class StagingError(ValueError):
    """The target folder cannot be written."""


@contextlib.contextmanager
def staged(target: Path) -> Iterator[tuple[Path, Path]]:
    """Give ``(result, workspace)``: folders in a hidden temporary folder beside the
    target. On success ``result`` becomes the target, in one rename; the rest goes in
    any case.

    Raises:
        StagingError: The target exists, or its parent cannot be written.
    """
    if target.exists() or target.is_symlink():
        raise StagingError(
            f"{target} already exists; delete it or choose another --mlx-path"
        )
    new_parents = [p for p in target.parents if not p.exists()]
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        hidden = tempfile.mkdtemp(prefix=f".{target.name}.partial-", dir=target.parent)
    except OSError as e:
        raise StagingError(f"cannot write beside {target}: {e.strerror}") from e
    try:
        result, workspace = Path(hidden, "result"), Path(hidden, "workspace")
        result.mkdir()
        workspace.mkdir()
        yield result, workspace
        try:
            os.rename(result, target)
        except OSError as e:
            raise StagingError(f"cannot create {target}: {e.strerror}") from e
    finally:
        shutil.rmtree(hidden, ignore_errors=True)
        if not target.exists():
            with contextlib.suppress(OSError):
                for parent in new_parents:
                    parent.rmdir()


@contextlib.contextmanager
def writing(target: Path) -> Iterator[None]:
    """Say of an error in writing where it was and what to do."""
    try:
        yield
    except (OSError, RuntimeError) as e:
        reason = getattr(e, "strerror", None) or " ".join(str(e).split())
        raise StagingError(
            f"cannot write {target}: {reason}; if the disk is full, free some space "
            "or choose another --mlx-path"
        ) from e


def check_space(folder: Path, n_bytes: int) -> None:
    """Raise StagingError if the disk has less than ``n_bytes`` left."""
    free = shutil.disk_usage(folder).free
    if free < n_bytes:
        raise StagingError(
            f"the disk has {free / 1e9:.1f} GB left and the converted model needs "
            f"{n_bytes / 1e9:.1f} GB; free some space or choose another --mlx-path"
        )
