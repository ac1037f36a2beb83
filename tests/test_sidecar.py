"""A FlashHead that is one small file beside a model which stays as it is."""

from __future__ import annotations

import json
import os
import shutil
import struct
from pathlib import Path

import mlx.core as mx
import mlx_lm
import pytest
import small_models
from click.testing import CliRunner
from hub import serving
from mlx.utils import tree_flatten
from mlx_flashhead.convert import ConvertError, convert, staging
from mlx_flashhead.convert.cli import main as convert_command
from mlx_flashhead.convert.staging import StagingError
from mlx_lm.utils import load_model
from test_gguf import gguf_tensors, reference_model, write_gguf
from test_publish import CARD, Machine, content

from mlx_flashhead import flash_heads, load, patched
from mlx_flashhead.benchmark import main as benchmark_command
from mlx_flashhead.demo import main as demo_command
from mlx_flashhead.evaluate import main as evaluate_command
from mlx_flashhead.folder import cache
from mlx_flashhead.folder.format import describe, load_head, save_head
from mlx_flashhead.folder.section import (
    CONFIG_KEY,
    HEAD_FILE,
    FormatError,
    read_section,
    section_sha256,
)
from mlx_flashhead.generate import main as generate_command
from mlx_flashhead.integration.loading import install
from mlx_flashhead.integration.locate import get_module, head_table

TOKENS = mx.array([[84, 104, 101, 32, 113]])
PROMPT = "The quick brown fox"
SMALL = {"cluster_size": 8, "n_probes": 90, "verbose": False}
PACKED = {"group_size": 32, "bits": 8}
# How a model is made: its name, how it is stored, and options of the converter.
MODELS = {
    "tied 16 bits": ("llama-tied", {"dtype": "bfloat16"}, {}),
    "tied 8 bits": ("llama-tied", {"dtype": "bfloat16", "quantize": PACKED}, {}),
    "untied 32 bits": ("llama", {}, {"head_bits": 4}),
    "bias, 8 bits": ("phi", {"dtype": "float16", "quantize": PACKED}, {"head_bits": 6}),
}


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MLX_FLASHHEAD_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module", params=MODELS)
def made(request, tmp_path_factory):
    """A model, its sidecar, and the folder that is made of it."""
    name, stored, options = MODELS[request.param]
    tmp = tmp_path_factory.mktemp("sidecar")
    source = small_models.write(name, tmp / "source", 1003, **stored)
    convert(str(source), sidecar=tmp / "sidecar", **SMALL, **options)
    convert(str(source), tmp / "folder", **SMALL, **options)
    return source, tmp / "sidecar", tmp / "folder"


@pytest.fixture(scope="module")
def tied(tmp_path_factory):
    """A tied 8-bit model, and its sidecar's file."""
    tmp = tmp_path_factory.mktemp("tied")
    source = small_models.write(
        "llama-tied", tmp / "source", 1003, dtype="bfloat16", quantize=PACKED
    )
    convert(str(source), sidecar=tmp / "head.safetensors", **SMALL)
    return source, tmp / "head.safetensors"


def greedy(model, tokenizer, n: int = 24) -> list[int]:
    responses = mlx_lm.stream_generate(model, tokenizer, PROMPT, max_tokens=n)
    return [r.token for r in responses]


def arrays(module) -> dict[str, mx.array]:
    return dict(tree_flatten(module.parameters()))


def complaint(model: Path, sidecar: Path | str, **options) -> str:
    with pytest.raises(FormatError) as error:
        load(model, flashhead=sidecar, **options)
    message = str(error.value)
    assert "\n" not in message and len(message) < 600
    return message


# ---------------------------------------------------------------------------
# What it is
# ---------------------------------------------------------------------------


