"""What changed since the conversion is refused by name, before it can do harm."""

from __future__ import annotations

import json
import os
import shutil
import struct
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
import pytest
import small_models
from mlx_flashhead.convert import convert
from mlx_flashhead.convert.source import SourceError, open_hf
from test_files import complaint

from mlx_flashhead import flash_heads, load, patched
from mlx_flashhead.folder import cache, integrity
from mlx_flashhead.folder import format as files
from mlx_flashhead.folder.format import HEAD_FILE
from mlx_flashhead.folder.section import (
    CONFIG_KEY,
    FormatError,
    Section,
    read_section,
    section_sha256,
)

TOKENS = mx.array([[72, 101, 108]])


@pytest.fixture(params=["tied", "untied"])
def folder(request, tmp_path) -> Path:
    source = request.getfixturevalue(f"{request.param}_folder")
    return Path(shutil.copytree(source, tmp_path / "model"))


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MLX_FLASHHEAD_CACHE", str(tmp_path / "cache"))


def edit_json(file: Path, edit) -> None:
    content = json.loads(file.read_text())
    edit(content)
    file.write_text(json.dumps(content))


def edit_weights(file: Path, edit) -> None:
    weights = mx.load(str(file))
    mx.eval(weights)
    edit(weights)
    mx.save_safetensors(str(file), weights, {"format": "mlx"})


def section_of(folder: Path) -> Section:
    section = read_section(folder)
    assert section is not None
    return section


def reseal(folder: Path) -> None:
    """As if the converter had written the files as they are now."""
    files.seal(folder, section_of(folder), integrity.weight_files(folder))


def set_version(folder: Path, version: int) -> None:
    """Make of a folder what an older version of the package wrote."""

    def edit(config):
        section = config[CONFIG_KEY]
        section["format_version"] = version
        del section["files"], section["sha256"]

    edit_json(folder / "config.json", edit)


def head_weight(folder: Path) -> str:
    return section_of(folder).head_path + ".weight"


def test_the_config_has_the_digests_of_the_files(folder):
    section = section_of(folder)
    assert section.files.keys() == {"model.safetensors", HEAD_FILE}
    for name, digest in section.files.items():
        assert cache.file_sha256(folder / name) == digest


@pytest.mark.parametrize("version", [2, 3])
def test_a_fine_tuned_head_is_refused_and_runs_dense(folder, version):
    if version < 3:
        set_version(folder, version)
        load(folder)

    def edit(weights):
        # A single row.
        weights[head_weight(folder)][500] *= 1.01

    edit_weights(folder / "model.safetensors", edit)
    message = complaint(folder)
    assert "fine-tuned" in message and "MLX_FLASHHEAD=0" in message
    model, _ = load(folder, dense=True)
    assert list(flash_heads(model)) == []


def test_a_fine_tuned_body_is_refused(folder):
    def edit(weights):
        weights["model.layers.0.mlp.up_proj.weight"] += 0.01

    edit_weights(folder / "model.safetensors", edit)
    assert "model.safetensors is not what was converted" in complaint(folder)


def test_another_files_are_refused(folder):
    shutil.copy(folder / "model.safetensors", folder / "model-extra.safetensors")
    assert "model-extra.safetensors" in complaint(folder)
    (folder / "model-extra.safetensors").unlink()
    (folder / "model.safetensors").rename(folder / "model2.safetensors")
    assert "safetensors is not what was converted" in complaint(folder)


def test_a_head_of_another_model_is_refused(folder, tmp_path):
    """One with the same shapes."""
    name = "llama-tied" if "embed" in head_weight(folder) else "llama"
    source = small_models.write(name, tmp_path / "b", 1003, dtype="bfloat16", seed=5)
    convert(str(source), tmp_path / "c", cluster_size=8, n_probes=90, verbose=False)
    shutil.copy(tmp_path / "c" / HEAD_FILE, folder)
    assert HEAD_FILE in complaint(folder)


@pytest.mark.parametrize("command", ["convert", "requantize"])
def test_what_mlx_lm_converts_again(folder, tmp_path, command):
    """mlx_lm.convert keeps the config's section and leaves its file: refused, and
    both ways out work."""
    again = tmp_path / "again"
    mlx_lm.convert(str(folder), str(again), quantize=command == "requantize")
    message = complaint(again)
    assert "mlx-lm's own commands" in message and "dense" in message
    assert mlx_lm.load(str(again))[0](TOKENS).shape == (1, 3, 1003)
    load(again, dense=True)
    convert(str(again), tmp_path / "last", verbose=False)
    assert len(list(flash_heads(load(tmp_path / "last")[0]))) == 1
    assert section_of(tmp_path / "last").format_version == 4


