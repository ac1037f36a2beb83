"""The folder format: what is saved comes back, and damage is named in one line."""

from __future__ import annotations

import json
import os
import shutil
import struct
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from small_heads import make_head, random_states

from mlx_flashhead import FlashHead, flash_heads, load
from mlx_flashhead.compute.table import Table
from mlx_flashhead.folder.format import (
    HEAD_FILE,
    describe,
    load_head,
    save_head,
    seal,
    table_sha256,
)
from mlx_flashhead.folder.section import (
    CONFIG_KEY,
    FORMAT_VERSION,
    FormatError,
    Measured,
    Section,
    TableForm,
    has_section,
    read_section,
)


def tensors_of(head: FlashHead) -> dict[str, mx.array]:
    return dict(tree_flatten(head.parameters()))


def save(folder: Path, head: FlashHead) -> Section:
    """The section as a real folder has it."""
    section = describe(head, "lm_head", "0" * 64)
    seal(folder, save_head(folder / HEAD_FILE, head, section), [])
    section = read_section(folder)
    assert section is not None and section.intact
    return section


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    "bits, centroid_bits, dtype",
    [
        (32, 32, mx.float32),
        (16, 4, mx.bfloat16),
        (8, 4, mx.float16),
        (6, 5, mx.bfloat16),
        (4, 2, mx.float32),
    ],
)
def test_a_head_comes_back_bit_for_bit(tmp_path, bits, centroid_bits, dtype, bias):
    head = make_head(
        497, bits=bits, centroid_bits=centroid_bits, dtype=dtype, bias=bias
    ).head
    back = load_head(tmp_path, save(tmp_path, head))
    saved, loaded = tensors_of(head), tensors_of(back)
    assert saved.keys() == loaded.keys()
    for name, value in saved.items():
        assert value.dtype == loaded[name].dtype
        assert mx.array_equal(value, loaded[name]), name
    for name in (
        "vocab_size",
        "n_clusters",
        "cluster_size",
        "n_probes",
        "tail_offset",
        "temperatures",
    ):
        assert getattr(head, name) == getattr(back, name)
    x = mx.array(random_states(3))
    assert mx.array_equal(head(x), back(x))
    assert mx.array_equal(head.dense(x), back.dense(x))
    for mine, theirs in zip(head.candidates(x), back.candidates(x)):
        assert mx.array_equal(mine, theirs)


def test_the_config_describes_the_head(tmp_path):
    section = save(tmp_path, make_head(497, bits=6, centroid_bits=3).head)
    assert section.format_version == FORMAT_VERSION == 4
    assert section.head_path == "lm_head"
    assert section.rows == TableForm(bits=6, group_size=32, mode="affine")
    assert section.centroids == TableForm(bits=3, group_size=32, mode="affine")
    assert (section.n_clusters, section.cluster_size) == (63, 8)
    assert (section.vocab_size, section.hidden_size) == (497, 64)


def test_the_file_is_plain_safetensors(tmp_path):
    head = make_head(497).head
    save(tmp_path, head)
    with (tmp_path / HEAD_FILE).open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))
    assert header["__metadata__"]["flashhead_version"] == "4"
    assert header["token_ids"]["dtype"] == "U32"
    assert header["rows.weight"]["shape"] == [63, 8, 16]
    assert header["spread"] == header["spread"] | {"dtype": "F32", "shape": [63]}


def test_version_1_had_one_temperature(tmp_path):
    head = make_head(497).head
    stored = save(tmp_path, head).to_json()
    stored |= {"format_version": 1, "tail_offset": head.tail_offset[0]}
    del stored["temperatures"]
    tensors = mx.load(str(tmp_path / HEAD_FILE))
    tensors["excess"] = tensors["excess"][0] + 0
    mx.eval(tensors)
    mx.save_safetensors(str(tmp_path / HEAD_FILE), tensors)
    back = load_head(tmp_path, Section.from_json(stored))
    x = mx.array(random_states(3))
    assert mx.array_equal(head(x), back(x))
    assert back.temperatures == (1.0,) and back.tail_offset == head.tail_offset


def test_a_folder_has_a_section_or_not(tmp_path):
    for text in (None, '{"model_type": "llama"}'):
        if text is not None:
            (tmp_path / "config.json").write_text(text)
        assert read_section(tmp_path) is None and not has_section(str(tmp_path))
    # The dense head needs nothing of it.
    (tmp_path / "config.json").write_text('{"flashhead": {"n_probes": 3}}')
    assert has_section(tmp_path)
    for text in ('{"flashhead": {"n_probes": 3}}', "{", "[1, 2]", "\x00", ""):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(FormatError) as error:
            read_section(tmp_path)
        assert "config.json" in str(error.value) and "\n" not in str(error.value)