def test_a_sidecar_stores_no_rows(made):
    source, sidecar, folder = made
    assert {f.name for f in sidecar.iterdir()} == {HEAD_FILE, "README.md"}
    names = set(mx.load(str(sidecar / HEAD_FILE)))
    assert names - {"bias"} == {
        *("centroids.weight", "centroids.scales", "centroids.biases"),
        *("token_ids", "spread", "excess"),
    }
    section = read_section(sidecar)
    assert section is not None and section.intact and not section.stored_rows
    assert section == read_section(sidecar / HEAD_FILE) and not section.files
    weights = (source / "model.safetensors").stat().st_size
    assert (sidecar / HEAD_FILE).stat().st_size < weights / 5
    # A folder has them where their bits are others than the model's.
    own = read_section(folder)
    assert own is not None and own.rows == section.rows
    model, _ = load_model(folder, lazy=True)
    table = head_table(get_module(model, own.head_path))
    assert own.stored_rows == (own.rows.bits != table.bits)
    assert ("rows.weight" in mx.load(str(folder / HEAD_FILE))) == own.stored_rows


@pytest.mark.parametrize("options", [{}, {"exact": False}, {"dense": True}])
def test_it_is_the_folders_head_bit_for_bit(made, options):
    source, sidecar, folder = made
    (wanted, tokenizer), (found, _) = (
        load(folder, **options),
        load(source, flashhead=sidecar, **options),
    )
    wanted_arrays, found_arrays = arrays(wanted), arrays(found)
    assert wanted_arrays.keys() == found_arrays.keys()
    for name, array in wanted_arrays.items():
        assert array.dtype == found_arrays[name].dtype, name
        assert mx.array_equal(array, found_arrays[name]), name
    assert mx.array_equal(wanted(TOKENS), found(TOKENS))
    assert greedy(wanted, tokenizer) == greedy(found, tokenizer)


def test_exact_decoding_is_the_dense_heads(made):
    """The model's own, but where its own bits were asked for."""
    source, sidecar, _ = made
    model, tokenizer = load(source, flashhead=sidecar)
    assert len(list(flash_heads(model))) == 1
    if read_section(sidecar).draft.rows == "stored":
        dense, _ = load(source, flashhead=sidecar, dense=True)
    else:
        dense, _ = load_model(source)
        dense.set_dtype(mx.float32)
    assert greedy(model, tokenizer) == greedy(dense, tokenizer)


def test_there_is_one_table_in_memory(made):
    """What the rows were made of goes."""
    source, sidecar, _ = made
    section = read_section(sidecar)
    plain, _ = load_model(source, lazy=True)
    size = head_table(get_module(plain, section.head_path)).nbytes
    del plain
    before = mx.get_active_memory()
    model, _ = load(source, flashhead=sidecar)
    taken = mx.get_active_memory() - before
    assert taken < sum(a.nbytes for a in arrays(model).values()) + size / 2


def test_the_model_stays_as_it_is(made):
    source, sidecar, _ = made
    before = content(source)
    load(source, flashhead=sidecar)
    assert content(source) == before


def test_rows_of_other_bits_are_made_in_parts(made, monkeypatch):
    source, sidecar, _ = made
    section = read_section(sidecar)
    model, _ = load_model(source, lazy=True)
    table = head_table(get_module(model, section.head_path))
    whole = load_head(sidecar, section, None, table)
    monkeypatch.setattr("mlx_flashhead.folder.format._AT_ONCE", 5000)
    parts = load_head(sidecar, section, None, table)
    for a, b in zip(whole.rows.arrays, parts.rows.arrays, strict=True):
        assert (a is None and b is None) or mx.array_equal(a, b)


# ---------------------------------------------------------------------------
# Where it lies
# ---------------------------------------------------------------------------


