"""A GGUF file's head in Q8_0: its rows come through conversion bit for bit."""

from __future__ import annotations

import gguf
import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Quant
from mlx.utils import tree_flatten
from mlx_flashhead.convert import convert
from mlx_flashhead.convert.gguf import read_gguf
from mlx_flashhead.convert.gguf.quantization import floats, table
from small_heads import make_head, random_states
from test_gguf import HIDDEN, VOCAB, gguf_tensors, reference_model, write_gguf

from mlx_flashhead import flash_heads, load
from mlx_flashhead.benchmarking import competitors
from mlx_flashhead.evaluation import evaluate as evaluation
from mlx_flashhead.folder.section import TableForm, read_section
from mlx_flashhead.integration import loading
from mlx_flashhead.integration.exact import verification
from mlx_flashhead.sampling import Settings, coupled, draw

PROMPTS = ["hello world", "The quick brown fox", "0 1 2 3"]


def blocks(scales, values) -> np.ndarray:
    """Bytes of Q8_0: one row for each scale, of one block."""
    scales = np.asarray(scales, np.float16)[:, None].view(np.uint8)
    return np.concatenate([scales, np.asarray(values, np.int8).view(np.uint8)], axis=1)


def in_order(head) -> np.ndarray:
    """A head's rows, float32 ``[V, D]`` in vocabulary order."""
    return np.array(head.embed(mx.arange(head.vocab_size), mx.float32))


def stored_rows(folder) -> np.ndarray:
    """Those in the folder's file."""
    model, _ = load(folder, exact=False)
    return in_order(next(flash_heads(model)))


# ---------------------------------------------------------------------------
# One tensor
# ---------------------------------------------------------------------------


def test_values_are_equal_bit_for_bit():
    """Every int8, with scales large, small, negative, subnormal and zero."""
    scales = [1.0, -0.3, 511.75, -511.75, 6.1e-5, 5.96e-8, -1e-6, 0.0, 0.0123]
    rng = np.random.default_rng(0)
    scales += list(np.exp(rng.uniform(-16, 6, 7)))
    every = np.arange(-128, 128, dtype=np.int8).reshape(8, 32)
    raw = np.concatenate([blocks(scales, every[[i % 8] * 16]) for i in range(8)])
    raw = raw.reshape(32, -1)
    found = table(raw, Quant.Q8_0)
    assert (found.bits, found.group_size, found.mode) == (8, 32, "affine")
    assert found.scales.dtype == found.biases.dtype == mx.float16
    wanted = gguf.dequantize(raw, Quant.Q8_0)
    assert found.hidden_size == wanted.shape[1] == 128
    np.testing.assert_array_equal(np.array(found.dequantize(mx.float32)), wanted)
    np.testing.assert_array_equal(floats(raw, Quant.Q8_0), wanted)


@pytest.mark.parametrize("scale", [512.0, -512.0, np.inf, np.nan])
def test_scales_too_large_for_an_offset_have_no_table(scale):
    values = np.ones((2, 32))
    assert table(blocks([1.0, scale], values), Quant.Q8_0) is None
    assert table(blocks([1.0, 511.75], values), Quant.Q8_0) is not None


@pytest.mark.parametrize(
    "arch, tied", [("llama", True), ("llama", False), ("gemma3", True)]
)
def test_the_head_of_a_file(tmp_path, arch, tied):
    tensors = gguf_tensors(arch, reference_model(arch, tied))
    model = read_gguf(write_gguf(tmp_path / "m.gguf", arch, tensors, Quant.Q8_0))
    name = "model.embed_tokens.weight" if tied else "lm_head.weight"
    wanted = dict(model.tensors("float32"))[name]
    assert mx.array_equal(model.exact_head().dequantize(mx.float32), wanted)


@pytest.mark.parametrize("quant", [Quant.F16, Quant.BF16, Quant.Q4_0, Quant.Q5_1])
def test_other_quantizations_have_no_exact_head(tmp_path, quant):
    tensors = gguf_tensors("llama", reference_model("llama"))
    file = write_gguf(tmp_path / "m.gguf", "llama", tensors, quant)
    assert read_gguf(file).exact_head() is None


