"""Write a folder, or a FlashHead's file, whole or not at all."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from filelock import lock_descriptor

from mlx_flashhead.folder.section import HEAD_FILE, FormatError, read_section


class StagingError(ValueError):
    """The target folder cannot be written."""


@contextlib.contextmanager
def staged(
    target: Path, overwrite: bool = False, sidecar: bool = False
) -> Iterator[tuple[Path, Path]]:
    """Give ``(result, workspace)``: folders in a hidden temporary folder beside the
    target. On success ``result`` becomes the target, in one rename; the rest goes in
    any case. What a killed process left beside this target goes first.

    Args:
        target: The folder to make; or, of a sidecar alone, the file.
        overwrite: Replace a model's folder that is there. It stays until the new one
          is whole.
        sidecar: Whether the folder is of a FlashHead without its model, which
          replaces nothing else; only its file is kept where the target is one.

    Raises:
        StagingError: The target exists, or its parent cannot be written.
    """
    _check_free(target, overwrite, sidecar)
    new_parents = [p for p in target.parents if not p.exists()]
    with contextlib.ExitStack() as locks:
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            # The lock keeps another process from sweeping a folder not locked yet.
            with _locked(target.parent):
                _sweep(target)
                prefix = _prefix(target)
                hidden = Path(tempfile.mkdtemp(prefix=prefix, dir=target.parent))
                locks.enter_context(_locked(hidden))
        except OSError as e:
            raise StagingError(f"cannot write beside {target}: {e.strerror}") from e
        try:
            result, workspace = hidden / "result", hidden / "workspace"
            result.mkdir()
            workspace.mkdir()
            yield result, workspace
            try:
                made = result / HEAD_FILE if is_file(target, sidecar) else result
                _put(made, target, hidden / _OLD, overwrite, sidecar)
            except OSError as e:
                raise StagingError(f"cannot create {target}: {e.strerror}") from e
        finally:
            shutil.rmtree(hidden, ignore_errors=True)
            if not target.exists():
                with contextlib.suppress(OSError):
                    for parent in new_parents:
                        parent.rmdir()


# Where the folder that is overwritten stands between two renames.
_OLD = "old"


def is_file(target: Path, sidecar: bool) -> bool:
    """Whether a target is the file of a sidecar, without a folder around it."""
    return sidecar and target.suffix == ".safetensors"


def _check_free(target: Path, overwrite: bool, sidecar: bool) -> None:
    if not target.exists() and not target.is_symlink():
        return
    flag = "--sidecar" if sidecar else "--mlx-path"
    if not overwrite:
        raise StagingError(
            f"{target} already exists; delete it, choose another {flag} or give "
            "--overwrite"
        )
    # Nothing but a model is ever replaced, and by a sidecar nothing but another.
    same = (target / "config.json").is_file()
    what = "folder of a model"
    if sidecar:
        same, what = not same and _has_head(target), "sidecar"
    if target.is_symlink() or not same:
        raise StagingError(f"--overwrite: {target} is no {what}; choose another {flag}")


def _has_head(target: Path) -> bool:
    try:
        return read_section(target) is not None
    except FormatError:
        return False


def _put(result: Path, target: Path, old: Path, overwrite: bool, sidecar: bool) -> None:
    if overwrite and target.exists():
        _check_free(target, overwrite, sidecar)
        try:
            os.rename(target, old)
            os.rename(result, target)
        # Interruptions, too: what was there would go with the hidden folder.
        except BaseException:
            if old.exists() and not target.exists():
                os.rename(old, target)
            raise
    else:
        os.rename(result, target)


def _prefix(target: Path) -> str:
    return f".{target.name}.partial-"


def _sweep(target: Path) -> None:
    """Delete what processes that are gone left beside the target: their locks went
    with them. A folder that one of them was about to replace comes back."""
    for entry in list(target.parent.iterdir()):
        if not entry.name.startswith(_prefix(target)) or entry.is_symlink():
            continue
        with contextlib.suppress(OSError), _locked(entry, blocking=False) as gone:
            if not gone:
                continue
            if (entry / _OLD).exists() and not target.exists():
                os.rename(entry / _OLD, target)
            shutil.rmtree(entry, ignore_errors=True)


def recover(target: Path) -> None:
    """Bring back a folder that a killed process was about to replace."""
    if not target.exists() and target.parent.is_dir():
        with _locked(target.parent):
            _sweep(target)


@contextlib.contextmanager
def _locked(folder: Path, blocking: bool = True) -> Iterator[bool]:
    """Hold the lock of a folder itself, until the block or the process ends; give
    whether it was free, where that is not waited for. A lock file would be left behind.

    Raises:
        OSError: The file system has no locks, or the folder is gone.
    """
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        yield lock_descriptor(handle, blocking=blocking)
    finally:
        os.close(handle)


@contextlib.contextmanager
def writing(target: Path) -> Iterator[None]:
    """Say of an error in writing where it was and what to do."""
    try:
        yield
    except MemoryError:
        raise
    # The tokenizers package says of a full disk no more than Exception.
    except Exception as e:
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