# As folders have it that were converted before there was a class for it.
STORED = """{
    "format_version": 4, "head_path": "lm_head", "head_sha256": "03", "vocab_size": 497,
    "stored_rows": true, "tensors_sha256": "04",
    "hidden_size": 64, "n_clusters": 63, "cluster_size": 8, "n_probes": 4,
    "temperatures": [2.0, 1, 0.3], "tail_offset": [0, 0.25, -1e-08],
    "rows": {"bits": 8, "group_size": 32, "mode": "affine"},
    "centroids": {"bits": 16, "group_size": 0, "mode": "affine"},
    "recipe": "default", "seed": 0, "calibration": "built-in",
    "measured": {"recall": 1.0, "agreement": 0.99, "kl": 0.01, "held_out_tokens": 9},
    "clusters": "assets", "files": {"flashhead.safetensors": "47"},
    "sha256": "%s"
}"""
DIGEST = "a507bd4ac59197587e9411cc0c2fe4783520b284b9d6f9e2e531b925b4e48406"


def test_a_section_is_read_as_it_was_written():
    stored = json.loads(STORED % DIGEST)
    section = Section.from_json(stored)
    assert section.intact and section.to_json() == stored
    assert section.measured == Measured(1.0, 0.99, 0.01, 9)
    # What is unknown here is the digest's business alone.
    assert not Section.from_json(stored | {"later": [1]}).intact
    assert not Section.from_json(stored | {"n_probes": 5}).intact


@pytest.mark.parametrize(
    "key, value",
    [
        ("recipe", 3),
        ("seed", "0"),
        ("calibration", None),
        ("clusters", ["assets"]),
        ("head_sha256", 5),
        ("measured", {"recall": 1.0}),
        ("measured", {"recall": 1, "agreement": 1, "kl": "0", "held_out_tokens": 9}),
        ("files", ["flashhead.safetensors"]),
        ("files", {"../flashhead.safetensors": "47"}),
        ("files", {"flashhead.safetensors": 47}),
    ],
)
def test_what_a_section_says_of_its_making_is_checked_too(key, value):
    stored = json.loads(STORED % DIGEST) | {key: value}
    with pytest.raises(FormatError, match=rf"^{key}\b.*; convert the model again$"):
        Section.from_json(stored)


def test_sha256_is_of_the_rows_as_stored():
    rows = mx.array(random_states(20)).astype(mx.bfloat16)
    digests = {
        table_sha256(Table(rows)),
        table_sha256(Table(rows.astype(mx.float32), bits=32)),
        table_sha256(Table(rows[::-1])),
        table_sha256(Table.from_dense(rows, 8, 32)),
        table_sha256(Table.from_dense(rows, 4, 32)),
    }
    assert len(digests) == 5
    assert all(len(d) == 64 for d in digests)
    again = Table(mx.concatenate([rows, rows])[:20])
    assert table_sha256(again) == table_sha256(Table(rows))


# ---------------------------------------------------------------------------
# Damage
# ---------------------------------------------------------------------------


@pytest.fixture
def folder(untied_folder, tmp_path) -> Path:
    """A converted folder to be damaged."""
    return Path(shutil.copytree(untied_folder, tmp_path / "model"))


def edit_config(folder: Path, edit) -> None:
    file = folder / "config.json"
    config = json.loads(file.read_text())
    edit(config[CONFIG_KEY])
    file.write_text(json.dumps(config))


def edit_tensors(folder: Path, edit) -> None:
    file = folder / HEAD_FILE
    tensors = mx.load(str(file))
    mx.eval(tensors)
    edit(tensors)
    mx.save_safetensors(str(file), tensors)


def complaint(folder: Path, **options) -> str:
    with pytest.raises(FormatError) as error:
        load(folder, **options)
    message = str(error.value)
    assert "\n" not in message and len(message) < 600
    assert str(folder) in message
    return message


def test_an_undamaged_folder_loads(folder):
    edit_config(folder, lambda section: None)
    model, _ = load(folder)
    assert len(list(flash_heads(model))) == 1