def test_a_scale_of_its_own_is_no_exact_head(tmp_path):
    tensors = gguf_tensors("llama", reference_model("llama"))
    tensors["token_embd.scale"] = np.array([0.5], np.float32)
    file = write_gguf(tmp_path / "m.gguf", "llama", tensors, Quant.Q8_0)
    assert read_gguf(file).exact_head() is None


# ---------------------------------------------------------------------------
# Conversions
# ---------------------------------------------------------------------------


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def case(request, tmp_path_factory):
    """A file, its folder, the report and the file's rows."""
    tmp = tmp_path_factory.mktemp("q8_0")
    tensors = gguf_tensors("llama", reference_model("llama", request.param))
    file = write_gguf(tmp / "m.gguf", "llama", tensors, Quant.Q8_0)
    report = made(file, tmp / "made")
    name = "token_embd.weight" if request.param else "output.weight"
    rows = gguf.dequantize(gguf.quantize(tensors[name], Quant.Q8_0), Quant.Q8_0)
    return file, tmp / "made", report, rows


def made(file, folder, **options):
    options = {"cluster_size": 8, "verbose": False} | options
    return convert(gguf_path=str(file), mlx_path=folder, **options)


def test_a_folder_has_the_files_rows(case):
    _, folder, report, rows = case
    np.testing.assert_array_equal(stored_rows(folder), rows)
    section = read_section(folder)
    assert section.rows == TableForm(8, 32) and section.draft.rows == "stored"
    assert (report.head_bits, report.dense_bits) == (8, 8)
    padded = -(-VOCAB // 8) * 8
    assert report.dense_bytes == padded * HIDDEN * 9 // 8
    assert f"dense 8-bit {report.dense_bytes / 1e6:.1f} MB" in str(report)
    assert f"dense 8-bit head | {report.dense_bytes / 1e6:.1f} MB" in (
        folder / "README.md"
    ).read_text(encoding="utf-8")
    for options in ({}, {"dense": True}):
        model, _ = load(folder, **options)
        np.testing.assert_array_equal(in_order(next(flash_heads(model))), rows)


def test_stock_mlx_lm_has_a_bfloat16_model(case):
    """float16 scales in it would make its whole body float32."""
    model, _ = mlx_lm.load(str(case[1]))
    assert {a.dtype for _, a in tree_flatten(model.parameters())} == {mx.bfloat16}
    assert model(mx.array([[1, 2, 3]])).dtype == mx.bfloat16
    model, _ = load(case[1], exact=False)
    assert next(flash_heads(model)).centroids.bits == 4


def test_asking_for_what_the_file_has_changes_nothing(case, tmp_path):
    made(case[0], tmp_path / "again", head_bits=8, group_size=32)
    np.testing.assert_array_equal(stored_rows(tmp_path / "again"), case[3])


@pytest.mark.parametrize(
    "options, form, deciding",
    [
        ({"quantize": True}, TableForm(8, 64), "model"),
        ({"head_bits": 4}, TableForm(4, 64), "stored"),
        ({"head_bits": 16}, TableForm(16, 0), "model"),
        ({"group_size": 64}, TableForm(8, 64), "model"),
    ],
    ids=str,
)
def test_asking_for_anything_else_rounds(case, tmp_path, options, form, deciding):
    report = made(case[0], tmp_path / "made", **options)
    section = read_section(tmp_path / "made")
    assert section.rows == form and section.draft.rows == deciding
    assert report.head_bits == form.bits
    error = np.abs(stored_rows(tmp_path / "made") - case[3]).max()
    assert 0 < error < 0.1 * np.abs(case[3]).max()


@pytest.mark.parametrize("quant, scale", [(Quant.Q4_0, 1.0), (Quant.Q8_0, 3e5)])
def test_other_heads_are_rounded_as_ever(tmp_path, quant, scale):
    """Also those whose scales are so large that their offsets overflow."""
    tensors = gguf_tensors("llama", reference_model("llama"))
    tensors["token_embd.weight"][5] *= scale
    file = write_gguf(tmp_path / "m.gguf", "llama", tensors, quant)
    assert read_gguf(file).exact_head() is None
    made(file, tmp_path / "made")
    section = read_section(tmp_path / "made")
    assert section.rows == TableForm(8, 64) and section.draft.rows == "model"


# ---------------------------------------------------------------------------
# Decoding
# ---------------------------------------------------------------------------


def texts(folder, **options) -> list[list[int]]:
    model, tokenizer = load(folder, **options)
    return [
        [r.token for r in mlx_lm.stream_generate(model, tokenizer, p, max_tokens=30)]
        for p in PROMPTS
    ]


@pytest.mark.filterwarnings("ignore:.*are probed at every step")
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
def test_exact_texts_are_those_of_the_dense_head(case, monkeypatch, dtype):
    if dtype == mx.bfloat16:
        # As on a GPU: nothing is cast or unpacked.
        monkeypatch.setattr(loading, "on_gpu", lambda: True)
        monkeypatch.setattr(loading, "for_device", lambda model: model)
    wanted = texts(case[1], dense=True)
    for n_probes in (4, 20):
        with verification() as count:
            assert texts(case[1], n_probes=n_probes) == wanted
        assert count.verifications < count.tokens
    model, _ = load(case[1])
    (head,) = flash_heads(model)
    scales = mx.float16 if dtype == mx.bfloat16 else mx.float32
    assert head.rows.dtype == scales
    logits = model(mx.array([[1, 2, 3]]))
    assert logits.dtype == mx.float32  # not rounded to bfloat16
    if "head" in model.model.embed_tokens:
        embeddings = model.model.embed_tokens(mx.arange(VOCAB))
        assert mx.array_equal(embeddings, mx.array(case[3]).astype(dtype))


def test_drafts_round_as_the_dense_head_does():
    """bfloat16 states and float16 scales: in float32, not in either of them."""
    head = make_head(230, 32, 8, 29, bits=8, dtype=mx.float16).head
    x = mx.array(0.02 * random_states(200, 32, 3)).astype(mx.bfloat16)
    logits = head.clustered(x)
    assert logits.dtype == head.product_dtype(mx.bfloat16) == mx.float32
    assert head.product_dtype(mx.float16) == mx.float16
    wanted = coupled.draw(
        head, Settings(), logits, mx.zeros((len(x), 2), mx.uint32)
    ).tokens
    key = mx.zeros(2, mx.uint32)
    drafts = [draw(head, Settings(), row[None], key).tokens.item() for row in x]
    assert drafts == wanted.tolist()


def test_rows_are_unpacked_in_float32(case, monkeypatch):
    """In float16, which MLX unpacks float16 scales in, the small ones would be lost."""
    monkeypatch.setattr(loading, "on_gpu", lambda: True)
    monkeypatch.setattr(loading, "for_device", lambda model: model)
    model, _ = load(case[1])
    (head,) = flash_heads(model)
    ids = mx.arange(VOCAB)
    rounded = np.array(head.embed(ids).astype(mx.float32))
    assert np.abs(rounded - case[3]).max() > 0
    np.testing.assert_array_equal(np.array(head.embed(ids, mx.float32)), case[3])


# ---------------------------------------------------------------------------
# Measured
# ---------------------------------------------------------------------------


def test_the_file_is_a_reference_without_rounding(case, tmp_path):
    file, folder, report, _ = case
    text = tmp_path / "a.txt"
    text.write_text("hello world, " * 20)
    found = evaluation.evaluate(
        folder,
        [text],
        tokens=60,
        reference=str(file),
        n_probes=[report.n_clusters],
        verbose=False,
    )
    heads = found["overall"]["heads"]
    whole = heads[f"FlashHead {report.n_clusters}"]
    assert whole["agreement"] == 1 and whole["total_variation"] < 1e-5
    assert heads["dense 8-bit"]["total_variation"] > 1e-4


def test_its_dense_heads_can_be_timed(case):
    made, _ = competitors.heads(case[1], competitors.HEADS)
    assert [c.kind for c in made] == list(competitors.HEADS)
    assert "FlashHead 8-bit" in next(c.name for c in made if c.kind == "flash")
