"""Conversions of small models: the folder, and whether the report is true."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
from pathlib import Path

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
import small_models
from mlx.utils import tree_flatten
from mlx_flashhead.convert import collect, convert, pipeline, statistics
from mlx_flashhead.convert.recipes import FULL, QUICK
from mlx_lm.sample_utils import make_sampler
from mlx_lm.utils import load_model
from small_heads import random_states, unpack
from test_gguf import gguf_tensors, reference_model, write_gguf

from mlx_flashhead import FlashHead, flash_heads, load
from mlx_flashhead.compute import linalg
from mlx_flashhead.compute.table import Table
from mlx_flashhead.folder.format import form_of, load_head
from mlx_flashhead.folder.section import HEAD_FILE, Measured, read_section
from mlx_flashhead.head import ALWAYS
from mlx_flashhead.integration.locate import find_head, get_module, head_table

TOKENS = mx.array([[72, 101, 108, 108, 111]])


def make(source: Path, target: Path, **options):
    """Convert quietly; returns the report and the FlashHead as it was saved."""
    report = convert(str(source), target, **{"verbose": False} | options)
    return report, head_of(target)


def head_of(folder: Path) -> FlashHead:
    return next(flash_heads(load(folder, exact=False)[0]))


def stored(folder: Path) -> dict[str, mx.array]:
    return mx.load(str(folder / HEAD_FILE))


def dense_table(folder: Path) -> Table:
    """The dense head as it is stored."""
    model, _ = load_model(folder, lazy=True)
    return head_table(get_module(model, find_head(model)))


def files_of(folder: Path) -> dict[str, str]:
    return {
        str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(folder.rglob("*"))
    }


def assert_permuted(folder: Path, table: Table) -> None:
    """The rows are those of the table, bit for bit, in another order: stored, unless
    the dense head has the same bits."""
    tensors, own = stored(folder), dense_table(folder)
    assert ("rows.weight" in tensors) == (form_of(table) != form_of(own))
    rows = load_head(folder, read_section(folder), None, own).rows
    order = tensors["token_ids"].reshape(-1)[: table.weight.shape[0]]
    for found, array in zip(rows.arrays, table.arrays, strict=True):
        if array is None:
            assert found is None
            continue
        found = found.reshape(-1, array.shape[-1])[: order.size]
        assert found.dtype == array.dtype
        assert mx.array_equal(found, array[order])


# ---------------------------------------------------------------------------
# The folder
# ---------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["tied", "untied"])
def test_the_folder_has_what_mlx_lm_and_we_need(request, kind):
    source = request.getfixturevalue(f"{kind}_source")
    folder = request.getfixturevalue(f"{kind}_folder")
    names = {file.name for file in folder.iterdir()}
    assert names >= {
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        HEAD_FILE,
    }
    assert not any(name.startswith(".") for name in names)
    assert [p.name for p in folder.parent.iterdir() if p.name.startswith(".")] == []
    assert folder.stat().st_mode & 0o777 == 0o755
    before = json.loads((source / "config.json").read_text())
    after = json.loads((folder / "config.json").read_text())
    section = after.pop("flashhead")
    assert after == before
    assert section["seed"] == 0 and section["recipe"] == "default"
    assert section["calibration"] == "built-in"
    assert section["head_path"] == find_head(load_model(source)[0])
    template = mlx_lm.load(str(folder))[1].chat_template
    assert template == mlx_lm.load(str(source))[1].chat_template is not None


def test_the_source_is_left_as_it_was(untied_source, tmp_path):
    before = files_of(untied_source)
    make(untied_source, tmp_path / "made", cluster_size=8)
    assert files_of(untied_source) == before


def test_generation_config_is_kept(untied_source, tmp_path):
    source = Path(shutil.copytree(untied_source, tmp_path / "source"))
    (source / "generation_config.json").write_text('{"eos_token_id": [257, 300]}')
    make(source, tmp_path / "made", cluster_size=8)
    _, tokenizer = load(tmp_path / "made")
    assert tokenizer.eos_token_ids == {257, 300}


@pytest.mark.parametrize("kind", ["tied", "untied"])
def test_the_dense_head_is_kept_and_its_digest_stored(request, kind):
    source = request.getfixturevalue(f"{kind}_source")
    folder = request.getfixturevalue(f"{kind}_folder")
    table = dense_table(folder)
    assert mx.array_equal(table.weight, dense_table(source).weight)
    digest = hashlib.sha256(f"{table.weight.dtype}{table.weight.shape}".encode())
    digest.update(bytes(memoryview(mx.contiguous(table.weight).view(mx.uint8))))
    assert read_section(folder).head_sha256 == digest.hexdigest()


@pytest.mark.parametrize("vocab_size, cluster_size", [(601, 16), (258, 128), (512, 64)])
def test_any_vocabulary_size(tmp_path, vocab_size, cluster_size):
    source = small_models.write("llama-tied", tmp_path / "source", vocab_size)
    report, head = make(source, tmp_path / "made", cluster_size=cluster_size)
    assert report.vocab_size == vocab_size
    assert report.n_clusters == -(-vocab_size // cluster_size)
    ids = np.array(head.token_ids).reshape(-1)
    assert sorted(ids[:vocab_size]) == list(range(vocab_size))
    assert (ids[vocab_size:] == vocab_size).all()
    wanted, found = (np.array(m(TOKENS)) for m in (
        mlx_lm.load(str(source))[0], load(tmp_path / "made")[0]))  # fmt: skip
    assert found.shape == wanted.shape == (1, 5, vocab_size)
    assert np.abs(found - wanted).max() < 0.02 * np.ptp(wanted)


def test_a_16_bit_head_keeps_its_rows(tied_source, tmp_path):
    report, head = make(tied_source, tmp_path / "made", head_bits=16, centroid_bits=16)
    assert (report.head_bits, report.centroid_bits, report.dense_bits) == (16, 16, 16)
    assert_permuted(tmp_path / "made", dense_table(tied_source))
    section = read_section(tmp_path / "made")
    assert section.rows.bits == section.centroids.bits == 16


def test_16_bits_are_16_bits(untied_source, tmp_path):
    """Also where the source has 32."""
    report, head = make(untied_source, tmp_path / "made", head_bits=16)
    assert report.head_bits == head.rows.bits == 16
    rows = stored(tmp_path / "made")["rows.weight"]
    assert rows.dtype.size == 2


@pytest.mark.parametrize("bits", [4, 5])
def test_bits_of_rows_and_centroids(untied_source, tmp_path, bits):
    report, head = make(
        untied_source,
        tmp_path / "made",
        head_bits=bits,
        centroid_bits=8,
        group_size=32,
    )
    assert (report.head_bits, report.centroid_bits, report.dense_bits) == (
        bits,
        8,
        bits,
    )
    assert (head.rows.bits, head.rows.group_size) == (bits, 32)
    assert (head.centroids.bits, head.centroids.group_size) == (8, 32)
    packed = Table.from_dense(dense_table(untied_source).weight, bits, 32)
    assert_permuted(tmp_path / "made", packed)


# ---------------------------------------------------------------------------
# Quantized models
# ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, bits, group_size", [("llama", 4, 64), ("llama-tied", 6, 32)]
)
def test_a_quantized_head_keeps_its_bits(tmp_path, name, bits, group_size):
    quantize = {"bits": bits, "group_size": group_size}
    source = small_models.write(name, tmp_path / "source", 1003, quantize=quantize)
    report, head = make(source, tmp_path / "made", cluster_size=8)
    assert (report.head_bits, report.dense_bits) == (bits, bits)
    assert (head.rows.bits, head.rows.group_size) == (bits, group_size)
    assert_permuted(tmp_path / "made", dense_table(source))
    # So its dense logits are the source's, whether by mlx-lm or by us.
    wanted = np.array(mlx_lm.load(str(source))[0](TOKENS))
    stock = np.array(mlx_lm.load(str(tmp_path / "made"))[0](TOKENS))
    assert np.array_equal(stock, wanted)
    ours = np.array(load(tmp_path / "made")[0](TOKENS))
    np.testing.assert_allclose(ours, wanted, atol=1e-4)


MODES = [("mxfp4", 4, 32), ("mxfp8", 8, 32), ("nvfp4", 4, 16)]


@pytest.mark.parametrize("name", ["llama", "llama-tied"])
@pytest.mark.parametrize("mode, bits, group_size", MODES)
def test_a_head_in_another_mode_stays_as_it_is(tmp_path, name, mode, bits, group_size):
    quantize = {"bits": bits, "group_size": group_size, "mode": mode}
    source = small_models.write(name, tmp_path / "source", 1003, quantize=quantize)
    report, head = make(source, tmp_path / "made", cluster_size=8)
    assert (report.head_bits, report.dense_bits) == (bits, bits)
    rows, centroids = head.rows, head.centroids
    assert (rows.mode, rows.bits, rows.group_size) == (mode, bits, group_size)
    assert (centroids.mode, centroids.bits, centroids.group_size) == ("affine", 4, 64)
    assert_permuted(tmp_path / "made", table := dense_table(source))
    # Logits of candidates, and those of the dense head, are the values' own.
    x = mx.array(random_states(3))
    values = np.array(table.dequantize(mx.float32)).astype(np.float64)
    found = head.candidates(x)
    for b, wanted in enumerate(np.array(x) @ values.T):
        ids, logits = np.array(found.ids[b]), np.array(found.logits[b])
        real = ids < 1003
        np.testing.assert_allclose(logits[real], wanted[ids[real]], atol=1e-4)
    np.testing.assert_allclose(
        np.array(head.dense(x)), np.array(x) @ values.T, atol=1e-4
    )
    # And exact decoding is stock mlx-lm's, from the same folder and from the source.
    texts = []
    for open_, folder in ((mlx_lm.load, source), (mlx_lm.load, "made"), (load, "made")):
        model, tokenizer = open_(str(tmp_path / folder))
        texts.append(mlx_lm.generate(model, tokenizer, "The fox", max_tokens=20))
    assert texts[0] == texts[1] == texts[2]
    model, tokenizer = load(tmp_path / "made", exact=False)
    sampler = make_sampler(0.8, top_p=0.9)
    assert mlx_lm.generate(model, tokenizer, "The", max_tokens=9, sampler=sampler)


def test_a_head_in_another_mode_can_get_bits(tmp_path):
    quantize = {"bits": 4, "group_size": 32, "mode": "mxfp4"}
    source = small_models.write("llama", tmp_path / "source", 600, quantize=quantize)
    _, head = make(source, tmp_path / "made", head_bits=8)
    assert (head.rows.mode, head.rows.bits, head.rows.group_size) == ("affine", 8, 64)
    wanted = np.array(dense_table(source).dequantize(mx.float32))
    order = np.array(head.token_ids).reshape(-1)[:600]
    assert np.abs(unpack(head.rows).reshape(-1, 64)[:600] - wanted[order]).max() < 0.02


def test_a_quantized_head_can_get_other_bits(tmp_path):
    quantize = {"bits": 4, "group_size": 32}
    source = small_models.write("llama", tmp_path / "source", 600, quantize=quantize)
    report, head = make(source, tmp_path / "made", head_bits=8)
    assert (report.head_bits, report.dense_bits) == (8, 8)
    wanted = unpack(dense_table(source))
    order = np.array(head.token_ids).reshape(-1)[:600]
    rows = unpack(head.rows).reshape(-1, 64)[:600]
    assert np.abs(rows - wanted[order]).max() < 0.02


def quantization(folder: Path) -> dict[str, tuple[int, int]]:
    """Bits and group size of each layer of the dense model that is quantized."""
    model, _ = load_model(folder, lazy=True)
    return {
        path: (module.bits, module.group_size)
        for path, module in model.named_modules()
        if "scales" in module
    }


@pytest.mark.parametrize("name", ["llama", "llama-tied"])
def test_quantize_leaves_the_head_to_head_bits(tmp_path, name):
    source = small_models.write(name, tmp_path / "source", 1003)
    path = small_models.ARCHITECTURES[name][2]
    report, head = make(
        source,
        tmp_path / "made",
        quantize=True,
        q_bits=4,
        q_group_size=32,
        cluster_size=8,
    )
    found = quantization(tmp_path / "made")
    assert found.pop(path) == (8, 64)
    assert set(found.values()) == {(4, 32)}
    assert len(found) >= 14
    assert (report.head_bits, report.dense_bits) == (8, 8)
    assert_permuted(tmp_path / "made", dense_table(tmp_path / "made"))
    # Close to the source's logits is what eight bits are.
    rows = unpack(dense_table(tmp_path / "made"))
    assert np.abs(rows - np.array(dense_table(source).weight)).max() < 0.03
    model, tokenizer = mlx_lm.load(str(tmp_path / "made"))
    assert mlx_lm.generate(model, tokenizer, "Hi", max_tokens=3)


def test_quantize_with_mlx_lms_defaults(tmp_path):
    source = small_models.write("llama", tmp_path / "source", 600)
    make(source, tmp_path / "made", quantize=True)
    found = quantization(tmp_path / "made")
    assert found.pop("lm_head") == (8, 64)
    assert set(found.values()) == {(4, 64)}


def test_quantize_with_a_16_bit_head(tmp_path):
    source = small_models.write("llama", tmp_path / "source", 600, dtype="bfloat16")
    report, _ = make(source, tmp_path / "made", quantize=True, head_bits=16)
    assert "lm_head" not in quantization(tmp_path / "made")
    assert (report.head_bits, report.dense_bits) == (16, 16)
    assert_permuted(tmp_path / "made", dense_table(source))


def test_quantize_with_another_mode(tmp_path):
    source = small_models.write("llama", tmp_path / "source", 600)
    make(source, tmp_path / "made", quantize=True, q_mode="mxfp4", head_bits=6)
    model, _ = load_model(tmp_path / "made", lazy=True)
    assert model.layers[0].mlp.up_proj.mode == "mxfp4"
    assert (model.lm_head.mode, model.lm_head.bits) == ("affine", 6)
    assert load(tmp_path / "made")[0](TOKENS).shape == (1, 5, 600)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_dtype(untied_source, tmp_path, dtype):
    make(untied_source, tmp_path / "made", dtype=dtype)
    weights = mx.load(str(tmp_path / "made/model.safetensors"))
    assert {w.dtype for w in weights.values()} == {getattr(mx, dtype)}
    tensors = stored(tmp_path / "made")
    # In bfloat16 the scales would be coarser than 8-bit rows.
    fine = mx.float32 if dtype == "float32" else mx.float16
    assert tensors["rows.scales"].dtype == fine
    assert tensors["centroids.scales"].dtype == getattr(mx, dtype)
    model, _ = load(tmp_path / "made", exact=False)
    kind = mx.float32 if mx.default_device().type == mx.DeviceType.cpu else fine
    assert {a.dtype for a in next(flash_heads(model)).rows.arrays[1:]} == {kind}
    assert tensors["spread"].dtype == mx.float32


# ---------------------------------------------------------------------------
# Other sources
# ---------------------------------------------------------------------------


def test_from_gguf(tmp_path):
    expected = reference_model("llama")
    file = write_gguf(tmp_path / "m.gguf", "llama", gguf_tensors("llama", expected))
    report = convert(
        gguf_path=str(file), mlx_path=tmp_path / "made", dtype="float32", verbose=False
    )
    assert report.vocab_size == 267
    wanted = np.array(expected(TOKENS))
    stock = np.array(mlx_lm.load(str(tmp_path / "made"))[0](TOKENS))
    np.testing.assert_allclose(stock, wanted, atol=1e-5)
    model, tokenizer = load(tmp_path / "made")
    assert np.abs(np.array(model(TOKENS)) - wanted).max() < 0.02 * np.ptp(wanted)
    assert tokenizer.decode(tokenizer.encode("hello world")) == "hello world"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m.gguf", "made"]


CUSTOM = """
from mlx_lm.models.llama import Model, ModelArgs
"""


def test_models_with_code_of_their_own(untied_source, tmp_path):
    source = Path(shutil.copytree(untied_source, tmp_path / "source"))
    (source / "own.py").write_text(CUSTOM)
    config = json.loads((source / "config.json").read_text()) | {"model_file": "own.py"}
    (source / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="own.py") as error:
        make(source, tmp_path / "made")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "made").exists()
    convert(str(source), tmp_path / "made", trust_remote_code=True, verbose=False)
    model, _ = load(tmp_path / "made", trust_remote_code=True)
    assert len(list(flash_heads(model))) == 1


# ---------------------------------------------------------------------------
# Options
# ---------------------------------------------------------------------------


def test_n_probes_and_its_default(untied_source, tmp_path):
    report, head = make(untied_source, tmp_path / "a", cluster_size=4)
    assert report.n_clusters == 251
    # A sixteenth of the clusters, and in small vocabularies those always probed.
    always = int((np.array(head.spread) >= ALWAYS / 2).sum())
    assert report.n_probes == head.n_probes == 15 + always and always == 7
    report, head = make(untied_source, tmp_path / "b", cluster_size=4, n_probes=251)
    assert report.n_probes == head.n_probes == 251
    assert report.recall == 1.0


def test_small_vocabularies_probe_more_than_what_is_always_probed(tmp_path):
    """Else no other token could ever be found."""
    for vocab_size in (600, 5000):
        source = small_models.write("llama", tmp_path / f"{vocab_size}", vocab_size)
        report, head = make(source, tmp_path / f"made-{vocab_size}")
        always = (np.array(head.spread) >= ALWAYS / 2).sum()
        assert always <= max(1, report.n_probes // 2)
        assert report.recall > report.rows_read


def test_recipe_paper(untied_source, tmp_path):
    _, head = make(untied_source, tmp_path / "made", recipe="paper", cluster_size=8)
    assert read_section(tmp_path / "made").recipe == "paper"
    assert (np.array(head.spread) == 0).all()
    norms = np.linalg.norm(unpack(head.centroids), axis=1)
    np.testing.assert_allclose(norms, 1, atol=0.1)


@pytest.mark.parametrize("suffix", ["txt", "jsonl"])
def test_calibration_data(untied_source, tmp_path, suffix):
    texts = [f"Text number {i}. " * 60 for i in range(12)]
    file = tmp_path / f"mine.{suffix}"
    if suffix == "txt":
        file.write_text("\n\n".join(texts))
    else:
        file.write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    report, _ = make(untied_source, tmp_path / "made", calibration_data=file)
    assert read_section(tmp_path / "made").calibration == file.name
    # Of twelve texts the fifth and the tenth are held out.
    share = FULL.n_tokens // 12
    held_out = [min(len(texts[i]), share + 1) - 1 for i in (4, 9)]
    assert report.held_out_tokens == sum(held_out[:1]) == 682  # every second


def test_a_quick_conversion_looks_at_less(untied_source, tmp_path, monkeypatch):
    seen = []
    gather = statistics.gather

    def note(clusters, weight, states, **options):
        seen.append((len(states), options["n_mass"]))
        return gather(clusters, weight, states, **options)

    monkeypatch.setattr(statistics, "gather", note)
    full, _ = make(untied_source, tmp_path / "full")
    quick, head = make(untied_source, tmp_path / "quick", quick=True)
    (n_full, mass), (n_quick, quick_mass) = seen
    assert n_quick < n_full / 3 and quick_mass < mass / 3
    assert quick.held_out_tokens <= QUICK.n_reported < full.held_out_tokens
    assert read_section(tmp_path / "quick").calibration == "built-in, quick"
    assert read_section(tmp_path / "full").calibration == "built-in"
    assert np.isfinite(np.array(head.spread)).all()


def test_the_same_seed_gives_the_same_files(untied_source, untied_folder, tmp_path):
    options = {"cluster_size": 8, "n_probes": 90}
    # The model card has the folder's name.
    again, other = (tmp_path / n / untied_folder.name for n in ("again", "other"))
    again.parent.mkdir()
    other.parent.mkdir()
    make(untied_source, again, **options)
    assert files_of(again) == files_of(untied_folder)
    make(untied_source, other, seed=1, **options)
    before, after = files_of(untied_folder), files_of(other)
    assert before.keys() == after.keys()
    changed = {name for name in before if before[name] != after[name]}
    assert changed - {"README.md"} == {HEAD_FILE, "config.json"}


# ---------------------------------------------------------------------------
# The report
# ---------------------------------------------------------------------------


def log_softmax(x: np.ndarray) -> np.ndarray:
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


@pytest.mark.parametrize(
    ("name", "on_gpu"),
    [("llama", False), ("llama", True), ("gemma3_text", False), ("phi", False)],
)
def test_the_report_is_true(tmp_path, monkeypatch, name, on_gpu):
    """Measured once more, on the folder as it was saved. What a GPU does by MLX instead
    of NumPy, MLX can do on a CPU, too."""
    monkeypatch.setattr(linalg, "on_gpu", lambda: on_gpu)
    source = small_models.write(name, tmp_path / "source", 1003)
    report, head = make(source, tmp_path / "made", cluster_size=4, n_probes=150)
    assert report.path == str(tmp_path / "made")
    assert (report.vocab_size, report.hidden_size) == (1003, 64)
    assert (report.n_clusters, report.cluster_size, report.n_probes) == (251, 4, 150)
    assert report.rows_read == (251 + 150 * 4) / 1003
    table = dense_table(source)
    assert report.dense_bytes == table.nbytes == 1003 * 64 * 4
    bias = {"phi": 4}.get(name, 0)
    row = 64 + 8 + bias  # 8-bit values, and a float32 scale and bias
    flash_bytes = 150 * 4 * row + 251 * (32 + 8 + 4)
    assert abs(report.flash_bytes - flash_bytes) <= 8 * bias * 251
    assert report.seconds > 0

    model, tokenizer = mlx_lm.load(str(source))
    path = find_head(model)
    documents = collect.read_documents(None)
    states = collect.collect(model, tokenizer, path, documents).held_out
    states = states[:: -(-len(states) // FULL.n_reported)]
    assert report.held_out_tokens == len(states)
    weight = np.array(table.weight).astype(np.float64)
    module = get_module(model, path)
    bias = np.array(module.bias) if "bias" in module else 0.0
    reference = states.astype(np.float64) @ weight.T + bias
    best = reference.argmax(1)
    found = [head.candidates(mx.array(s)) for s in np.array_split(states, 20)]
    ids = np.concatenate([np.array(f.ids) for f in found])
    logits = np.concatenate([np.array(f.logits) for f in found])
    recall = (ids == best[:, None]).any(1).mean()
    assert abs(report.recall - recall) < 2 / len(states)
    choice = np.take_along_axis(ids, logits.argmax(1)[:, None], 1)[:, 0]
    assert abs(report.agreement - (choice == best).mean()) < 2 / len(states)
    some = np.arange(0, len(states), 7)
    q = np.concatenate([np.array(head(mx.array(states[i])[None])) for i in some])
    p, q = log_softmax(reference[some]), log_softmax(q.astype(np.float64))
    kl = (np.exp(p) * (p - q)).sum(1)
    error = kl.std() / len(some) ** 0.5
    assert abs(report.kl - kl.mean()) < 5 * error + 1e-4

    measured = read_section(tmp_path / "made").measured
    assert measured == Measured(
        report.recall, report.agreement, report.kl, report.held_out_tokens
    )


def test_the_report_says_what_to_do_next(untied_source, tmp_path):
    report, _ = make(untied_source, tmp_path / "made", cluster_size=8)
    text = str(report)
    assert "1,003 tokens" in text and "126 clusters of 8" in text
    assert f"{100 * report.recall:.2f} %" in text
    assert f"--model {tmp_path / 'made'}" in text
    fields = json.loads(json.dumps(dataclasses.asdict(report)))
    assert fields["recall"] == report.recall


def test_progress_is_shown_and_can_be_silent(untied_source, tmp_path, capfd):
    make(untied_source, tmp_path / "a", cluster_size=8)
    assert capfd.readouterr() == ("", "")
    convert(str(untied_source), tmp_path / "b", cluster_size=8, quantize=True)
    shown = capfd.readouterr()
    assert shown.out == ""
    for stage in ("Opening", "Calibration", "Clustering", "Measuring", "Writing"):
        assert stage in shown.err


def test_nothing_of_the_model_stays_patched(untied_source, tmp_path):
    model, _ = mlx_lm.load(str(untied_source))
    names = dict(tree_flatten(model.parameters())).keys()
    make(untied_source, tmp_path / "made")
    again, _ = mlx_lm.load(str(untied_source))
    assert dict(tree_flatten(again.parameters())).keys() == names


def test_what_a_models_code_raises_is_said_in_one_line(
    untied_source, tmp_path, monkeypatch
):
    def fails(*args, **options):
        raise TypeError("no such\ncache")

    monkeypatch.setattr(collect.answers, "states", fails)
    target = tmp_path / "c"
    with pytest.raises(pipeline.ConvertError, match="TypeError: no such cache; use"):
        convert(str(untied_source), target, verbose=False)
    assert not target.exists()


def test_a_model_that_reads_its_layers_attributes_is_converted(tmp_path):
    """Gemma 3n reads and writes those of linear layers, and has an embedding more."""
    source = small_models.write("gemma3n", tmp_path / "source", 603)
    convert(str(source), tmp_path / "c", cluster_size=8, n_probes=40, verbose=False)
    model, tokenizer = load(tmp_path / "c")
    dense, _ = load(tmp_path / "c", dense=True)
    next(flash_heads(model)).n_probes = 76
    tokens = mx.array([tokenizer.encode("The quick brown fox")])
    got, wanted = model(tokens), dense(tokens)
    assert mx.allclose(got, wanted, atol=0.2) and not mx.allclose(got, got * 0)