def test_a_file_alone(tied, tmp_path):
    source, file = tied
    assert [f.name for f in file.parent.iterdir() if f != source] == [file.name]
    wanted = load(source, flashhead=file)[0](TOKENS)
    # Under any name, in a folder by its own, and within the model's folder.
    (tmp_path / "holds").mkdir()
    for name in ("other.safetensors", f"holds/{HEAD_FILE}"):
        shutil.copy(file, tmp_path / name)
    for place in ("other.safetensors", "holds"):
        assert mx.array_equal(
            load(source, flashhead=tmp_path / place)[0](TOKENS), wanted
        )
    model = Path(shutil.copytree(source, tmp_path / "model"))
    shutil.copy(file, model / HEAD_FILE)
    assert mx.array_equal(load(model)[0](TOKENS), wanted)
    with patched():
        assert len(list(flash_heads(mlx_lm.load(str(model))[0]))) == 1
    assert mlx_lm.load(str(model))[0](TOKENS).shape == (1, 5, 1003)


def test_another_than_the_folders_own(tied_folder, tied_source, tmp_path):
    sidecar = tmp_path / "head.safetensors"
    convert(str(tied_source), sidecar=sidecar, **(SMALL | {"cluster_size": 4}))
    for options in ({}, {"exact": False}):
        model, _ = load(tied_folder, flashhead=sidecar, **options)
        assert next(flash_heads(model)).cluster_size == 4
    # A folder's head may go with the model that it was made of, too.
    model, _ = load(tied_source, flashhead=tied_folder)
    assert next(flash_heads(model)).cluster_size == 8


def test_a_converted_folder_may_get_one(tied_folder, tmp_path):
    report = convert(str(tied_folder), sidecar=tmp_path / "new", **SMALL)
    assert f"--model {tied_folder} --flashhead {tmp_path / 'new'}" in str(report)
    assert len(list(flash_heads(load(tied_folder, flashhead=tmp_path / "new")[0]))) == 1


def test_a_gguf_files_is_for_the_folder_that_is_made_of_it(tmp_path):
    tensors = gguf_tensors("llama", reference_model("llama"))
    file = write_gguf(tmp_path / "m.gguf", "llama", tensors)
    options = {"gguf_path": str(file), "cluster_size": 8, "verbose": False}
    convert(mlx_path=tmp_path / "made", **options)
    convert(sidecar=tmp_path / "head.safetensors", **options)
    model, tokenizer = load(tmp_path / "made", flashhead=tmp_path / "head.safetensors")
    plain, _ = load_model(tmp_path / "made")
    plain.set_dtype(mx.float32)
    assert greedy(model, tokenizer) == greedy(plain, tokenizer)


def test_from_the_hub(tmp_path, tied):
    source, file = tied
    code = (
        "import sys, mlx.core as mx; from mlx_flashhead import flash_heads, load\n"
        "model, _ = load(sys.argv[1], flashhead=sys.argv[2])\n"
        "print(len(list(flash_heads(model))))"
    )
    with serving() as hub:
        machine = Machine(tmp_path / "home", hub)
        hub.add("org/base", content(source) | {"README.md": CARD.encode()})
        made = tmp_path / "sidecar"
        machine.convert("--hf-path", "org/base", "--sidecar", made)
        card = (made / "README.md").read_text(encoding="utf-8")
        assert 'load("org/base", flashhead="sidecar")' in card
        assert "base_model: org/base" in card and "license" not in card
        assert (made / HEAD_FILE).read_bytes() == file.read_bytes()
        hub.add("someone/base-flashhead", content(made))
        hub.downloads.clear()
        done = machine.run("-c", code, "org/base", "someone/base-flashhead")
        assert done.stdout == "1\n"
        assert hub.downloads == [("someone/base-flashhead", HEAD_FILE)]


def test_commands(tied, tmp_path):
    source, file = tied
    text = tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 20)
    words = ["--model", str(source), "--flashhead", str(file)]
    for command, more in (
        (generate_command, ["--prompt", PROMPT, "--max-tokens", "8"]),
        (demo_command, ["--max-tokens", "8"]),
        (evaluate_command, ["--text", str(text), "--tokens", "20"]),
        (
            benchmark_command,
            ["--quick", "--max-tokens", "3", "--repeats", "1", "--heads", "flash"],
        ),
    ):
        if command is evaluate_command:
            more += ["--reference", str(unquantized(tmp_path))]
        if command is benchmark_command:
            more += ["--no-load", "--no-energy", "--samplers", "greedy"]
        done = CliRunner().invoke(command, words + more)
        assert done.exit_code == 0, done.output
        assert "FlashHead" in done.output or command is generate_command