def test_missing_head_file(folder):
    (folder / HEAD_FILE).unlink()
    assert HEAD_FILE in complaint(folder)
    # Dense still works, as the message says.
    model, _ = load(folder, dense=True)
    assert list(flash_heads(model)) == []


@pytest.mark.parametrize("keep", [0, 7, 100, 0.5, 0.999])
def test_truncated_head_file(folder, keep):
    file = folder / HEAD_FILE
    size = file.stat().st_size
    os.truncate(file, keep if keep >= 1 or keep == 0 else int(keep * size))
    assert HEAD_FILE in complaint(folder)


def test_garbage_in_place_of_the_head_file(folder):
    (folder / HEAD_FILE).write_bytes(np.random.default_rng(0).bytes(5000))
    complaint(folder)
    (folder / HEAD_FILE).write_text("version https://git-lfs.github.com/spec/v1\n")
    complaint(folder)


WRONG_SHAPES = {
    "token_ids": lambda a: a[:-1],
    "spread": lambda a: a[:, None],
    "excess": lambda a: a[:5],
    "rows.weight": lambda a: a[..., :-1],
    "rows.scales": lambda a: a[:, :-1],
    "rows.biases": lambda a: a[:-1],
    "centroids.weight": lambda a: a[:-1],
    "centroids.scales": lambda a: a[..., None],
    "centroids.biases": lambda a: a[:-1],
}


@pytest.mark.parametrize("name", WRONG_SHAPES)
def test_wrong_shape(folder, name):
    edit_tensors(folder, lambda t: t.update({name: WRONG_SHAPES[name](t[name])}))
    assert name in complaint(folder)


@pytest.mark.parametrize("name", WRONG_SHAPES)
def test_missing_tensor(folder, name):
    edit_tensors(folder, lambda t: t.pop(name))
    complaint(folder)


@pytest.mark.parametrize("value", [5000, 2**32 - 1])
def test_token_ids_out_of_range(folder, value):
    def edit(tensors):
        tensors["token_ids"][3, 2] = value

    edit_tensors(folder, edit)
    assert "token_ids" in complaint(folder)


def test_token_ids_that_are_no_permutation(folder):
    def edit(tensors):
        tensors["token_ids"][3, 2] = tensors["token_ids"][0, 0]

    edit_tensors(folder, edit)
    assert "token_ids" in complaint(folder)


@pytest.mark.parametrize(
    "key, value",
    [
        ("format_version", 99),
        ("format_version", None),
        ("n_clusters", 10),
        ("cluster_size", 0),
        ("vocab_size", 2000),
        ("vocab_size", 1002),
        ("vocab_size", "many"),
        ("hidden_size", 128),
        ("hidden_size", None),
        ("n_probes", 0),
        ("n_probes", 10_000),
        ("n_probes", None),
        ("tail_offset", "none"),
        ("tail_offset", 0.5),
        ("tail_offset", []),
        ("tail_offset", [0.5]),
        ("tail_offset", [1e300] * 7),
        ("temperatures", [1.0]),
        ("temperatures", None),
        ("temperatures", [2.0, 1.4, 1.0, 0.75, 0.55, 0.4, 0.0]),
        ("temperatures", [2.0, 1.4, 1.0, 1.0, 0.55, 0.4, 0.3]),
        ("temperatures", [2.0, 1.4, 1.0, 0.75, 0.55, 0.4, float("nan")]),
        ("rows", None),
        ("rows", {"bits": 4, "group_size": 64, "mode": "affine"}),
        ("rows", {"bits": 16, "group_size": 0, "mode": "affine"}),
        ("rows", {"bits": 8, "group_size": 64}),
        ("centroids", {"bits": 8, "group_size": 64, "mode": "affine"}),
        ("head_path", "model.head"),
        ("head_path", None),
    ],
)
def test_wrong_config(folder, key, value):
    edit_config(folder, lambda section: section.update({key: value}))
    complaint(folder)


@pytest.mark.parametrize(
    "key", ["format_version", "n_clusters", "rows", "tail_offset", "head_path"]
)
def test_incomplete_config(folder, key):
    edit_config(folder, lambda section: section.pop(key))
    complaint(folder)


@pytest.mark.parametrize("section", [True, [], "yes", 5])
def test_a_section_that_is_no_object(folder, section):
    file = folder / "config.json"
    config = json.loads(file.read_text()) | {CONFIG_KEY: section}
    file.write_text(json.dumps(config))
    complaint(folder)