def test_a_changed_model_is_converted_once_the_file_is_gone(folder):
    with pytest.raises(SourceError, match="delete"):
        open_hf(str(folder), None, False)
    (folder / HEAD_FILE).unlink()
    assert open_hf(str(folder), None, False).folder == folder


@pytest.mark.parametrize("version", [1, 2])
def test_older_folders_are_read(folder, version):
    wanted = load(folder)[0](TOKENS)
    set_version(folder, version)
    if version == 1:

        def edit(config):
            section = config[CONFIG_KEY]
            section["tail_offset"] = section["tail_offset"][2]
            del section["temperatures"], section["head_sha256"]

        edit_json(folder / "config.json", edit)

        def first(tensors):
            tensors["excess"] = tensors["excess"][2] + 0

        edit_weights(folder / HEAD_FILE, first)
    assert mx.array_equal(load(folder)[0](TOKENS), wanted)


def test_newer_folders_are_refused(folder):
    edit_json(folder / "config.json", lambda c: c[CONFIG_KEY].update(format_version=5))
    assert "upgrade" in complaint(folder)


@pytest.mark.parametrize("version", [2, 3])
@pytest.mark.parametrize(
    "name", ["spread", "excess", "rows.scales", "centroids.biases"]
)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite(untied_folder, tmp_path, version, name, value):
    folder = Path(shutil.copytree(untied_folder, tmp_path / "model"))

    def edit(tensors):
        tensors[name] = mx.where(mx.arange(tensors[name].shape[-1]) == 0, value,
            tensors[name]).astype(tensors[name].dtype)  # fmt: skip

    edit_weights(folder / HEAD_FILE, edit)
    reseal(folder)
    if version < 3:
        set_version(folder, version)
    assert f"{name} has NaN or infinite" in complaint(folder, exact=False)
    # Exact decoding has no use for the stored rows.
    if not name.startswith("rows"):
        assert f"{name} has NaN or infinite" in complaint(folder)


@pytest.mark.parametrize(
    "key, value",
    [
        ("n_probes", 80),
        ("tail_offset", [0.0] * 7),
        ("files", {}),
        ("sha256", "0"),
        ("files", {HEAD_FILE: "0", "../../secret.safetensors": "0"}),
        ("files", 3),
    ],
)
def test_an_edited_section(folder, key, value):
    edit_json(folder / "config.json", lambda c: c[CONFIG_KEY].update({key: value}))
    assert "config.json" in complaint(folder)
    edit_json(
        folder / "config.json",
        lambda c: c[CONFIG_KEY].update(sha256=section_sha256(c[CONFIG_KEY])),
    )
    if key == "files":
        complaint(folder)


def test_the_rest_of_the_config_may_be_edited(folder):
    edit_json(folder / "config.json", lambda c: c.update(eos_token_id=[257, 300]))
    assert load(folder)[1].eos_token_ids == {257, 300}


# ---------------------------------------------------------------------------
# Sizes
# ---------------------------------------------------------------------------


def write_header(file: Path, header, data: bytes = bytes(64)) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + data)


def entry(shape, offsets, dtype="F32"):
    return {"a": {"dtype": dtype, "shape": shape, "data_offsets": offsets}}


HEADERS = {
    "huge": entry([2**62], [0, 64]),
    "overflow to zero": entry([65536] * 4, [0, 0]),
    "zero times huge": entry([0, 2**40], [0, 0]),
    "negative": entry([-4], [0, 64]),
    "float": entry([4.0], [0, 16]),
    "true": entry([True], [0, 4]),
    "backwards": entry([4], [16, 0]),
    "beyond": entry([4], [56, 72]),
    "shape alone": {"a": {"shape": [1]}},
    "unknown type": entry([4], [0, 16], "F4"),
    "no entry": {"a": 5},
    "list": [1, 2],
    "deep": b"[" * 100_000,
    "not text": b"\xff\xfe",
    "twice": b'{"a": {"shape": [4]}, "a": '
    + json.dumps(entry([4], [0, 16])["a"]).encode()
    + b"}",
}


@pytest.mark.parametrize("name", [HEAD_FILE, "model.safetensors"])
@pytest.mark.parametrize("kind", HEADERS)
def test_hostile_headers(untied_folder, tmp_path, kind, name):
    folder = Path(shutil.copytree(untied_folder, tmp_path / "model"))
    write_header(folder / name, HEADERS[kind])
    assert name in complaint(folder)


@pytest.mark.parametrize("length", [0, 2**20, 2**63])
def test_a_header_longer_than_the_file(folder, length):
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", length) + b"{}")
    complaint(folder)