def unquantized(folder: Path) -> Path:
    return small_models.write("llama-tied", folder / "bf16", 1003, dtype="bfloat16")


def test_patched_loaders(tied, monkeypatch):
    source, file = tied
    with patched(flashhead=str(file)):
        model, _ = mlx_lm.load(str(source))
        assert len(list(flash_heads(model))) == 1
        monkeypatch.setenv("MLX_FLASHHEAD", "0")
        assert not list(flash_heads(mlx_lm.load(str(source))[0]))
    assert not list(flash_heads(mlx_lm.load(str(source))[0]))


def test_a_model_in_memory(tied):
    """Also in float32, as a CPU's models are once they had a FlashHead."""
    source, file = tied
    wanted = load(source, flashhead=file, exact=False)[0](TOKENS)
    for dtype in (None, mx.float32):
        model, _ = load_model(source)
        if dtype is not None:
            model.set_dtype(dtype)
        assert mx.array_equal(install(model, file)(TOKENS), wanted)


def test_lazy_loading_stays_lazy(tied, tmp_path):
    """Once the head is known nothing of the weights is read."""
    source, file = tied
    for at in (source / "model.safetensors", file):
        os.utime(at, ns=(1, 1))  # settled, so that what is found is remembered
        os.chmod(at, 0o644)
    past = 1e9
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cache.time, "time", lambda: past * 4)
        load(source, flashhead=file)
        patch.setattr("mlx_flashhead.folder.integrity.table_sha256", None)
        patch.setattr("mlx_flashhead.folder.integrity.tensors_sha256", None)
        model, _ = load(source, flashhead=file, lazy=True)
    assert model(TOKENS).shape == (1, 5, 1003)


# ---------------------------------------------------------------------------
# What it does not fit
# ---------------------------------------------------------------------------


def test_another_model(tied, tmp_path):
    _, file = tied
    other = small_models.write(
        "llama-tied", tmp_path / "b", 1003, dtype="bfloat16", quantize=PACKED, seed=5
    )
    message = complaint(other, file)
    assert "another model, revision or quantization" in message
    assert "--sidecar" in message and str(other) in message
    # With the dense head nothing of it is asked for.
    assert not list(flash_heads(load(other, flashhead=file, dense=True)[0]))


def test_another_quantization_revision_or_vocabulary(tied, tmp_path):
    source, file = tied
    plain = unquantized(tmp_path)
    assert "quantization" in complaint(plain, file)
    four = small_models.write(
        "llama-tied", tmp_path / "four", 1003, dtype="bfloat16",
        quantize=PACKED | {"bits": 4},
    )  # fmt: skip
    assert "quantization" in complaint(four, file)
    tuned = Path(shutil.copytree(source, tmp_path / "tuned"))
    weights = mx.load(str(tuned / "model.safetensors"))
    mx.eval(weights)
    weights["model.embed_tokens.scales"][500] *= 1.01  # a single row
    mx.save_safetensors(str(tuned / "model.safetensors"), weights, {"format": "mlx"})
    assert "revision" in complaint(tuned, file)
    small = small_models.write("llama-tied", tmp_path / "small", 999, dtype="bfloat16")
    message = complaint(small, file)
    assert "1003 tokens" in message and "999" in message
    untied = small_models.write("llama", tmp_path / "untied", 1003)
    sidecar = tmp_path / "untied.safetensors"
    convert(str(untied), sidecar=sidecar, **SMALL)
    assert "the rows of the head are others" in complaint(source, sidecar)


def test_another_bias(tmp_path):
    source = small_models.write("phi", tmp_path / "source", 600)
    file = tmp_path / "head.safetensors"
    convert(str(source), sidecar=file, cluster_size=8, verbose=False)
    load(source, flashhead=file)
    weights = mx.load(str(source / "model.safetensors"))
    mx.eval(weights)
    weights["lm_head.bias"] = weights["lm_head.bias"] + 1
    mx.save_safetensors(str(source / "model.safetensors"), weights, {"format": "mlx"})
    assert "bias" in complaint(source, file)


