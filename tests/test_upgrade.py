"""Folders of older formats: read as they are, and brought to the present one."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import mlx.core as mx
import pytest
import small_models
from click.testing import CliRunner
from mlx.utils import tree_flatten
from mlx_flashhead.convert import convert
from mlx_flashhead.convert import upgrade as module
from mlx_flashhead.convert.cli import main
from mlx_flashhead.convert.upgrade import UpgradeError, upgrade
from test_publish import content
from test_verify import edit_json, edit_weights, section_of

from mlx_flashhead import flash_heads, load
from mlx_flashhead.folder.format import seal
from mlx_flashhead.folder.integrity import weight_files
from mlx_flashhead.folder.section import (
    CONFIG_KEY,
    HEAD_FILE,
    FormatError,
    read_section,
    section_sha256,
)

TOKENS = mx.array([[84, 104, 101, 32, 113]])
PACKED = {"group_size": 32, "bits": 8}


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MLX_FLASHHEAD_CACHE", str(tmp_path / "cache"))


def tensors_of(folder: Path) -> dict[str, mx.array]:
    """Those of the FlashHead of a folder, rows included, wherever they come from."""
    model, _ = load(folder, exact=False, lazy=True)
    return dict(tree_flatten(next(flash_heads(model)).parameters()))


def of_version(folder: Path, version: int) -> None:
    """Make of a folder what a package before this one wrote."""
    tensors = tensors_of(folder)
    stored = mx.load(str(folder / HEAD_FILE))
    # On a CPU scales are float32 once they are loaded.
    like = stored.get("rows.scales", stored["centroids.scales"]).dtype
    for name in ("rows.weight", "rows.scales", "rows.biases"):
        packed = name == "rows.weight"
        stored[name] = tensors[name] if packed else tensors[name].astype(like)
    mx.eval(stored)

    def edit(config):
        section = config[CONFIG_KEY]
        section["format_version"] = version
        del section["stored_rows"], section["tensors_sha256"], section["sha256"]
        if version < 3:
            del section["files"]
        if version < 2:
            section["tail_offset"] = section["tail_offset"][2]
            del section["temperatures"], section["head_sha256"]

    if version < 2:
        stored["excess"] = stored["excess"][2] + 0
        mx.eval(stored)
    metadata = {"format": "mlx", "flashhead_version": str(version)}
    mx.save_safetensors(str(folder / HEAD_FILE), stored, metadata)
    if version == 3:
        seal(folder, section_of(folder), weight_files(folder))
    edit_json(folder / "config.json", edit)
    if version == 3:

        def sign(config):
            section = config[CONFIG_KEY]
            section["sha256"] = section_sha256(section)

        edit_json(folder / "config.json", sign)


@pytest.fixture(scope="module", params=["packed", "plain"])
def converted(request, tmp_path_factory):
    """A folder whose model has the rows' bits, and one where it has others."""
    tmp = tmp_path_factory.mktemp(request.param)
    quantize = PACKED if request.param == "packed" else None
    options = {"dtype": "float16", "quantize": quantize}
    source = small_models.write("llama-tied", tmp / "source", 1003, **options)
    convert(str(source), tmp / "made", cluster_size=8, n_probes=90, verbose=False)
    return tmp / "made"


@pytest.fixture
def folder(converted, tmp_path) -> Path:
    return Path(shutil.copytree(converted, tmp_path / "model"))


@pytest.mark.parametrize("version", [1, 2, 3])
def test_folders_of_before(folder, version):
    packed = not section_of(folder).stored_rows
    of_version(folder, version)
    assert section_of(folder).format_version == version
    options = ({}, {"exact": False}, {"dense": True})
    wanted = [load(folder, **o)[0](TOKENS) for o in options]
    before = content(folder)
    os.chmod(folder, 0o750)
    line = upgrade(folder)
    assert f"format {version} to 4" in line and "\n" not in line
    section = section_of(folder)
    assert section.format_version == 4 and section.intact
    assert section.stored_rows != packed
    assert read_section(folder / HEAD_FILE).intact
    after = content(folder)
    changed = {n for n in before if before[n] != after[n]}
    assert changed == {HEAD_FILE, "config.json"} and before.keys() == after.keys()
    if packed:
        assert len(after[HEAD_FILE]) < len(before[HEAD_FILE]) / 4
    for o, logits in zip(options, wanted, strict=True):
        assert mx.array_equal(load(folder, **o)[0](TOKENS), logits)
    assert folder.stat().st_mode & 0o777 == 0o750
    assert [f.name for f in folder.parent.iterdir() if f.name != "cache"] == ["model"]
    # Once is enough.
    assert "nothing twice" in upgrade(folder) and content(folder) == after


def test_what_is_made_now_is_what_an_upgrade_gives(folder):
    wanted = content(folder)
    of_version(folder, 3)
    assert content(folder) != wanted
    upgrade(folder)
    found = content(folder)
    assert {n for n in wanted if wanted[n] != found[n]} == set()


def test_a_sidecar_of_a_folder(folder, tmp_path):
    of_version(folder, 2)
    before = content(folder)
    plain = Path(shutil.copytree(folder, tmp_path / "plain"))
    (plain / HEAD_FILE).unlink()
    edit_json(plain / "config.json", lambda c: c.pop(CONFIG_KEY))
    done = CliRunner().invoke(
        main, ["--upgrade", str(folder), "--sidecar", str(tmp_path / "side")]
    )
    assert done.exit_code == 0 and str(tmp_path / "side") in done.output
    assert content(folder) == before
    assert not read_section(tmp_path / "side").stored_rows
    wanted = load(folder)[0](TOKENS)
    found = load(plain, flashhead=tmp_path / "side")[0](TOKENS)
    assert mx.array_equal(found, wanted)


@pytest.mark.parametrize("error", [OSError(28, "No space left"), KeyboardInterrupt()])
def test_an_error_leaves_the_folder_as_it_was(folder, monkeypatch, error):
    of_version(folder, 3)
    before = content(folder)

    def fail(*_):
        raise error

    monkeypatch.setattr(module.layout, "seal", fail)
    with pytest.raises((ValueError, KeyboardInterrupt)):
        upgrade(folder)
    assert content(folder) == before
    assert [f.name for f in folder.parent.iterdir() if f.name != "cache"] == ["model"]


def test_what_a_killed_upgrade_left_comes_back(folder):
    """Killed between the two renames that replace a folder."""
    of_version(folder, 3)
    before = content(folder)
    hidden = folder.parent / f".{folder.name}.partial-x"
    hidden.mkdir()
    folder.rename(hidden / "old")
    upgrade(folder)
    assert content(folder).keys() == before.keys() and not hidden.exists()
    assert section_of(folder).format_version == 4


def test_what_cannot_be_upgraded(folder, untied_source, tmp_path):
    for what in (untied_source, tmp_path / "nothing", tmp_path):
        with pytest.raises(UpgradeError, match="no FlashHead"):
            upgrade(what)
    of_version(folder, 3)

    def edit(tensors):
        tensors["spread"][0] += 1

    edit_weights(folder / HEAD_FILE, edit)
    before = content(folder)
    with pytest.raises(FormatError, match="damaged"):
        upgrade(folder)
    assert content(folder) == before


def test_options_that_do_not_go_with_it(folder):
    for words in (["--hf-path", "a/b"], ["--head-bits", "4"], ["-q"], ["--json"]):
        done = CliRunner().invoke(main, ["--upgrade", str(folder), *words])
        assert done.exit_code == 1 and "--upgrade does not go with" in done.output
    assert json.loads((folder / "config.json").read_text())
