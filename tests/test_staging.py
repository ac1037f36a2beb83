"""Folders are written whole or not at all, whatever happens meanwhile."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from mlx_flashhead.convert.staging import StagingError, staged

HOLD = """
import sys
from pathlib import Path
from mlx_flashhead.convert.staging import staged
with staged(Path(sys.argv[1])) as (result, workspace):
    (result / "config.json").write_text("{}")
    print("ready", flush=True)
    sys.stdin.readline()
"""


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def model(folder: Path, text: str = "{}") -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(text)
    return folder


def hold(target: Path) -> subprocess.Popen:
    """Another process in the middle of writing the target."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(target)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "ready\n"
    return process


def make(target: Path, text: str = "{}", **options) -> None:
    with staged(target, **options) as (result, _):
        (result / "config.json").write_text(text)


def test_leftovers_of_a_killed_process_are_swept(tmp_path):
    process = hold(tmp_path / "model")
    process.kill()
    process.communicate()
    (left,) = names(tmp_path)
    assert left.startswith(".model.partial-")
    # Another target's are not this one's business.
    make(tmp_path / "other")
    assert left in names(tmp_path)
    make(tmp_path / "model")
    assert names(tmp_path) == ["model", "other"]


def test_a_live_process_is_left_alone(tmp_path):
    process = hold(tmp_path / "model")
    try:
        with pytest.raises(ZeroDivisionError), staged(tmp_path / "model"):
            assert len(names(tmp_path)) == 2
            raise ZeroDivisionError
        assert len(names(tmp_path)) == 1
    finally:
        process.communicate("\n")
    assert process.returncode == 0
    assert names(tmp_path) == ["model"]


def test_the_first_of_two_wins(tmp_path):
    process = hold(tmp_path / "model")
    make(tmp_path / "model", "[1]")
    process.communicate("\n")
    assert process.returncode == 1
    assert names(tmp_path) == ["model"]
    assert (tmp_path / "model/config.json").read_text() == "[1]"


def test_links_among_leftovers_are_not_followed(tmp_path):
    precious = model(tmp_path / "precious")
    (tmp_path / ".model.partial-x").symlink_to(precious)
    make(tmp_path / "model")
    assert (precious / "config.json").exists()


def test_overwrite(tmp_path):
    target = model(tmp_path / "model", "old")
    with pytest.raises(StagingError, match="--overwrite"):
        make(target)
    with pytest.raises(ZeroDivisionError), staged(target, overwrite=True):
        assert (target / "config.json").read_text() == "old"
        raise ZeroDivisionError
    assert (target / "config.json").read_text() == "old"
    (target / "left").write_text("of the old one")
    make(target, "new", overwrite=True)
    assert (target / "config.json").read_text() == "new"
    assert names(target) == ["config.json"] and names(tmp_path) == ["model"]


def test_overwrite_makes_what_is_not_there(tmp_path):
    make(tmp_path / "a/model", overwrite=True)
    assert names(tmp_path / "a") == ["model"]


@pytest.mark.parametrize("kind", ["file", "folder", "link"])
def test_only_models_are_overwritten(tmp_path, kind):
    target = tmp_path / "target"
    if kind == "file":
        target.write_text("mine")
    elif kind == "folder":
        target.mkdir()
        (target / "thesis.tex").write_text("mine")
    else:
        target.symlink_to(model(tmp_path / "model"))
    with pytest.raises(StagingError, match="no folder of a model"):
        make(target, overwrite=True)
    assert target.exists() and len(names(tmp_path)) == (2 if kind == "link" else 1)


KILLED = """
import os, signal, sys
from pathlib import Path
from mlx_flashhead.convert import staging
rename, left = os.rename, [int(sys.argv[2])]
def killing(a, b):
    rename(a, b)
    left[0] -= 1
    if not left[0]:
        os.kill(os.getpid(), getattr(signal, sys.argv[3]))
os.rename = killing
with staging.staged(Path(sys.argv[1]), overwrite=True) as (result, _):
    (result / "config.json").write_text("new")
"""


@pytest.mark.parametrize("name", ["SIGKILL", "SIGINT"])
def test_killed_between_the_renames_the_old_folder_comes_back(tmp_path, name):
    target = model(tmp_path / "model", "old")
    # Processes started by a shell in the background ignore SIGINT otherwise.
    code = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
    words = [sys.executable, "-c", code + KILLED, str(target), "1", name]
    done = subprocess.run(words, capture_output=True)
    assert done.returncode == -getattr(signal, name) or name == "SIGINT"
    with pytest.raises(ZeroDivisionError), staged(target, overwrite=True):
        assert (target / "config.json").read_text() == "old"
        raise ZeroDivisionError
    assert names(tmp_path) == ["model"]


def test_a_parent_that_cannot_be_written(tmp_path):
    if os.geteuid() == 0:
        pytest.skip("root may write everywhere")
    tmp_path.chmod(0o500)
    with pytest.raises(StagingError, match="cannot write beside"):
        make(tmp_path / "model")