def test_a_refused_one_leaves_a_model_in_memory_as_it_was(tied, tmp_path):
    _, file = tied
    model, _ = load_model(unquantized(tmp_path))
    before, wanted = arrays(model), model(TOKENS)
    with pytest.raises(FormatError, match="this model"):
        install(model, file)
    after = arrays(model)
    assert before.keys() == after.keys() and all(before[n] is after[n] for n in after)
    assert mx.array_equal(model(TOKENS), wanted)


# ---------------------------------------------------------------------------
# Damage
# ---------------------------------------------------------------------------


@pytest.fixture
def file(tied, tmp_path) -> Path:
    """A sidecar to be damaged."""
    return Path(shutil.copy(tied[1], tmp_path / "damaged.safetensors"))


def with_text(file: Path, text: str | None) -> None:
    """Put another text in the place of a file's section."""
    data = file.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    header["__metadata__"].pop(CONFIG_KEY)
    if text is not None:
        header["__metadata__"][CONFIG_KEY] = text
    new = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(new)) + new + data[8 + length :])


def section_text(file: Path) -> dict:
    _, metadata = mx.load(str(file), return_metadata=True)
    return json.loads(metadata[CONFIG_KEY])


def test_an_undamaged_one_loads(tied, file):
    with_text(file, json.dumps(section_text(file)))
    assert len(list(flash_heads(load(tied[0], flashhead=file)[0]))) == 1


@pytest.mark.parametrize("keep", [0, 7, 100, 0.5, 0.999])
def test_a_truncated_one(tied, file, keep):
    size = file.stat().st_size
    os.truncate(file, keep if keep >= 1 or keep == 0 else int(keep * size))
    assert str(file) in complaint(tied[0], file)


@pytest.mark.parametrize("at", [-1, -5000, -9000])
def test_a_bit_that_flipped(tied, file, at):
    data = bytearray(file.read_bytes())
    data[at] ^= 1
    file.write_bytes(data)
    assert str(file) in complaint(tied[0], file)


TEXTS = {
    "none": None,
    "empty": "",
    "no JSON": "{",
    "no object": "[1, 2]",
    "a number": "3",
    "deep": "[" * 100_000,
    "long": '"' + "x" * (1 << 21) + '"',
    "a huge number": '{"format_version": ' + "9" * 5000 + "}",
    "twice": '{"format_version": 4, "format_version": 4}',
    "later": '{"format_version": 5}',
    "of before": '{"format_version": 0}',
}


@pytest.mark.parametrize("kind", TEXTS)
def test_hostile_sections(tied, file, kind):
    with_text(file, TEXTS[kind])
    assert str(file) in complaint(tied[0], file)


@pytest.mark.parametrize(
    "key, value",
    [
        ("n_probes", 10**30),
        ("n_clusters", 10**30),
        ("vocab_size", True),
        ("cluster_size", 1.5),
        ("tail_offset", [float("nan")] * 7),
        ("temperatures", [float("inf")] * 7),
        ("rows", {"bits": 8, "group_size": 31, "mode": "affine"}),
        ("rows", None),
        ("stored_rows", "no"),
        ("stored_rows", True),
        ("head_path", "../../etc"),
        ("head_path", ["lm_head"]),
        ("head_sha256", None),
        ("head_sha256", 3),
        ("tensors_sha256", None),
        ("tensors_sha256", "0"),
        ("draft", {"n_probes": 1, "verify_every": 0, "acceptance": 1, "rows": "model"}),
        ("draft", []),
    ],
)
def test_hostile_values(tied, file, key, value):
    """As they are, and with the digest made to fit."""
    section = section_text(file) | {key: value}
    with_text(file, json.dumps(section))
    assert str(file) in complaint(tied[0], file)
    with_text(file, json.dumps(section | {"sha256": section_sha256(section)}))
    assert str(file) in complaint(tied[0], file)