F32_8 = {"dtype": "F32", "shape": [8], "data_offsets": [0, 32]}
LAYOUTS = {
    "whole": {"a": F32_8, "b": F32_8 | {"data_offsets": [32, 64]}},
    # No more bytes than the file has, all the same.
    "overlap": {"a": F32_8, "b": F32_8 | {"data_offsets": [16, 48]}},
    "hole": {
        "a": F32_8 | {"shape": [4], "data_offsets": [0, 16]},
        "b": F32_8 | {"data_offsets": [32, 64]},
    },
    "trailing bytes": {"a": F32_8},
    "name twice": b'{"a": %b, "a": %b}' % ((json.dumps(F32_8).encode(),) * 2),
    "type that MLX lacks": {
        "a": {"dtype": "F4", "shape": [128], "data_offsets": [0, 64]}
    },
    "zero times huge": {
        "a": F32_8 | {"shape": [16], "data_offsets": [0, 64]},
        "b": F32_8 | {"shape": [0, 2**40], "data_offsets": [64, 64]},
    },
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_tensors_fill_their_file_one_after_the_other(tmp_path, layout):
    file = tmp_path / "model.safetensors"
    write_header(file, LAYOUTS[layout])
    if layout == "whole":
        assert integrity.check_safetensors(file) == 2
        return
    with pytest.raises(FormatError) as error:
        integrity.check_safetensors(file)
    assert str(file) in str(error.value) and "\n" not in str(error.value)


def test_weights_are_not_read(tmp_path):
    """A tebibyte of them, that the disk does not have either."""
    file = tmp_path / "model.safetensors"
    n_bytes = 1 << 40
    write_header(file, entry([n_bytes], [0, n_bytes], "U8"), b"")
    os.truncate(file, file.stat().st_size + n_bytes)
    with pytest.raises(FormatError, match="MLX"):
        integrity.check_safetensors(file)
    shape = [1 << 20, 1 << 20]
    write_header(file, entry(shape, [0, n_bytes], "U8"), b"")
    os.truncate(file, file.stat().st_size + n_bytes)
    assert integrity.check_safetensors(file) == 1


@pytest.mark.parametrize("value", [10**9, 1e300, 10**30])
def test_more_layers_than_the_files_hold(folder, value):
    """Building them would exhaust the memory before a weight is looked at."""
    edit_json(folder / "config.json", lambda c: c.update(num_hidden_layers=value))
    assert "num_hidden_layers" in complaint(folder)
    edit_json(folder / "config.json", lambda c: c.update(num_hidden_layers=2))
    edit_json(
        folder / "config.json", lambda c: c.update(text_config={"n_layer": value})
    )
    assert "n_layer" in complaint(folder)


def test_more_modules_than_the_files_hold(folder):
    """Under whatever name: here, llama builds a layer for each of a list."""
    edit_json(
        folder / "config.json",
        lambda c: c.update(layer_types=["full_attention"] * 9999),
    )
    assert "modules" in complaint(folder)
    with pytest.raises(FormatError, match="modules"):
        load(folder, dense=True)
    with pytest.raises(SourceError, match="modules"):
        (folder / HEAD_FILE).unlink()
        open_hf(str(folder), None, False).load(None)
    # Others may have as many as they like.
    assert len([nn.Module() for _ in range(3000)]) == 3000


@pytest.mark.parametrize(
    "name", ["config.json", "tokenizer.json", "model-2.safetensors", HEAD_FILE]
)
def test_what_is_no_file_is_never_read(folder, name):
    """A pipe would be waited for, a device read without end."""
    (folder / name).unlink(missing_ok=True)
    os.mkfifo(folder / name)
    assert "not a file" in complaint(folder)
    (folder / name).unlink()
    (folder / name).symlink_to("/dev/zero")
    assert "not a file" in complaint(folder)


@pytest.mark.parametrize("name", ["tokenizer.json", "chat_template.jinja"])
def test_texts_of_any_size(folder, name):
    os.truncate(folder / name, 1 << 40)
    assert f"{name} is too large" in complaint(folder)


@pytest.mark.parametrize("text", ["[" * 100_000, "9" * 10_000, "{" * 5])
def test_hostile_configs(folder, text):
    (folder / "config.json").write_text(f'{{"a": {text}')
    complaint(folder)


@pytest.mark.parametrize(
    "path", ["../evil.py", "/tmp/evil.py", "a/../../b.py", 5, "\0"]
)
def test_code_outside_the_folder_never_runs(folder, path):
    ran = folder.parent / "ran"
    (folder.parent / "evil.py").write_text(f"open({str(ran)!r}, 'w')")
    edit_json(folder / "config.json", lambda c: c.update(model_file=path))
    with pytest.raises(FormatError, match="not in the folder"):
        load(folder, trust_remote_code=True)
    with pytest.raises(FormatError, match="not in the folder"):
        load(folder, trust_remote_code=True, dense=True)
    assert not ran.exists()


def test_nobody_is_asked_about_a_tokenizers_code(folder, monkeypatch):
    ran = folder.parent / "ran"
    (folder / "mine.py").write_text(f"open({str(ran)!r}, 'w')")
    edit_json(
        folder / "tokenizer_config.json",
        lambda c: c.update(
            tokenizer_class="Odd", auto_map={"AutoTokenizer": ["mine.Odd", None]}
        ),
    )
    monkeypatch.setattr("builtins.input", lambda _: "y")
    assert "custom code" in complaint(folder) and not ran.exists()


def test_code_in_the_folder_needs_leave(folder):
    ran = folder.parent / "ran"
    (folder / "mine.py").write_text(f"open({str(ran)!r}, 'w')\nraise RuntimeError('x')")
    edit_json(folder / "config.json", lambda c: c.update(model_file="mine.py"))
    assert "trust_remote_code" in complaint(folder) and not ran.exists()
    with pytest.raises(FormatError, match="cannot load"):
        load(folder, trust_remote_code=True)
    assert ran.exists()


def test_a_pickle_is_never_opened(folder):
    """What looks like weights of another kind is not."""
    (folder / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'exit 1'\ntR.")
    load(folder)
    (folder / "model.safetensors").write_bytes(
        b"cos\nsystem\n(S'exit 1'\ntR." + bytes(99)
    )
    complaint(folder)


def test_plain_models_are_left_to_mlx_lm(untied_source, tmp_path):
    source = Path(shutil.copytree(untied_source, tmp_path / "model"))
    edit_json(source / "config.json", lambda c: c.update(num_attention_heads="x"))
    for loader in (mlx_lm.load, load):
        with pytest.raises(TypeError):
            loader(str(source))
    with patched(), pytest.raises(TypeError):
        mlx_lm.load(str(source))


# ---------------------------------------------------------------------------
# What is remembered
# ---------------------------------------------------------------------------


def settle(monkeypatch) -> None:
    """As if the files had been changed long ago."""
    monkeypatch.setattr(cache, "_UNSETTLED", -60)


def test_an_answer_is_computed_once_per_state(tmp_path, monkeypatch):
    file, other = tmp_path / "file", tmp_path / "other"
    file.write_text("a"), other.write_text("b")
    calls = []

    def ask(*asked):
        def compute():
            calls.append(asked)
            return "".join(f.read_text() for f in asked)

        return cache.remembered(asked, "content", compute)

    settle(monkeypatch)
    assert [ask(file), ask(file), ask(file, other)] == ["a", "a", "ab"]
    assert ask(file, other) == "ab" and len(calls) == 2
    file.rename(tmp_path / "renamed")
    # Same inode and size, and the time of the change set back.
    times = other.stat()
    with other.open("r+") as stream:
        stream.write("c")
    os.utime(other, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert ask(tmp_path / "renamed", other) == "ac"
    (tmp_path / "new").write_text("d")
    os.replace(tmp_path / "new", other)
    assert ask(tmp_path / "renamed", other) == "ad"


def test_files_that_just_changed_are_not_remembered(tmp_path, monkeypatch):
    file = tmp_path / "file"
    file.write_text("a")
    cache.file_sha256(file)
    assert list(tmp_path.rglob("*.json")) == []
    settle(monkeypatch)
    cache.file_sha256(file)
    assert len(list(tmp_path.rglob("*.json"))) == 1


@pytest.mark.parametrize("text", ["", "[]", "{", '{"state": 3}', "[" * 100_000])
def test_a_damaged_cache_is_done_without(tmp_path, monkeypatch, text):
    file = tmp_path / "file"
    file.write_text("a")
    settle(monkeypatch)
    digest = cache.file_sha256(file)
    (kept,) = (tmp_path / "cache").rglob("*.json")
    kept.write_text(text)
    assert cache.file_sha256(file) == digest
    assert json.loads(kept.read_text())["value"] == digest


def test_a_cache_that_cannot_be_written_is_done_without(tmp_path, monkeypatch):
    file = tmp_path / "file"
    file.write_text("a")
    monkeypatch.setenv("MLX_FLASHHEAD_CACHE", str(file / "cache"))
    settle(monkeypatch)
    assert len(cache.file_sha256(file)) == 64


def test_the_second_load_reads_no_digest_again(folder, monkeypatch):
    settle(monkeypatch)
    load(folder)
    monkeypatch.setattr(cache.hashlib, "file_digest", None)
    load(folder)
    (folder / "model.safetensors").touch()
    with pytest.raises(FormatError):
        load(folder)