def test_values_that_are_not_finite(tied, tmp_path):
    source, file = tied
    section = read_section(file)
    model, _ = load_model(source)
    table = head_table(get_module(model, section.head_path))
    head = load_head(file, section, None, table)
    head.spread = mx.where(mx.arange(len(head.spread)) == 3, mx.nan, head.spread)
    bad = tmp_path / "bad.safetensors"
    save_head(bad, head, describe(head, section.head_path, section.head_sha256,
                                  stored_rows=False))  # fmt: skip
    assert "spread has NaN" in complaint(source, bad)


def test_what_is_none(tied, tmp_path):
    source, _ = tied
    assert "no such file" in complaint(source, tmp_path / "none.safetensors")
    assert "no such file" in complaint(source, "nowhere")
    (tmp_path / "empty").mkdir()
    message = complaint(source, tmp_path / "empty")
    assert HEAD_FILE in message and "--sidecar" in message
    (tmp_path / "text.safetensors").write_text("version https://git-lfs.github.com\n")
    assert "text.safetensors" in complaint(source, tmp_path / "text.safetensors")


def test_a_file_of_before(untied_folder, tied, tmp_path):
    """Which had its section in config.json alone."""
    tensors = mx.load(str(untied_folder / HEAD_FILE))
    old = tmp_path / HEAD_FILE
    mx.save_safetensors(str(old), tensors, {"format": "mlx", "flashhead_version": "3"})
    assert "before version 4" in complaint(tied[0], old)


# ---------------------------------------------------------------------------
# Making one
# ---------------------------------------------------------------------------


def test_what_does_not_go_with_a_sidecar(untied_source, tmp_path):
    for options, flag in (
        ({"mlx_path": tmp_path / "a"}, "--mlx-path"),
        ({"quantize": True}, "-q"),
        ({"dtype": "float16"}, "--dtype"),
        ({"upload_repo": "a/b"}, "--upload-repo"),
    ):
        file = tmp_path / "head.safetensors"
        with pytest.raises(ConvertError, match=flag):
            convert(str(untied_source), sidecar=file, **options)
    assert not list(tmp_path.iterdir())


def test_nothing_but_a_sidecar_is_replaced(untied_source, untied_folder, tmp_path):
    folder = Path(shutil.copytree(untied_folder, tmp_path / "model"))
    other = tmp_path / "other.safetensors"
    shutil.copy(untied_source / "model.safetensors", other)
    before = content(folder), other.read_bytes()
    for target in (folder, other):
        with pytest.raises(StagingError, match="already exists"):
            convert(str(untied_source), sidecar=target, **SMALL)
        with pytest.raises(StagingError, match="no sidecar; choose another --sidecar"):
            convert(str(untied_source), sidecar=target, overwrite=True, **SMALL)
    assert (content(folder), other.read_bytes()) == before
    for name in ("side", "side.safetensors"):
        target = tmp_path / name
        shutil.copytree(folder, target) if name == "side" else shutil.copy(
            folder / HEAD_FILE, target
        )
        (tmp_path / "side/config.json").unlink(missing_ok=True)
        with staging.staged(target, True, True) as (result, _):
            (result / HEAD_FILE).write_text("new")
        file = target / HEAD_FILE if target.is_dir() else target
        assert file.read_text() == "new"
    assert not [f for f in tmp_path.iterdir() if f.name.startswith(".")]


def test_an_error_leaves_nothing(untied_source, tmp_path, monkeypatch):
    def fail(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("mlx_flashhead.folder.format.mx.save_safetensors", fail)
    target = tmp_path / "side.safetensors"
    words = ["--hf-path", untied_source, "--sidecar", target, "--cluster-size", 8]
    done = CliRunner().invoke(convert_command, [*map(str, words), "--n-probes", "90"])
    assert done.exit_code == 1 and "No space left" in done.output
    assert not list(tmp_path.iterdir())
